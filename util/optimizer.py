"""AdamW over fp32 weights: parameter groups, learning-rate schedule, clipping."""

import math

import torch
from torch import nn

from util.config import Config, UserError
from util.tensors import PARTS, part_of, run_parameters


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) with a group for each trained part, its norms and biases apart without decay."""
    rates = {
        "vision": config.vision_learning_rate,
        "merger": config.merger_learning_rate,
        "language_model": config.learning_rate,
    }
    own, groups = run_parameters(model), []
    for part in PARTS:
        trained = [p for name, p in own.items() if p.requires_grad and part_of(name) == part]
        rate = config.learning_rate if rates[part] is None else rates[part]
        for decays in (True, False):
            parameters = [p for p in trained if (p.ndim >= 2) == decays]
            if parameters:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": parameters, "weight_decay": decay, "peak": rate, "lr": rate})
    if config.optimizer == "adamw_8bit":
        if next(model.parameters()).device.type == "cpu":
            raise UserError("--optimizer adamw_8bit needs a GPU; use --optimizer adamw")
        return eight_bit_adamw(groups)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def eight_bit_adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose two moments take 2 bytes per parameter instead of 8."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes") from None
    for group in groups:  # it works on plain memory: give it the tensors inside fully_shard's parameters
        group["params"] = [plain_parameter(parameter) for parameter in group["params"]]
    optimizer = AdamW8bit(groups, betas=(0.9, 0.999))
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: hand_over_gradients(optimizer))
    return optimizer


def plain_parameter(parameter: nn.Parameter) -> nn.Parameter:
    if not hasattr(parameter, "to_local"):
        return parameter
    plain = nn.Parameter(parameter.to_local().detach())  # shares its memory
    plain.source = parameter
    return plain


def hand_over_gradients(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, "source"):
                gradient = parameter.source.grad
                parameter.grad = None if gradient is None else gradient.to_local()
                parameter.source.grad = None


def learning_rate_factor(step: int, total: int, config: Config) -> float:
    """The share of the peak learning rate in a step (counted from 0) of `total`; never 0, not even in the first."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)  # [0, 1)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, total: int, config: Config) -> float:
    """Set the learning rate of every group for a step; return that of the language model."""
    factor = learning_rate_factor(step, total, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return config.learning_rate * factor


def clip_gradient(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their common norm is at most `max_norm` (0: leave them); return the norm before."""
    trained = [p for p in run_parameters(model).values() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
