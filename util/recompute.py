"""`--activation_checkpointing`: what a layer keeps of its forward pass, and what its backward pass makes anew."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from util.packed_layers import Kind, run_packed

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default}
functional = torch.ops._c10d_functional
SUMS = {functional.all_reduce.default, functional.reduce_scatter_tensor.default}  # over the ranks of a tensor group


def running(how: str, is_compiled: bool) -> Callable[..., torch.Tensor]:
    """The function that runs a layer on a packed row, for a value of `--activation_checkpointing`.

    Torch's selective contexts look at one operation after the other, which a compiled graph does not show. There
    `selective` is a word to whoever divides the graph into its passes: compilation.keep_less.
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
    policy = partial(keep_products, unread_widths(layer, kind))
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(run_packed, layer, kind, *inputs, use_reentrant=False, context_fn=contexts)


def has_backward(layer: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether there is anything to keep: not in evaluation, and not in a frozen tower."""
    if not torch.is_grad_enabled():
        return False
    return hidden.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def unread_widths(layer: nn.Module, kind: Kind) -> set[int]:
    """The widths that only products read whose own output no backward pass needs.

    One is the layer's last product. Under an adapter, or in 4 bits, other operations follow it, so that it would be
    made anew. The other, where ranks have parts of the layer's matrices, is the product after attention: its output is
    a part of a sum, and that sum is kept.
    """
    last: Any = layer.get_submodule(kind.last_product)
    if type(last) is nn.Linear:
        return {last.in_features}
    if not isinstance(last.weight, DTensor):
        return set()
    mixing: Any = layer.get_submodule(kind.after_attention)
    return {last.in_features, mixing.in_features} - {last.out_features}  # which others may read, too


def keep_products(
    unread: Collection[int], context: Any, operation: Any, *arguments: Any, **named: Any
) -> CheckpointPolicy:
    """The policy of torch's selective checkpoint contexts.

    The layer's last product is not kept. Nor is it made anew: recomputing ends when all that is needed is there, and
    its own input is the last of that. Sums over ranks are kept, so that none is made twice; rows that were gathered
    from ranks are not, as they are large.
    """
    if operation in PRODUCTS:
        is_unread = arguments[-2].shape[-1] in unread  # mm(rows, weight), addmm(bias, rows, weight)
        return CheckpointPolicy.PREFER_RECOMPUTE if is_unread else CheckpointPolicy.MUST_SAVE
    # torch's attentions (scaled_dot_product, flash, efficient, cudnn), torch_attn's, those of the flash-attn packages
    if "attention" in str(operation) or "attn" in str(operation) or operation in SUMS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
