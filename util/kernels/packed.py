"""The kernels that attention over packed pieces can run on, each with a forward and a backward pass of its own, and one
operator of torch over them all.

The operator is what compiled layers see: one opaque call whose output can be kept by name (`OPERATOR`), in whose graph
no length of any piece is written. Which kernel it runs, it may decide anew in each call (rule.py).

Letters: T tokens in the packed row, H query heads, G key-value heads (H is a multiple of G), D width of a head, and
n neighbouring pieces of L tokens each. q (T, H, D), k and v (T, G, D) -> (T, H, D).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from util.kernels import rule

aten = torch.ops.aten
OPERATOR = "qwen2_vl::packed_attention"  # torch.ops.qwen2_vl.packed_attention.default


@dataclass(frozen=True)
class Pieces:
    """Where the pieces of one row begin and end, for the device and for Python."""

    starts: Tensor  # (B + 1,) int32 on the device, the last entry is T
    longest: int
    runs: tuple[tuple[int, int], ...]  # (n, L), in the order of the row

    @property
    def rows(self) -> list[int]:
        """Tokens of each run."""
        return [count * length for count, length in self.runs]


@lru_cache(256)
def runs_of(starts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(0, 3, 6, 7) -> ((2, 3), (1, 1)): neighbouring pieces of the same length together, empty ones left out."""
    lengths = [end - begin for begin, end in pairwise(starts) if end > begin]
    return tuple((len(list(pieces)), length) for length, pieces in groupby(lengths))


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention within each piece.

    forward(q, k, v, pieces, causal, scale) -> the output (T, H, D) and the logarithm of each row's sum of exponentials,
    H x T numbers in the kernel's own order; backward(gradient, q, k, v, output, sums, pieces, causal, scale) -> the
    gradients of q, k and v.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


# ---- one call for pieces of any length -------------------------------------------------------------------------------


def variable_length(forward: Callable, backward: Callable) -> Kernel:
    """A kernel with the signature of torch's own FlashAttention-2, which FlashAttention-3 and 4 have there, too."""

    def run_forward(q, k, v, pieces, causal, scale):
        starts, longest = pieces.starts, pieces.longest
        window = {"window_size_left": -1, "window_size_right": 0 if causal else -1}
        out, sums, *_ = forward(
            q, k, v, starts, starts, longest, longest, 0.0, causal, return_debug_mask=False, scale=scale, **window
        )
        return out, sums

    def run_backward(gradient, q, k, v, out, sums, pieces, causal, scale):
        starts, longest = pieces.starts, pieces.longest
        window = {"window_size_left": -1, "window_size_right": 0 if causal else -1}
        random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # nothing is dropped, so it is not read
        unused = torch.empty(0, device=q.device)
        return backward(
            gradient, q, k, v, out, sums, starts, starts, longest, longest, 0.0, causal, random_state, unused,
            scale=scale, **window,
        )  # fmt: skip

    return Kernel(run_forward, run_backward)


def flash_3() -> Kernel:
    from torch.nn.attention import _fa3

    _fa3._fa3_import_module("flash_attn_interface")
    return variable_length(_fa3._fa3_flash_attention_forward_impl_default, _fa3._fa3_flash_attention_backward_impl)


def flash_4() -> Kernel:
    from torch.nn.attention import _fa4

    _fa4._FA4_MODULE_PATH = "flash_attn.cute.interface"
    _fa4._fa4_import_module(_fa4._FA4_MODULE_PATH)
    return without_window(_fa4._fa4_flash_attention_forward_impl, _fa4._fa4_flash_attention_backward_impl)


def without_window(forward: Callable, backward: Callable) -> Kernel:
    """FlashAttention-4: `causal` says all, and torch 2.11 refuses any window in its backward pass."""

    def strip(function: Callable) -> Callable:
        def run(*args, window_size_left, window_size_right, **kwargs):
            return function(*args, **kwargs)

        return run

    return variable_length(strip(forward), strip(backward))


