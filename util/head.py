"""The head and its cross-entropy in one, for a CPU: the logits are written once, and their gradient in their place.

Letters in shapes are those of collator.py; D is the hidden size, and C the size of the vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

ROWS_AT_WORK = 8  # of logits that one pass takes after another: 8 x 151,936 in fp32 are 5 MB, which caches hold


def takes(head: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether `cross_entropies` gives what this head and torch's cross-entropy give: the head is a plain matrix, on a
    CPU, in a precision in which a loss may be computed."""
    is_plain = type(head) is nn.Linear and head.bias is None and not head._forward_hooks
    is_exact = hidden.dtype in (torch.float32, torch.float64) and hidden.dtype == head.weight.dtype
    return is_plain and is_exact and hidden.device.type == "cpu"


def cross_entropies(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """(S, D), (C, D), (S,) -> the cross-entropy of each token (S,).

    torch's own keeps a second tensor of the size of the logits for the backward pass, and makes two more there. On a
    CPU memory is what the head of a small model waits for, and fresh memory most of all.
    """
    losses: torch.Tensor = HeadLoss.apply(hidden, weight, target_ids)
    return losses


class HeadLoss(torch.autograd.Function):
    """With z the logits, m the largest and s the sum of exp(z - m): the loss is m + log s - z[target], and its gradient
    for z is (exp(z - m) - s at the target) / s. The division is left to the (S, D) matrices of the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.T  # (S, C)
        of_targets = logits.gather(1, target_ids[:, None])  # (S, 1)
        largest = torch.empty_like(of_targets)
        sums = torch.empty_like(of_targets)
        for rows, their_largest, their_sums in zip(
            logits.split(ROWS_AT_WORK), largest.split(ROWS_AT_WORK), sums.split(ROWS_AT_WORK), strict=True
        ):
            torch.amax(rows, dim=1, keepdim=True, out=their_largest)
            rows.sub_(their_largest).exp_()
            torch.sum(rows, dim=1, keepdim=True, out=their_sums)
        losses = largest + sums.log() - of_targets
        logits.scatter_add_(1, target_ids[:, None], -sums)  # the gradient now, times its row's sum
        ctx.save_for_backward(hidden, weight, logits, sums)
        return losses[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden, weight, of_logits, sums = ctx.saved_tensors
        scale = of_losses[:, None] / sums  # (S, 1)
        of_hidden = (of_logits @ weight) * scale if ctx.needs_input_grad[0] else None
        of_weight = of_logits.T @ (hidden * scale) if ctx.needs_input_grad[1] else None
        return of_hidden, of_weight, None
