"""AdamW of others with smaller states, each an optional package for GPUs: `--optimizer adamw_8bit|adamw_flash`.

bytes per parameter      weight   missing bits   moments   gradient (one pass, several)
adamw (mixed_adamw.py)        2              2         8   2, 4
adamw_8bit                    2              2         2   2, 4
adamw_flash                   2              1         2   2, 4
"""

from typing import Any

import torch
from torch import nn

from util.command_line import UserError
from util.mixed_adamw import REMAINDER, exact_value, parameters_of, set_exact_value


def eight_bit_adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose two moments take 2 bytes per parameter instead of 8.

    Over bf16 its own update would round away what a small learning rate adds. So one weight at a time is put together
    in fp32, updated, and cut in two again.
    """
    try:
        from bitsandbytes import optim
    except ImportError:
        raise UserError("--optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes") from None

    class ExactAdamW8bit(optim.AdamW8bit):
        gradient_factor: torch.Tensor | None = None  # see `clip_gradient` in util/optimizer.py

        @torch.no_grad()
        def update_step(self, group: dict, parameter: nn.Parameter, *numbers) -> None:
            if parameter.dtype != torch.bfloat16:
                super().update_step(group, parameter, *numbers)
                return
            exact = nn.Parameter(exact_value(parameter))
            exact.grad = in_fp32(parameter.grad, self.gradient_factor)
            self.state[exact] = self.state[parameter]
            super().update_step(group, exact, *numbers)
            del self.state[exact]
            set_exact_value(parameter, exact)

    return ExactAdamW8bit(groups, betas=(0.9, 0.999))


def flash_adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """flashoptim's AdamW: bf16 weights with 8 more bits, and two moments of 8 bits."""
    try:
        from flashoptim import FlashAdamW
    except ImportError:
        raise UserError("--optimizer adamw_flash needs flashoptim: pip install flashoptim") from None

    class ClippedFlashAdamW(ClippedAndKept, FlashAdamW):
        pass

    parameters = parameters_of(groups)
    is_narrow = parameters[0].dtype == torch.bfloat16
    made = ClippedFlashAdamW(groups, betas=(0.9, 0.999), master_weight_bits=24 if is_narrow else None)
    for parameter in parameters:
        set_bits_of_flash(made, parameter)
    return made


class ClippedAndKept:
    """What flashoptim's optimizers lack: clipping without a second rounding, and a state of plain tensors."""

    gradient_factor: torch.Tensor | None = None  # see `clip_gradient` in util/optimizer.py
    state: Any  # of the optimizer that this is mixed into, as are the methods that are called here

    @torch.no_grad()
    def step_param(self, p: nn.Parameter, group: dict | None = None) -> None:
        base: Any = super()
        if p.grad is None or p.dtype != torch.bfloat16:
            base.step_param(p, group)
            return
        dtype = p.grad_dtype
        gradient = in_fp32(p.grad, self.gradient_factor)
        p.grad = None  # of another dtype than the next
        p.grad_dtype = torch.float32
        p.grad = gradient
        base.step_param(p, group)
        p.grad = None  # there is one in fp32 at a time
        p.grad_dtype = dtype

    def kept_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Its state as tensors, for a checkpoint."""
        kept: dict[str, Any] = {}
        for name, value in self.state[parameter].items():
            is_tensor = isinstance(value, torch.Tensor)
            kept |= {name: value} if is_tensor else value.state_dict(name, allow_quantized=True)
        return kept

    def take_state(self: Any, parameter: nn.Parameter, kept: dict[str, Any]) -> None:
        """A state as `kept_state` gives it. The weight's other bits are part of it, and not beside the weight."""
        setattr(parameter, REMAINDER, None)
        if not kept:
            return
        self._ensure_state_initialized(parameter, self._find_group(parameter))
        for name, value in self.state[parameter].items():
            if isinstance(value, torch.Tensor):
                self.state[parameter][name] = kept[name]
            else:
                value.load_state_dict(kept, name)


def set_bits_of_flash(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Hand what is known of a weight beyond its bf16 over to flashoptim, which keeps 8 bits of it."""
    from flashoptim import compute_ecc_bits

    remainder = getattr(parameter, REMAINDER, None)
    if remainder is not None and remainder.any():
        bits = compute_ecc_bits(exact_value(parameter), parameter.detach(), master_bytewidth=3)
        optimizer.state[parameter]["error_bits"] = bits
    setattr(parameter, REMAINDER, None)


def in_fp32(gradient: Any, factor: torch.Tensor | None) -> torch.Tensor:
    """A gradient for its update: times the factor by which all are clipped. One in fp32 is scaled in place."""
    wide = gradient.float()
    return wide if factor is None else wide.mul_(factor)


BUILD = {"adamw_8bit": eight_bit_adamw, "adamw_flash": flash_adamw}
