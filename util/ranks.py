"""What code asks of the other ranks where it may run in one process or in several."""

import torch
import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    return rank_and_size()[0] == 0


def are_several() -> bool:
    return rank_and_size()[1] > 1


def gather_on_all(value: object) -> list:
    """Every rank's value, in order of their ranks; all ranks get the list, so all must call."""
    shares = [value]
    if are_several():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, value)
    return shares


def gather_on_first(value: object) -> list:
    """Every rank's value on the first rank; an empty list on the others. All ranks must call."""
    if not are_several():
        return [value]
    shares: list = [None] * dist.get_world_size() if is_first() else []
    dist.gather_object(value, shares or None, dst=0)
    return shares


def from_first(value: object) -> object:
    """The first rank's value, on all ranks."""
    box = [value if is_first() else None]
    if are_several():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def sent_to_first(
    tensor: torch.Tensor | None, sender: int, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor | None:
    """A tensor in CPU memory of rank `sender`, on the first rank; None on all others. Only these two need to call."""
    rank, _ = rank_and_size()
    if rank == sender:
        assert tensor is not None
        dist.send(tensor.contiguous(), dst=0)
    if rank != 0:
        return None
    received = torch.empty(shape, dtype=dtype)
    dist.recv(received, src=sender)
    return received


def any_of(flag: bool | int) -> bool:
    """Whether the flag is set on any rank; all ranks must call. It goes over the CPU, so that no GPU is waited for."""
    if not are_several():
        return bool(flag)
    ranks_where = torch.tensor(int(flag))
    dist.all_reduce(ranks_where)
    return ranks_where.item() > 0
