"""AdamW for a model in bf16 that is as exact as over fp32 weights.

An fp32 weight is kept as its nearest bf16, which the model computes with, and the 16 bits that are then missing, which
the optimizer alone reads:

    1.1 = 0x3F8CCCCD = bf16 0x3F8D, which is 0x3F8D0000, and the remainder 0xCCCD - 0x10000 = -0x3333

Bytes per parameter: 2 (bf16), 2 (remainder), 8 (two moments in fp32), and of the gradient 2 in bf16 or 4 in fp32. No
weight is cast or copied for a pass, and no fp32 copy of all weights ever exists.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

REMAINDER = "missing_bits"  # the attribute of a bf16 parameter that holds its remainder, int16
PIECE = 2**26  # elements that are put together or cut in two at a time
CACHED = 2**16  # elements that a CPU updates at a time: what is made on the way, 256 KiB each, stays in its cache


# ---- one fp32 as two halves -----------------------------------------------------------------------------------------


def join(nearest: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """bf16 and int16 of the same shape -> the fp32 that they stand for, bit for bit."""
    upper = nearest.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return upper.add_(remainder).view(torch.float32)


def split(exact: torch.Tensor, nearest: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write an fp32 tensor into its two halves, bf16 and int16.

    A tie goes upward, away from zero, and not to the even neighbour: the remainder of a number halfway between two bf16
    is then always -0x8000, which 16 bits with a sign can hold, and never +0x8000, which they cannot.
    """
    bits = exact.view(torch.int32)
    upper = (bits + 0x8000).bitwise_right_shift_(16)
    nearest.copy_(upper.to(torch.int16).view(torch.bfloat16))
    remainder.copy_(bits - upper.bitwise_left_shift_(16))


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same few elements of each of several tensors, so that what is made of them is small: an embedding of 7B has
    2 GiB in fp32."""
    return zip(*(tensor.detach().reshape(-1).split(PIECE) for tensor in tensors), strict=True)


@torch.no_grad()
def keep_as_halves(parameter: nn.Parameter) -> None:
    """Let an fp32 parameter be bf16, and a bf16 one that is trained know its missing bits, on its own device.

    Whoever moves a parameter calls this again, since modules know nothing of the attribute. What is neither fp32 nor
    bf16 (weights of 4 bits) stays as it is.
    """
    remainder = getattr(parameter, REMAINDER, None)
    if parameter.dtype == torch.float32:
        exact = parameter.data
        parameter.data = torch.empty_like(exact, dtype=torch.bfloat16)
        set_exact_value(parameter, exact)
    elif remainder is not None:
        setattr(parameter, REMAINDER, remainder.to(parameter.device))
    elif parameter.dtype == torch.bfloat16 and parameter.requires_grad:
        setattr(parameter, REMAINDER, torch.zeros_like(parameter.data, dtype=torch.int16))


@torch.no_grad()
def exact_value(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter as it is trained: of one in two halves the fp32, made anew; any other as it is."""
    remainder = getattr(parameter, REMAINDER, None)
    return parameter.detach() if remainder is None else join(parameter.detach(), remainder)


