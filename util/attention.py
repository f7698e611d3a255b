"""Attention over packed sequences: many samples in one row, each seeing only itself.

`Segments` says where each begins and ends. On a GPU that is `cu_seqlens` for a variable-length kernel; on a CPU
neighbouring segments of the same length are stacked and go through torch's scaled_dot_product_attention together.
"""

from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from util.command_line import UserError

# transformers hands the vision tower's whole row to an attention function in one call only where its name contains
# "flash"; under any other name it splits the row in a Python loop.
NAME = "packed_flash_"


@dataclass
class Segments:
    """The lengths of consecutive pieces of one row, made once per batch and used by every layer."""

    cu_seqlens: torch.Tensor  # (B + 1,) int32, where each piece begins; the last entry is the row's length
    max_seqlen: int
    runs: list[tuple[int, int]]  # (n, L): n neighbouring pieces of length L, in the order of the row

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        runs = [(len(list(pieces)), length) for length, pieces in groupby(lengths)]
        return cls(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0), runs)

    @property
    def lengths(self) -> list[int]:
        """The length of each piece, known without asking the device."""
        return [*chain.from_iterable([length] * count for count, length in self.runs)]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segments":
        return Segments(self.cu_seqlens.to(device, non_blocking=non_blocking), self.max_seqlen, self.runs)

    def pin_memory(self) -> "Segments":
        return Segments(self.cu_seqlens.pin_memory(), self.max_seqlen, self.runs)


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


def torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, scale: float):
    """torch's own variable-length FlashAttention (2.10 and newer), on a GPU in 16 bits. Shapes as `stacked_sdpa`."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    # torch 2.12 and newer ask before sharing key-value heads between query heads; 2.11 shares them unasked.
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and VARLEN_ASKS else {}
    starts, longest = segments.cu_seqlens, segments.max_seqlen
    return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=window, scale=scale, **grouped)


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, scale: float):
    """The flash-attn package, where it is installed. Shapes as `stacked_sdpa`."""
    from flash_attn import flash_attn_varlen_func

    starts, longest = segments.cu_seqlens, segments.max_seqlen
    return flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=causal, softmax_scale=scale)


VARLEN_ASKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
BACKENDS = {"sdpa": stacked_sdpa, "varlen": torch_varlen, "flash_attn": flash_attn}


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
    if backend == "flash_attn":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            raise UserError(
                "--attention flash_attn: the flash-attn package is not installed; "
                "`pip install flash-attn --no-build-isolation` (needs a compiler), or use --attention varlen"
            ) from None
    if backend == "varlen":
        try:
            import torch.nn.attention.varlen  # noqa: F401
        except ImportError:
            raise UserError(
                "--attention varlen needs torch 2.10 or newer; update torch or use --attention sdpa"
            ) from None
