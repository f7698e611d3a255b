"""AdamW over exact fp32 weights: which one, parameter groups, learning-rate schedule, clipping."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from util import small_adamw
from util.adapters import new_tokens
from util.command_line import UserError
from util.config import Config
from util.mixed_adamw import MixedAdamW, parameters_of
from util.tensors import PARTS, part_of, run_parameters


def build_optimizer(model: nn.Module, config: Config, micro_batches: int = 1) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or one of its small twins. Raises UserError where that one cannot work.

    `micro_batches`: the most that a step has. The gradients of one alone may stay in bf16, as they are computed.
    """
    groups = parameter_groups(model, config)
    if micro_batches > 1:
        sum_gradients_in_fp32(model)
    if config.optimizer != "adamw":
        if next(model.parameters()).device.type == "cpu":
            raise UserError(f"--optimizer {config.optimizer} needs a GPU; use --optimizer adamw")
        return small_adamw.BUILD[config.optimizer](groups)
    trained = list(parameters_of(groups))
    if trained and all(parameter.dtype == torch.bfloat16 for parameter in trained):
        return MixedAdamW(groups, updated_together(model), betas=(0.9, 0.999))
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """A group for each trained part, its norms and biases apart without decay."""
    rates = {
        "vision": config.vision_learning_rate,
        "merger": config.merger_learning_rate,
        "language_model": config.learning_rate,
    }
    parameters = run_parameters(model)
    groups = []
    for part in PARTS:
        trained = {name: p for name, p in parameters.items() if p.requires_grad and part_of(name) == part}
        rate = config.learning_rate if rates[part] is None else rates[part]
        for decays in (True, False):
            chosen = [p for name, p in trained.items() if is_decayed(name, p) == decays]
            if chosen:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "weight_decay": decay, "peak": rate, "lr": rate})
    # a stage of a pipeline may have nothing that is trained
    return groups or [{"params": [], "weight_decay": 0.0, "peak": config.learning_rate, "lr": config.learning_rate}]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Norms and biases, which have one dimension, are not; nor are the rows of new tokens beside adapters, where one of
    a token that seldom occurs would fade."""
    return parameter.ndim >= 2 and not new_tokens.is_row(name)


def updated_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """What is trained, layer by layer, then the rest: layers are alike, so one compiled update serves them all."""
    together: dict[str, list[nn.Parameter]] = {}
    for name, parameter in run_parameters(model).items():
        if parameter.requires_grad:
            layer = re.search(r"\.(blocks|layers)\.\d+\.", name)
            together.setdefault(layer[0] if layer else "", []).append(parameter)
    return list(together.values())


def sum_gradients_in_fp32(model: nn.Module) -> None:
    """Let the gradients of several passes be added up in fp32: a sum in bf16 would lose what small ones add to it.

    The first pass's gradient is widened, and each one after it added as it is, in bf16, to the sum in fp32: in one
    kernel, where torch's own `grad_dtype = torch.float32` widens every one of them and then adds.
    """
    for parameter in run_parameters(model).values():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16 and parameter.grad_dtype is not None:
            parameter.grad_dtype = None  # a gradient need not have the precision of its weight
            parameter.register_post_accumulate_grad_hook(widen_gradient)


def widen_gradient(parameter: torch.Tensor) -> None:
    if parameter.grad is not None and parameter.grad.dtype == torch.bfloat16:
        parameter.grad = parameter.grad.float()


def learning_rate_factor(step: int, total: int, config: Config) -> float:
    """The share of the peak learning rate in a step (counted from 0) of `total`; never 0, not even in the first.

    After the warm-up it falls from 1 towards `config.min_learning_rate_ratio`, which it would reach one step after the
    last; `constant` does not fall.
    """
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    least = config.min_learning_rate_ratio
    return least + (1 - least) * share_left(step, warmup, total, config)


def share_left(step: int, warmup: int, total: int, config: Config) -> float:
    """How much of its way down the learning rate still has before it in a step after the warm-up: from 1 towards 0."""
    begin = warmup
    if config.schedule == "wsd":
        # Warm-up, stable, decay (arXiv 2404.06395), with the linear decay of arXiv 2405.18392. What is rounded up must
        # not reach into the warm-up.
        begin = max(warmup, total - math.ceil(config.decay_ratio * total))
    progress = max(0, step - begin) / max(1, total - begin)  # [0, 1)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, total: int, config: Config) -> float:
    """Set the learning rate of every group for a step; return that of the language model."""
    factor = learning_rate_factor(step, total, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return config.learning_rate * factor


def clip_gradient(model: nn.Module, optimizer: Any, max_norm: float) -> torch.Tensor:
    """Have all gradients scaled so that their norm is at most `max_norm` (0: leave them); return the norm before.

    The gradients of bf16 weights are not scaled here, where they would be rounded once more: the optimizer does so as
    it reads them. Their norm is added up in fp32.
    """
    named = {name: p for name, p in run_parameters(model).items() if p.grad is not None}
    trained: list[Any] = list(named.values())
    over_stages = getattr(model, "norm_over_stages", None)  # of a pipeline, other ranks have other layers
    if over_stages or not trained or trained[0].dtype != torch.bfloat16:
        norm = over_stages(named) if over_stages else total_norm(trained)
        meshes = by_mesh(trained)
        if over_stages or len(meshes) > 1:
            # Groups of ranks have added up in orders of their own. Copies of a weight are scaled by the same bits.
            torch.distributed.all_reduce(norm, torch.distributed.ReduceOp.MAX)
        for parameters in meshes:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
        return norm
    norms = torch._foreach_norm([p.grad for p in trained], 2, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    optimizer.gradient_factor = None
    if max_norm:  # as torch.nn.utils.clip_grad_norm_ has it
        optimizer.gradient_factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm


def total_norm(trained: Sequence[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients, also of those on several meshes, which torch's own refuses (pytorch#180346).

    Each mesh's norm is that of all its ranks, in which an element that several of them have counts once.
    """
    norms = []
    for parameters in by_mesh(trained):
        gradients: Any = [parameter.grad for parameter in parameters]
        norms.append(whole_norm(torch.nn.utils.get_total_norm(gradients)))
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))


def by_mesh(trained: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters whose gradients lie on the same mesh, together."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in trained:
        found.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    return list(found.values())


def whole_norm(norm: Any) -> torch.Tensor:
    """The norm over all ranks, of gradients of which each has a part."""
    if not hasattr(norm, "full_tensor"):
        return norm
    partial = [axis for axis, placement in enumerate(norm.placements) if placement.is_partial()]
    if len(partial) == 1:
        return norm.full_tensor()
    square = norm.to_local().square()  # torch would warn that it adds up along one axis after the other
    for axis in partial:
        torch.distributed.all_reduce(square, group=norm.device_mesh.get_group(axis))
    return square.sqrt()
