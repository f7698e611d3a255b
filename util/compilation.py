"""`--compile`: few graphs for rows of every length, what they cost to make, and what happens where none can be made.

A graph is compiled of what stands before attention in a layer, of what stands after it, and of the loss: five for a
model (six where ranks share a row), in training and evaluation, however many layers it has and whatever lengths its
rows have. Dynamo compiles anew where anything that it looked at has changed, and gives up after 8 graphs of a function,
so nothing may change:

- the number of rows is marked as dynamic; a single row, which dynamo would take for a special case, runs as it is;
- evaluation runs training's graphs and drops what they kept, since the mode of gradients is something dynamo looks at;
- an input that needs no gradient (the first layer's, under adapters) is given one, for a thousandth more work;
- attention, whose kernels depend on the lengths of samples, is no part of a graph.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
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


def in_words(choice: str, device: torch.device) -> str:
    """What `--compile` came to, for the plan."""
    if not is_on(choice, device):
        return "off (no NVIDIA GPU)" if choice == "auto" else "off"
    return f"the layers and the loss, during the first step; later runs find them in {cache_folder()}"


def cache_folder() -> str:
    """Where torch keeps compiled graphs for later runs."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        try:
            return default_cache_dir()
        except (KeyError, OSError):  # torch 2.11, in a container whose user has no name
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    return os.environ["TORCHINDUCTOR_CACHE_DIR"]


def compiled_kind(kind: Kind, is_recomputed: bool) -> Kind:
    """A kind of layer whose parts around attention are compiled when they are first called.

    `is_recomputed`: the layer's last matrix product then stands outside of the graphs. The backward pass does not need
    its output, and recomputing ends before it, but a graph runs to its end: a quarter of the layer's work for nothing.
    """
    kind = replace(kind, before=Compiled(kind.before, inputs=1))
    if kind.queries and kind.keys_and_values:
        kind = replace(
            kind,
            queries=Compiled(kind.queries, inputs=1),
            keys_and_values=Compiled(kind.keys_and_values, inputs=1),
        )
    if not is_recomputed:
        return replace(kind, after=Compiled(kind.after, inputs=2))
    until_last = Compiled(kind.until_last, inputs=2)
    return replace(kind, after=partial(after_in_two, until_last, kind.last_product))


def after_in_two(until_last: Callable, last_product: str, layer: nn.Module, hidden: torch.Tensor, mixed: torch.Tensor):
    hidden, inner = until_last(layer, hidden, mixed)
    return hidden + layer.get_submodule(last_product)(inner)


def compile_loss(packed: Any) -> None:
    """Compile `token_losses` of a PackedLoss, so that logits, as wide as the vocabulary, are read and written less."""
    packed.token_losses = partial(Compiled(type(packed).token_losses, inputs=1), packed)


def keep_less(less: bool) -> None:
    """Whether graphs that are made from now on keep matrix products' outputs alone, and no activation of them.

    Torch decides what a graph keeps for its backward pass, and makes anew what costs nothing there. By default that
    leaves out what a matrix product of the backward pass reads (the MLP's activation, the output of a norm), since it
    must then be written once more.
    """
    torch._functorch.config.ban_recompute_materialized_backward = not less


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


def graphs_made() -> int:
    """How many graphs this process has, forward and backward pass together as one."""
    return counters["stats"]["unique_graphs"]


def graphs_found() -> int:
    """How many of them were compiled in an earlier run and lay in the cache (TORCHINDUCTOR_CACHE_DIR)."""
    return counters["aot_autograd"]["autograd_cache_hit"]


class Clock:
    """How long this process compiled, and what came of it, since a run was opened."""

    def __init__(self) -> None:
        self.began = 0.0
        self.restart()

    def restart(self) -> None:
        """A run begins: what another one in this process compiled is not its own."""
        self.seconds = 0.0
        self.taken = 0.0  # of these, what `take` has given out
        self.told = 0.0  # of these, what `news` has told of
        self.before = (graphs_made(), graphs_found())

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
        graphs = graphs_made() - self.before[0]
        kept = graphs_found() - self.before[1]
        text = f"compiling: {seconds:.0f} s, {graphs} graphs so far"
        if kept:
            text += f", {kept} of them from the cache of an earlier run"
        return f"{text}; not counted in tokens per second"


CLOCK = Clock()


def listen() -> None:
    """Let CLOCK run while dynamo compiles, and the limit of graphs be told in one line. Once in a process."""
    cache_folder()
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
