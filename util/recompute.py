"""`--activation_checkpointing`: what a layer keeps of its forward pass, and what its backward pass makes anew."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from util.packed_layers import Kind, run_packed

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default}


def running(how: str, is_compiled: bool) -> Callable[..., torch.Tensor]:
    """The function that runs a layer on a packed row, for a value of `--activation_checkpointing`.

    A compiled layer keeps no more than `selective` as it is: what is cheap to make anew is made anew inside of its
    graphs. Torch's selective contexts look at one operation after the other, which a compiled graph does not show.
    """
    if how == "full":
        return recomputed
    if how == "selective" and not is_compiled:
        return products_kept
    return run_packed


def recomputed(layer: Any, kind: Kind, *inputs: Any) -> torch.Tensor:
    """Keeps the layer's input alone."""
    if not has_backward(layer, inputs[0]):
        return run_packed(layer, kind, *inputs)
    return checkpoint(run_packed, layer, kind, *inputs, use_reentrant=False)


def products_kept(layer: Any, kind: Kind, *inputs: Any) -> torch.Tensor:
    """Keeps the layer's input and the outputs of matrix products and attention, which cost the most to make anew.

    Norms, rotations and activations are made anew: they read and write memory, and multiply no matrices.
    """
    if not has_backward(layer, inputs[0]):
        return run_packed(layer, kind, *inputs)
    policy = partial(keep_products, unread_width(layer, kind))
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(run_packed, layer, kind, *inputs, use_reentrant=False, context_fn=contexts)


def has_backward(layer: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether there is anything to keep: not in evaluation, and not in a frozen tower."""
    if not torch.is_grad_enabled():
        return False
    return hidden.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def unread_width(layer: nn.Module, kind: Kind) -> int | None:
    """The width that only the layer's last product reads, whose output no backward pass needs; None: there is no such.

    Under an adapter, or in 4 bits, other operations follow that product, so that it would be made anew.
    """
    last = layer.get_submodule(kind.last_product)
    return last.in_features if type(last) is nn.Linear else None


def keep_products(unread: int | None, context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """The policy of torch's selective checkpoint contexts.

    The layer's last product is not kept. Nor is it made anew: recomputing ends when all that is needed is there, and
    its own input is the last of that.
    """
    if operation in PRODUCTS:
        is_last = arguments[-2].shape[-1] == unread  # mm(rows, weight), addmm(bias, rows, weight)
        return CheckpointPolicy.PREFER_RECOMPUTE if is_last else CheckpointPolicy.MUST_SAVE
    # torch's attentions (scaled_dot_product, flash, efficient, cudnn), torch_attn's, those of the flash-attn packages
    if "attention" in str(operation) or "attn" in str(operation):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