def cudnn_forward(q, k, v, pieces, causal, scale):
    starts, longest = pieces.starts, pieces.longest
    out, sums, *_ = aten._cudnn_attention_forward(
        q, k, v, None, starts, starts, longest, longest, True, 0.0, causal, False, scale=scale
    )
    # (T, H, 1) or (H, T), by the version; the backward pass wants what the forward pass gave.
    TOKENS_FIRST[q.device] = sums.shape[0] == len(q)
    return out, sums


TOKENS_FIRST: dict[torch.device, bool] = {}


def cudnn_backward(gradient, q, k, v, out, sums, pieces, causal, scale):
    starts, longest = pieces.starts, pieces.longest
    if TOKENS_FIRST[q.device]:
        sums = sums.view(q.shape[0], q.shape[1], 1)
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # nothing is dropped, so it is not read
    return aten._cudnn_attention_backward(
        gradient, q, k, v, out, sums, random_state, random_state, None, starts, starts, longest, longest, 0.0, causal,
        scale=scale,
    )  # fmt: skip


# ---- pieces of the same length as a batch ----------------------------------------------------------------------------


def stacked(x: Tensor, run: tuple[int, int]) -> Tensor:
    """(n L, heads, D) -> (n, heads, L, D), the same memory."""
    return x.unflatten(0, run).transpose(1, 2)


def laid_out(x: Tensor) -> Tensor:
    """(n, heads, L, D) -> (n L, heads, D), in the way of `stacked`'s input."""
    return x.transpose(1, 2).flatten(0, 1)


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def stack_by_stack(forward: Callable, backward: Callable) -> Kernel:
    """A kernel of same-length pieces, called once for each run of neighbours that have one length.

    forward(q, k, v, causal, scale) on (n, heads, L, D) -> output, sums of n x H x L numbers;
    backward(gradient, q, k, v, output, sums, causal, scale) -> gradients of q, k and v.
    """

    def run_forward(q, k, v, pieces, causal, scale):
        outs, all_sums = [], []
        for *tensors, run in zip(*(x.split(pieces.rows) for x in (q, k, v)), pieces.runs, strict=True):
            out, sums = forward(*(stacked(x, run) for x in tensors), causal, scale)
            outs.append(laid_out(out))
            all_sums.append(sums.reshape(-1))
        return joined(outs), joined(all_sums)

    def run_backward(gradient, q, k, v, out, sums, pieces, causal, scale):
        heads = q.shape[1]
        found = []
        parts = zip(*(x.split(pieces.rows) for x in (gradient, q, k, v, out)), pieces.runs, strict=True)
        all_sums = sums.reshape(-1).split([heads * rows for rows in pieces.rows])
        for (*tensors, run), sums_of_run in zip(parts, all_sums, strict=True):
            count, length = run
            shaped = sums_of_run.view(count, heads, length)
            gradients = backward(*(stacked(x, run) for x in tensors), shaped, causal, scale)
            found.append([laid_out(x) for x in gradients])
        return tuple(joined(list(gradients)) for gradients in zip(*found, strict=True))

    return Kernel(run_forward, run_backward)


def dense_cudnn_forward(q, k, v, causal, scale):
    out, sums, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, sums


def dense_cudnn_backward(gradient, q, k, v, out, sums, causal, scale):
    random_state = torch.zeros((), dtype=torch.int64, device=q.device)  # nothing is dropped, so it is not read
    length = q.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        gradient, q, k, v, out, sums[..., None], random_state, random_state, None, None, None, length, length, 0.0,
        causal, scale=scale,
    )  # fmt: skip


def dense_flash_forward(q, k, v, causal, scale):
    """torch's FlashAttention-2 takes (n, L, heads, D) and any number of key-value heads when it is called like this."""
    tensors = [x.transpose(1, 2) for x in (q, k, v)]
    length = q.shape[2]
    out, sums, *_ = aten._flash_attention_forward(
        *tensors, None, None, length, length, 0.0, causal, return_debug_mask=False, scale=scale
    )
    return out.transpose(1, 2), sums


