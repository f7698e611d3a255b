"""Attention over packed sequences: many samples in one row, each seeing only itself.

`Segments` says where each begins and ends. On a GPU a kernel is chosen for each call (util/kernels); on a CPU, and in
fp32, neighbouring segments of the same length are stacked and go through torch's scaled_dot_product_attention together.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, groupby

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from util.kernels import rule
from util.kernels.packed import packed_attention

# transformers hands the vision tower's whole row to an attention function in one call only where its name contains
# "flash"; under any other name it splits the row in a Python loop.
NAME = "packed_flash_"


@dataclass
class Segments:
    """The lengths of consecutive pieces of one row, made once per batch and used by every layer."""

    cu_seqlens: torch.Tensor  # (B + 1,) int32, where each piece begins; the last entry is the row's length
    max_seqlen: int
    runs: list[tuple[int, int]]  # (n, L): n neighbouring pieces of length L, in the order of the row
    host_starts: torch.Tensor  # cu_seqlens on the CPU, where a kernel is chosen without asking the device

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        runs = [(len(list(pieces)), length) for length, pieces in groupby(lengths)]
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        return cls(starts, max(lengths, default=0), runs, starts)

    @property
    def lengths(self) -> list[int]:
        """The length of each piece, known without asking the device."""
        return [*chain.from_iterable([length] * count for count, length in self.runs)]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segments":
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory())


def stacked_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, scale: float):
    """Exact on any device and in any dtype. q (T, H, D), k and v (T, H_kv, D) -> (T, H, D).

    Neighbours of the same length are stacked and attend in one call; the longest-first order of a micro-batch makes
    equals neighbours.
    """
    grouped = q.shape[1] != k.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: tuple[int, int]) -> torch.Tensor:
        q, k, v = (x.unflatten(0, run).transpose(1, 2) for x in (q, k, v))  # (n, heads, L, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)

    rows = [count * length for count, length in segments.runs]
    parts = zip(q.split(rows), k.split(rows), v.split(rows), segments.runs, strict=True)
    return torch.cat([attend(*part) for part in parts])


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, scale: float):
    """The flash-attn package, where it is installed. Shapes as `stacked_sdpa`."""
    from flash_attn import flash_attn_varlen_func

    starts, longest = segments.cu_seqlens, segments.max_seqlen
    return flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=causal, softmax_scale=scale)


def by_operator(name: str) -> Callable:
    """Attention on one of the kernels of util/kernels, or on one that is chosen in each call. Shapes as `stacked_sdpa`,
    on a GPU in 16 bits."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, scale: float):
        starts, host_starts, longest = segments.cu_seqlens, segments.host_starts, segments.max_seqlen
        return packed_attention(q, k, v, starts, host_starts, longest, causal, scale, name)[0]

    return attend


BACKENDS: dict[str, Callable] = {"sdpa": stacked_sdpa, "flash_attn": flash_attn}
BACKENDS |= {name: by_operator(name) for name in (rule.AUTO, *rule.WORDS)}


def register(backend: str) -> str:
    """Make a backend known to transformers' attention modules and return the name to put into their configs.

    For packed training only. A function of this kind knows no padding mask: generate under sdpa.
    """
    attend = BACKENDS[backend]

    def packed_attention(module, query, key, value, attention_mask, scaling, segments, **unused):
        # transformers' shapes: (1, heads, T, D) in, (1, T, heads, D) out
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        out = attend(q, k, v, segments, causal=module.is_causal, scale=scaling)
        return out.unsqueeze(0), None

    if backend == "sdpa":
        # It looks at every length. Compiled, it would be compiled anew for each list of lengths, without end.
        packed_attention = torch.compiler.disable(packed_attention)
    name = NAME + backend
    AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


def check_backend(backend: str) -> None:
    """Raise UserError with the remedy where a chosen backend is not installed."""
    if backend not in ("sdpa", rule.AUTO):
        rule.check(backend)
