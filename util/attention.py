"""Attention over packed sequences: many samples in one row, each seeing only itself.

`Segments` says where each begins and ends. On a GPU that is `cu_seqlens` for a variable-length kernel; on a CPU
segments of the same length are stacked and go through torch's scaled_dot_product_attention together.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from util.config import UserError

# transformers hands the vision tower's whole row to an attention function in one call only where its name contains
# "flash"; under any other name it splits the row in a Python loop.
NAME = "packed_flash_"


@dataclass
class Segments:
    """The lengths of consecutive pieces of one row, made once per batch and used by every layer."""

    cu_seqlens: torch.Tensor  # (B + 1,) int32, where each piece begins; the last entry is the row's length
    max_seqlen: int
    stacks: list[torch.Tensor]  # for each distinct length L: the rows (n, L) int64 of the n pieces of that length

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        ends = torch.tensor([0, *lengths]).cumsum(0)
        begins = defaultdict(list)
        for begin, length in zip(ends.tolist(), lengths, strict=False):
            begins[length].append(begin)
        stacks = [torch.tensor(rows)[:, None] + torch.arange(length) for length, rows in sorted(begins.items())]
        return cls(ends.int(), max(lengths, default=0), stacks)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segments":
        return self._map("to", device, non_blocking=non_blocking)

    def pin_memory(self) -> "Segments":
        return self._map("pin_memory")

    def _map(self, method: str, *args, **kwargs) -> "Segments":
        stacks = [getattr(rows, method)(*args, **kwargs) for rows in self.stacks]
        return Segments(getattr(self.cu_seqlens, method)(*args, **kwargs), self.max_seqlen, stacks)


def stacked_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, scale: float):
    """Exact on any device and in any dtype. q (T, H, D), k and v (T, H_kv, D) -> (T, H, D)."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # (n, L, heads, D) each
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(
            1, 2
        )

    if len(segments.stacks) == 1:  # one length only: the row is the stack
        shape = segments.stacks[0].shape
        return attend(*(x.unflatten(0, shape) for x in (q, k, v))).flatten(0, 1)
    out = torch.empty_like(q)
    for rows in segments.stacks:
        flat = rows.flatten()
        stack = attend(*(x.index_select(0, flat).unflatten(0, rows.shape) for x in (q, k, v)))
        out = out.index_copy(0, flat, stack.flatten(0, 1).to(out.dtype))
    return out


def torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, scale: float):
    """torch's own variable-length FlashAttention (2.10 and newer), on a GPU in 16 bits. Shapes as `stacked_sdpa`."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    # torch 2.12 and newer ask before sharing key-value heads between query heads; 2.11 shares them unasked.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] and VARLEN_ASKS else {}
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
