"""AdamW over fp32 weights: parameter groups, learning-rate schedule, clipping."""

import math
from itertools import chain

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from util.adapters import new_tokens
from util.command_line import UserError
from util.config import Config
from util.tensors import PARTS, part_of, run_parameters

SOURCE = "source"  # the attribute of a stand-in that names the parameter it stands for


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or its twin with moments of 8 bits. Raises UserError where that one cannot work."""
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw_8bit":
        if next(model.parameters()).device.type == "cpu":
            raise UserError("--optimizer adamw_8bit needs a GPU; use --optimizer adamw")
        return eight_bit_adamw(groups)
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
    return groups


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Norms and biases, which have one dimension, are not; nor are the rows of new tokens beside adapters, where one of
    a token that seldom occurs would fade."""
    return parameter.ndim >= 2 and not new_tokens.is_row(name)


def eight_bit_adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose two moments take 2 bytes per parameter instead of 8.

    Its kernels work on plain memory and refuse fully_shard's parameters. So it trains stand-ins, which share the memory
    of the model's parameters; their gradients are handed over for the step alone, and clearing them clears the model's.
    """
    try:
        from bitsandbytes import optim
    except ImportError:
        raise UserError("--optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes") from None

    class StandInAdamW(optim.AdamW8bit):
        def zero_grad(self, set_to_none: bool = True) -> None:
            for parameter in own_parameters(self):
                source_of(parameter).grad = None

    for group in groups:
        group["params"] = [stand_in(parameter) for parameter in group["params"]]
    optimizer = StandInAdamW(groups, betas=(0.9, 0.999))
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: hand_over_gradients(optimizer))
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: take_back_gradients(optimizer))
    return optimizer


def stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """The tensor inside a parameter of fully_shard, as a parameter that knows whose memory it shares; a plain parameter
    stands for itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    plain = nn.Parameter(parameter.to_local().detach())
    setattr(plain, SOURCE, parameter)
    return plain


def source_of(parameter: nn.Parameter) -> nn.Parameter:
    """The model's parameter that an optimizer's parameter stands for: itself, except for stand-ins."""
    return getattr(parameter, SOURCE, parameter)


def own_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What an optimizer trains, by its own count: of stand-ins these, not the model's parameters."""
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def hand_over_gradients(optimizer: torch.optim.Optimizer) -> None:
    for parameter in own_parameters(optimizer):
        source = source_of(parameter)
        if isinstance(source, DTensor) and source is not parameter:
            # where either was given other memory, the model would no longer be what is trained
            assert parameter.data_ptr() == source.to_local().data_ptr()
            gradient = source.grad
            parameter.grad = gradient.to_local() if isinstance(gradient, DTensor) else None


def take_back_gradients(optimizer: torch.optim.Optimizer) -> None:
    """The stand-ins' hold on the gradients would keep that memory through the next forward pass."""
    for parameter in own_parameters(optimizer):
        if source_of(parameter) is not parameter:
            parameter.grad = None


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


def clip_gradient(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their common norm is at most `max_norm` (0: leave them); return the norm before."""
    trained = [p for p in run_parameters(model).values() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