def dense_flash_backward(gradient, q, k, v, out, sums, causal, scale):
    tensors = [x.transpose(1, 2) for x in (gradient, q, k, v, out)]
    length = q.shape[2]
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    gradients = aten._flash_attention_backward(
        *tensors, sums, None, None, length, length, 0.0, causal, random_state, unused, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in gradients)


def plain_forward(q, k, v, causal, scale):
    """By its formula, anywhere and in any precision: memory grows with the square of L."""
    scores = plain_scores(q, k, causal, scale)
    sums = scores.logsumexp(-1)
    weights = (scores - sums[..., None]).exp().to(v.dtype)
    return weights @ repeated(v, q), sums


def plain_backward(gradient, q, k, v, out, sums, causal, scale):
    """The gradients of the formula (FlashAttention, arXiv 2205.14135, appendix B.2), in the precision of the sums."""
    wide = sums.dtype
    gradient, out = gradient.to(wide), out.to(wide)
    keys, values = (repeated(x, q).to(wide) for x in (k, v))
    weights = (plain_scores(q, k, causal, scale) - sums[..., None]).exp()
    of_weights = gradient @ values.transpose(-1, -2)
    of_scores = weights * (of_weights - (gradient * out).sum(-1, keepdim=True)) * scale
    of_q = of_scores @ keys
    of_k = gathered(of_scores.transpose(-1, -2) @ q.to(wide), k)
    of_v = gathered(weights.transpose(-1, -2) @ gradient, v)
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype)


def plain_scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """(n, H, L, L) in fp32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ repeated(k, q).to(wide).transpose(-1, -2) * scale
    if causal:
        length = q.shape[2]
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """(n, G, L, D) -> (n, H, L, D): each key-value head for all the query heads that share it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def gathered(gradient: Tensor, x: Tensor) -> Tensor:
    """(n, H, L, D) -> (n, G, L, D): the gradients of `repeated` heads, added up."""
    return gradient.unflatten(1, (x.shape[1], -1)).sum(2)


# ---- all of them ----------------------------------------------------------------------------------------------------

# Each is made when it is first asked for: what a package must be imported for is imported then.
KERNELS: dict[str, Callable[[], Kernel]] = {
    "varlen": lambda: variable_length(aten._flash_attention_forward, aten._flash_attention_backward),
    "cudnn": lambda: Kernel(cudnn_forward, cudnn_backward),
    "dense": lambda: stack_by_stack(dense_cudnn_forward, dense_cudnn_backward),
    "dense_flash": lambda: stack_by_stack(dense_flash_forward, dense_flash_backward),
    "flash_3": flash_3,
    "flash_4": flash_4,
    "plain": lambda: stack_by_stack(plain_forward, plain_backward),
}


@lru_cache(None)
def kernel(name: str) -> Kernel:
    return KERNELS[name]()


# ---- the operator ----------------------------------------------------------------------------------------------------


@lru_cache(16)
def capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) of anything else."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def call_of(q: Tensor, k: Tensor, pieces: Pieces, causal: bool) -> rule.Call:
    """What the rule may know of a call."""
    return rule.Call(
        capability(q.device), q.dtype, q.shape[1], k.shape[1], q.shape[2], causal,
        pieces=sum(count for count, _ in pieces.runs), longest=pieces.longest, tokens=len(q), runs=len(pieces.runs),
        shortest=min((length for _, length in pieces.runs), default=0),
    )  # fmt: skip


def name_of(asked: str, call: rule.Call) -> str:
    """The kernel that a call runs on. Forward and backward pass both ask, and nothing that the answer depends on may
    change between them: what a forward pass learns, it learns of its own call."""
    if asked == rule.AUTO:
        return rule.chosen(call)
    return asked if asked == "plain" or rule.serves(asked, call) else rule.DEFAULT


