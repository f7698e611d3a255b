"""Faults to put back into the program, one at a time, to see that the matrix finds them: those that a green suite once
let through, by the numbers they had in the report of them, and three that a bound on rounding must tell from rounding.

Each is a context in which the program has the fault, made from outside, so that it fits however the program is mended.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from util import checkpoint, collator, small_adamw
from util.attention import Segments
from util.data.bad_samples import Lenient
from util.data.loader import Loader
from util.dataset import Examples
from util.loss import PackedLoss
from util.mixed_adamw import REMAINDER
from util.parallel import distributed

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def working_copies() -> Iterator[None]:
    """1: who saves, exports or clips takes the tensors as the last forward pass left them."""

    def as_they_are(model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("util.") and hasattr(module, "run_parameters"):
                stack.enter_context(patch.object(module, "run_parameters", as_they_are))
        yield


@contextmanager
def narrow_rotation() -> Iterator[None]:
    """2: on several ranks the rotary frequencies are in bf16."""
    build = distributed.build_model

    def build_narrow(*arguments) -> PackedLoss:
        packed = build(*arguments)
        for name, buffer in packed.named_buffers():
            if name.endswith("inv_freq"):
                buffer.data = buffer.data.to(torch.bfloat16)
        return packed

    with patch.object(distributed, "build_model", build_narrow):
        yield


@contextmanager
def workers_that_signals_kill() -> Iterator[None]:
    """3: a signal does to data workers what it does to any process, and torch ends the run over it."""
    load = Lenient.__getitem__

    def load_unprotected(self: Lenient, index: int):
        if get_worker_info():
            for number in NUMBERS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
        return load(self, index)

    with (
        patch.object(Lenient, "__getitem__", load_unprotected),
        patch.object(Loader, "__iter__", DataLoader.__iter__),
        patch.object(signal_handling, "_SIGCHLD_handler_set", False),  # torch sets it once; Loader took it back
    ):
        before = signal.getsignal(signal.SIGCHLD)
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, before)


class ClaimsGradient(torch.Tensor):
    """A tensor that says of itself that it has a gradient."""

    requires_grad = property(lambda self: True)


@contextmanager
def backward_without_gradient() -> Iterator[None]:
    """5: the backward pass is made whether the loss has a gradient or not."""
    with changed_loss(lambda loss: loss.as_subclass(ClaimsGradient)):
        yield


@contextmanager
def gradients_that_stay() -> Iterator[None]:
    """6: after an update that is left out, the gradients are added to those of the next step."""
    build = small_adamw.eight_bit_adamw

    def build_forgetful(groups: list[dict]) -> torch.optim.Optimizer:
        made = build(groups)
        clear, steps = made.zero_grad, []
        made.register_step_post_hook(lambda *unused: steps.append(True))
        made.zero_grad = lambda: clear() if steps and steps.pop() else None
        return made

    with (
        patch.object(small_adamw, "eight_bit_adamw", build_forgetful),
        patch.dict(small_adamw.BUILD, adamw_8bit=build_forgetful),
    ):
        yield


@contextmanager
def bits_that_are_lost() -> Iterator[None]:
    """A resumed bf16 run goes on from rounded weights."""
    load = checkpoint.load_checkpoint

    def load_rounded(path, model: nn.Module, made: torch.optim.Optimizer) -> dict:
        state = load(path, model, made)
        for parameter in model.parameters():
            if getattr(parameter, REMAINDER, None) is not None:
                getattr(parameter, REMAINDER).zero_()
        return state

    with patch.object(checkpoint, "load_checkpoint", load_rounded):
        yield


@contextmanager
def order_that_moves() -> Iterator[None]:
    """7: a sample that is left out moves every later one, and a resumed run does not say so."""
    order = Examples.order

    def without_places(self: Examples, seed: int, epoch: int):
        whole = order(self, seed, epoch)
        there = [index for index in whole if index not in self.left_out]
        gone = [index for index in whole if index in self.left_out]
        return np.array(there + gone) if isinstance(whole, np.ndarray) else there

    with ExitStack() as stack:
        stack.enter_context(patch.object(Examples, "order", without_places))
        if hasattr(checkpoint, "compare_plan"):
            stack.enter_context(patch.object(checkpoint, "compare_plan", lambda *arguments: None))
        yield


@contextmanager
def wrong_rotation() -> Iterator[None]:
    """Height and width change places in the positions."""
    positions = collator.mrope_positions
    with patch.object(collator, "mrope_positions", lambda *arguments: positions(*arguments)[[0, 2, 1]]):
        yield


@contextmanager
def wrong_mask() -> Iterator[None]:
    """Samples that share a row see each other."""
    of = Segments.of
    with patch.object(Segments, "of", lambda lengths: of([sum(lengths)])):
        yield


@contextmanager
def wrong_scale() -> Iterator[None]:
    """The gradient is a quarter too large, the loss is right."""
    with changed_loss(lambda loss: 1.25 * loss - 0.25 * loss.detach()):
        yield


@contextmanager
def changed_loss(change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Of the passes of training."""
    forward = PackedLoss.forward

    def changed(self: PackedLoss, *arguments, **others) -> torch.Tensor:
        loss = forward(self, *arguments, **others)
        return change(loss) if torch.is_grad_enabled() else loss

    with patch.object(PackedLoss, "forward", changed):
        yield


FAULTS = {
    fault.__name__: fault
    for fault in (working_copies, narrow_rotation, workers_that_signals_kill, backward_without_gradient,
                  gradients_that_stay, bits_that_are_lost, order_that_moves, wrong_rotation, wrong_mask, wrong_scale)
}  # fmt: skip