@torch.no_grad()
def exact_pieces(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The fp32 value of a bf16 parameter, a few elements at a time, in one dimension."""
    remainder = getattr(parameter, REMAINDER, None)
    if remainder is None:
        yield from (nearest.float() for (nearest,) in pieces(parameter))
    else:
        yield from (join(nearest, missing) for nearest, missing in pieces(parameter, remainder))


@torch.no_grad()
def set_exact_value(parameter: torch.Tensor, exact: torch.Tensor) -> None:
    """Give a parameter a value in fp32, which `exact_value` then returns; `exact` may lie on another device.

    A frozen parameter whose value is a bf16 keeps no missing bits.
    """
    if parameter.dtype != torch.bfloat16:
        parameter.copy_(exact)
        return
    remainder = getattr(parameter, REMAINDER, None)
    if remainder is None:
        remainder = torch.empty_like(parameter.data, dtype=torch.int16)
    for nearest, missing, piece in pieces(parameter, remainder, exact):
        split(piece.to(parameter.device), nearest, missing)
    is_needed = parameter.requires_grad or bool(remainder.any())
    setattr(parameter, REMAINDER, remainder if is_needed else None)


# ---- the optimizer --------------------------------------------------------------------------------------------------


class MixedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) over bf16 parameters with a remainder (`keep_as_halves`), computed in fp32.

    On a CPU it gives bit for bit what `torch.optim.AdamW(foreach=False, fused=False)` gives on fp32 weights. Its state
    is that one's, too: `exp_avg` and `exp_avg_sq` in fp32, and `step` on the CPU. On a GPU each list of `together` is
    updated by one call of a compiled function; lists of the same shapes share it.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        together: Sequence[Sequence[nn.Parameter]] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """`groups`: each with "params", "weight_decay" and "lr"."""
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.01, "betas": betas, "eps": eps, "fused": False})
        parameters = parameters_of(self.param_groups)
        self.together = together or [[parameter] for parameter in parameters]
        self.gradient_factor: torch.Tensor | None = None  # of the next step's gradients: see `clip_gradient`
        self.update = compiled_update() if parameters[0].device.type == "cuda" else update_in_pieces

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group_of: dict[nn.Parameter, dict] = {}
        for group in self.param_groups:
            group_of |= dict.fromkeys(group["params"], group)
        lists = list(map(with_gradient, self.together))
        trained = list(chain.from_iterable(lists))
        if not trained:
            return
        device = trained[0].device
        rows = [self.numbers(parameter, group_of[parameter]) for parameter in trained]
        numbers = torch.tensor(rows, dtype=torch.float32)
        factor = self.gradient_factor
        if device.type == "cuda":  # from pinned memory, so that the device is not waited for
            numbers = numbers.pin_memory().to(device, non_blocking=True)
        if factor is None:
            factor = torch.ones((), device=device)
        begin = 0
        for listed in lists:
            end = begin + len(listed)
            if listed:
                self.update_list(listed, numbers[begin:end], factor)
            begin = end
        self.gradient_factor = None

    def numbers(self, parameter: nn.Parameter, group: dict) -> tuple[float, float, float, float]:
        """Count a step of a parameter: what decay leaves of its weight, the step's size with its sign, the root of the
        second moment's bias correction, and epsilon."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        step = state["step"].item()
        beta1, beta2 = group["betas"]
        size = group["lr"] / (1 - beta1**step)
        return 1 - group["lr"] * group["weight_decay"], -size, math.sqrt(1 - beta2**step), group["eps"]

    def update_list(self, parameters: list[nn.Parameter], numbers: torch.Tensor, factor: torch.Tensor) -> None:
        remainders = [getattr(parameter, REMAINDER) for parameter in parameters]
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        gradients: Any = [parameter.grad for parameter in parameters]
        weights = [parameter.detach() for parameter in parameters]
        self.update(weights, remainders, means, squares, gradients, numbers, factor, *self.defaults["betas"])


def parameters_of(groups: Iterable[dict]) -> list[nn.Parameter]:
    """Of an optimizer's groups."""
    return list(chain.from_iterable(group["params"] for group in groups))


def with_gradient(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.grad is not None]


def update(
    weights: list[torch.Tensor],
    remainders: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    gradients: list[torch.Tensor],
    numbers: torch.Tensor,
    factor: torch.Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """One step of N tensors, in place. `numbers`: (N, 4), see MixedAdamW.numbers; `factor`: of all gradients.

    Written as torch's own form for single tensors is, whose rounding it shares.
    """
    tensors = zip(weights, remainders, means, squares, gradients, strict=True)
    for number, (nearest, remainder, mean, square, gradient) in enumerate(tensors):
        kept, step_size, root, eps = numbers[number].unbind()
        exact = join(nearest, remainder).mul_(kept)
        gradient = gradient.float() * factor
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (square.sqrt() / root).add_(eps)
        # addcdiv takes no tensor as its factor, and a number would be compiled anew in each step
        exact.add_(mean.mul(step_size).div_(spread))
        split(exact, nearest, remainder)


def update_in_pieces(*arguments: Any) -> None:
    """As `update`, a few elements at a time, which changes nothing but time."""
    *lists, numbers, factor, beta1, beta2 = arguments
    for number, (*states, gradient) in enumerate(zip(*lists, strict=True)):
        flat = [*(state.view(-1) for state in states), gradient.reshape(-1)]
        own = numbers[number : number + 1]
        for weight, remainder, mean, square, part in zip(*(tensor.split(CACHED) for tensor in flat), strict=True):
            update([weight], [remainder], [mean], [square], [part], own, factor, beta1, beta2)


# ---- compiled, on a GPU ---------------------------------------------------------------------------------------------


MOST_GRAPHS = 64  # one for each list of other shapes: layers, blocks, the rest, and each of them without a part


def compiled_update() -> Callable:
    """`update` as few fused kernels, which read and write each tensor once; as it is where it cannot be compiled."""
    from torch._dynamo.exc import TorchDynamoException  # not at the top, as it takes long to import

    compiled = torch.compile(update, fullgraph=True, dynamic=False)
    works = True

    def run(*arguments) -> None:
        nonlocal works
        if works:
            try:
                with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                    compiled(*arguments)
                return
            except TorchDynamoException as error:  # raised before anything was computed
                works = False
                reason = str(error).strip().splitlines()[0]
                tqdm.write(f"the optimizer's update is not compiled, and slower for it: {reason}")
        update(*arguments)

    return run