@torch.library.custom_op(OPERATOR, mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, host_starts: Tensor, longest: int, causal: bool, scale: float,
    asked: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each piece within itself: the output, and what the backward pass of the same kernel needs.

    starts and host_starts (B + 1,): the same numbers on the device and on the CPU, where Python reads them for nothing.
    `asked`: a kernel's name, which the default stands in for in calls that it does not serve; or `auto`.
    """
    pieces = Pieces(starts, longest, runs_of(tuple(host_starts.tolist())))
    call = call_of(q, k, pieces, causal)
    name = name_of(asked, call)
    given = (q, k, v, pieces, causal, scale)
    return carefully(name, call, given) if asked == rule.AUTO else forward_by(name, given)


def forward_by(name: str, given: tuple) -> tuple[Tensor, Tensor]:
    """Output (T, H, D), and the sums as (H, T) numbers in the kernel's own order. RuntimeError for others."""
    q = given[0]
    out, sums = kernel(name).forward(*given)
    return out.contiguous(), sums.contiguous().view(q.shape[1], q.shape[0])


def carefully(name: str, call: rule.Call, given: tuple) -> tuple[Tensor, Tensor]:
    """The forward pass of a kernel that nobody asked for by name, or of another one where that one cannot do it.

    In the first call of its kind it must compute what the default computes. Nobody should lose a run, or learn from
    wrong gradients, because a library was in the way of the rule.
    """
    if name == rule.DEFAULT:
        return forward_by(name, given)
    proof = rule.proof_of(name, call)
    known = rule.known
    try:
        if proof not in known.proved:
            gap = difference(name, given)
            known.proved[proof] = gap < LARGEST_GAP
            if not known.proved[proof]:
                raise RuntimeError(f"it differs from varlen by {gap:.1e} of the norm")
        return forward_by(name, given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any library
        known.refused.add((name, call))
        known.proved.setdefault(proof, False)
        told = str(error).strip().splitlines() or [type(error).__name__]
        tqdm.write(f"--attention auto: {rule.WORDS[name]} is not used for {call.bucket}: {told[0]}")
    return carefully(rule.chosen(call), call, given)  # each refusal leaves fewer


LARGEST_GAP = 2e-2  # between two kernels in bf16, of the norm; two right ones differ by 3e-3


def difference(name: str, given: tuple) -> float:
    """How far output and gradients of a kernel are from the default's: the largest share of the norm."""
    q, k, v, *rest = given
    # Random numbers of its own: those of the run go on as if nothing had been tried.
    gradient = torch.randn(q.shape, generator=torch.Generator(q.device).manual_seed(0), device=q.device).to(q.dtype)
    found = []
    for one in (rule.DEFAULT, name):
        out, sums = forward_by(one, given)
        found.append([out, *kernel(one).backward(gradient, q, k, v, out, sums, *rest)])
    gaps = [((mine.float() - other.float()).norm() / other.float().norm()) for other, mine in zip(*found, strict=True)]
    return torch.stack(gaps).nan_to_num(torch.inf).max().item()


@packed_attention.register_fake
def _(q, k, v, starts, host_starts, longest, causal, scale, asked):
    sums = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), sums


@torch.library.custom_op(OPERATOR + "_backward", mutates_args=())
def packed_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, starts: Tensor, host_starts: Tensor,
    longest: int, causal: bool, scale: float, asked: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pieces = Pieces(starts, longest, runs_of(tuple(host_starts.tolist())))
    run = kernel(name_of(asked, call_of(q, k, pieces, causal))).backward
    of_q, of_k, of_v = run(gradient.contiguous(), q, k, v, out, sums, pieces, causal, scale)
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


@packed_attention_backward.register_fake
def _(gradient, q, k, v, out, sums, starts, host_starts, longest, causal, scale, asked):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def keep_for_backward(ctx, inputs, output) -> None:
    q, k, v, starts, host_starts, longest, causal, scale, asked = inputs
    ctx.save_for_backward(q, k, v, *output, starts, host_starts)
    ctx.rest = (longest, causal, scale, asked)
    ctx.set_materialize_grads(False)  # the sums have no gradient, and zeros of their size are not made


def backward(ctx, gradient, of_sums):
    q, k, v, out, sums, starts, host_starts = ctx.saved_tensors
    of_inputs = packed_attention_backward(gradient, q, k, v, out, sums, starts, host_starts, *ctx.rest)
    return (*of_inputs, *[None] * 6)


packed_attention.register_autograd(backward, setup_context=keep_for_backward)
