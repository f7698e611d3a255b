"""`--compile`: few graphs for rows of every length, what they cost to make, and what happens where none can be made.

A graph is compiled of what stands before attention in a layer, of what stands after it, and of the loss: five for a
model, in training and evaluation, however many layers it has and whatever lengths its rows have. Dynamo compiles anew
where anything that it looked at has changed, and gives up after 8 graphs of a function, so nothing may change:

- the number of rows is marked as dynamic; a single row, which dynamo would take for a special case, runs as it is;
- evaluation runs training's graphs and drops what they kept, since the mode of gradients is something dynamo looks at;
- an input that needs no gradient (the first layer's, under adapters) is given one, for a thousandth more work;
- attention, whose kernels depend on the lengths of samples, is no part of a graph.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from tqdm import tqdm

from util.packed_layers import Kind

BACKEND = "inductor"
FEWEST_ROWS = 2  # dynamo makes a graph of its own for 1


def is_on(choice: str, device: torch.device) -> bool:
    """Whether `--compile` compiles: `auto` does on an NVIDIA GPU.

    Not on a CPU, where compiling takes longer than the demonstration trains, nor on AMD's, where it was never tried.
    """
    if choice == "auto":
        return device.type == "cuda" and not torch.version.hip
    return choice == "on"


def compiled_kind(kind: Kind) -> Kind:
    """A kind of layer whose parts around attention are compiled when they are first called."""
    return replace(kind, before=Compiled(kind.before, inputs=1), after=Compiled(kind.after, inputs=2))


def compile_loss(packed: Any) -> None:
    """Compile `token_losses` of a PackedLoss, so that logits, as wide as the vocabulary, are read and written less."""
    packed.token_losses = partial(Compiled(type(packed).token_losses, inputs=1), packed)


class Compiled:
    """A function (module, tensors of T rows ...) -> tensors, compiled at its first call.

    The first `inputs` of the tensors are those that gradients flow to.
    """

    cannot: str = ""  # why nothing can be compiled in this process, once that was found

    def __init__(self, function: Callable, inputs: int) -> None:
        self.function = function
        self.inputs = inputs
        self.compiled = torch.compile(function, backend=BACKEND)
        listen()

    def __call__(self, module: nn.Module, *tensors: torch.Tensor) -> Any:
        if Compiled.cannot or len(tensors[0]) < FEWEST_ROWS:
            return self.function(module, *tensors)
        learns = any(parameter.requires_grad for parameter in module.parameters())
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                return without_gradient(self.run(module, self.as_inputs(tensors, learns)))
        if learns:
            tensors = self.as_inputs(tensors, learns)
        return self.run(module, tensors)

    def as_inputs(self, tensors: tuple[torch.Tensor, ...], learns: bool) -> tuple[torch.Tensor, ...]:
        """The tensors, those that have no gradient now as they are in training: with one where the module learns."""
        rows = [rows if rows.requires_grad else rows.detach().requires_grad_(learns) for rows in tensors[: self.inputs]]
        return *rows, *tensors[self.inputs :]

    def run(self, module: nn.Module, tensors: tuple[torch.Tensor, ...]) -> Any:
        for rows in tensors:
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        try:
            return self.compiled(module, *tensors)
        except TorchDynamoException as error:  # no compiler, no Triton, a fault of torch's: nothing was computed yet
            Compiled.cannot = reason_of(error)
            tqdm.write(
                f"--compile: not possible here, so this run trains without it, more slowly ({Compiled.cannot}). "
                "--compile off says nothing of it"
            )
            return self.function(module, *tensors)


def without_gradient(found: Any) -> Any:
    """A tensor, or a tuple of tensors, cut from its graph, which frees what the graph kept."""
    return tuple(rows.detach() for rows in found) if isinstance(found, tuple) else found.detach()


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


# ---- what compiling costs -------------------------------------------------------------------------------------------


class Clock:
    """How long this process compiled, and what came of it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.taken = 0.0  # of these, what `take` has given out
        self.told = 0.0  # of these, what `news` has told of
        self.began = 0.0

    def start(self, *unused: Any) -> None:
        self.began = time.perf_counter()

    def stop(self, *unused: Any) -> None:
        self.seconds += time.perf_counter() - self.began

    def take(self) -> float:
        """The seconds since it was last asked: no part of a step's speed."""
        seconds = self.seconds - self.taken
        self.taken = self.seconds
        return seconds

    def news(self) -> str:
        """A line on what was compiled since it was last asked; "" if nothing was."""
        seconds = self.seconds - self.told
        self.told = self.seconds
        if not seconds or Compiled.cannot:
            return ""
        graphs, kept = graphs_made(), graphs_found()
        text = f"compiling: {seconds:.0f} s, {graphs} graphs so far"
        if kept:
            text += f", {kept} of them from the cache of an earlier run"
        return f"{text}; not counted in tokens per second"


CLOCK = Clock()


def graphs_made() -> int:
    """How many graphs this process has, forward and backward pass together as one."""
    return counters["stats"]["unique_graphs"]


def graphs_found() -> int:
    """How many of them were compiled in an earlier run and lay in the cache (TORCHINDUCTOR_CACHE_DIR)."""
    return counters["aot_autograd"]["autograd_cache_hit"]


def listen() -> None:
    """Let CLOCK run while dynamo compiles, and the limit of graphs be told in one line. Once in a process."""
    handler = torch._dynamo.callback.callback_handler
    if CLOCK.start not in handler.start_callbacks:
        handler.register_start_callback(CLOCK.start)
        handler.register_end_callback(CLOCK.stop)
        # Else a backward pass that cannot be compiled fails when it runs, where nothing can be done without it.
        torch._functorch.config.force_non_lazy_backward_lowering = True
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(known, LimitReached) for known in logger.filters):
        logger.addFilter(LimitReached())


class LimitReached(logging.Filter):
    """Says in one line above the progress bar, once for each function, what dynamo logs at length."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("torch._dynamo hit config."):
            return True
        assert isinstance(record.args, tuple)
        name, limit, function, reason = map(str, record.args[:4])
        if function not in self.told:
            self.told.add(function)
            tqdm.write(
                f"--compile: {limit} graphs of {function} were made, dynamo's {name}. Batches that none of them fits "
                f"now run without compilation (the last reason: {str(reason).strip()})"
            )
        return False
