"""The head and its cross-entropy in one, for a CPU: the logits are written once, and their gradient in their place.

Letters in shapes are those of collator.py; D is the hidden size, and C the size of the vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def takes(head: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether `cross_entropies` gives what this head and torch's cross-entropy give: the head is a plain matrix, on a
    CPU, in a precision in which a loss may be computed."""
    if type(head) is not nn.Linear or head.bias is not None or head._forward_hooks:
        return False  # such as an adapter around it, or the hook that rows of new tokens have
    is_exact = hidden.dtype in (torch.float32, torch.float64) and hidden.dtype == head.weight.dtype
    return is_exact and hidden.device.type == "cpu"


def cross_entropies(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """(S, D), (C, D), (S,) -> the cross-entropy of each token (S,).

    torch's own keeps a second tensor of the size of the logits for the backward pass, and makes two more there. On a
    CPU memory is what the head of a small model waits for, and fresh memory most of all.
    """
    losses: torch.Tensor = HeadLoss.apply(hidden, weight, target_ids)
    return losses


class HeadLoss(torch.autograd.Function):
    """With p the softmax of the logits z, the loss is -log p[target] and its gradient for z is p - 1 at the target."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        targets = target_ids[:, None]  # (S, 1), as all that follow but the first
        logits = hidden @ weight.T  # (S, C)
        of_targets = logits.gather(1, targets)
        largest = logits.amax(1, keepdim=True)
        probabilities = torch.softmax(logits, dim=1, out=logits)  # in their place, row by row
        # log(sum(exp(z))) is z - log p of any token. The target's p may round to 0; that of the likeliest cannot.
        log_sum = largest - probabilities.amax(1, keepdim=True).log()
        of_logits = probabilities.scatter_add_(1, targets, torch.full_like(of_targets, -1))
        ctx.save_for_backward(hidden, weight, of_logits)
        return (log_sum - of_targets)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden, weight, of_logits = ctx.saved_tensors
        scale = of_losses[:, None]  # of the small matrices: the large one is not written again
        of_hidden = (of_logits @ weight) * scale if ctx.needs_input_grad[0] else None
        of_weight = of_logits.T @ (hidden * scale) if ctx.needs_input_grad[1] else None
        return of_hidden, of_weight, None
