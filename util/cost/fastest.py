"""Which attention kernel is the fastest on this very device, for the lengths of this very run: measured at its first
start, in seconds, and remembered.

Times are remembered and not choices: the next run may have the same lengths and other reasons. A kernel that builds a
plan for every new shape pays where shapes come back, and not where each batch has another one.
"""

import hashlib
import json
import math
import os
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path

import torch
from torch import Tensor

from util import collator, ranks
from util.config import Config
from util.cost import kept_sizes
from util.cost.shapes import head_width, shapes_of, whole_blocks
from util.cost.sizes import Sizes
from util.family import FAMILIES, Family
from util.kernels import packed, rule
from util.model import choose_attention
from util.steps import Steps

FOLDER = "attention"
SECONDS = 3.0  # that measuring may take, about; kinds of lengths that are left then go by the rule
FEWEST = 200  # micro-batches of a run for which measuring pays
LOOKED_AT = 256  # micro-batches whose lengths are looked at
REPEATS = 3

Times = dict[str, dict[str, list[float]]]  # kind of lengths -> kernel -> milliseconds of its first call, of a later one


@dataclass(frozen=True)
class Part:
    """The attention of some of the vision tower's blocks, or of the language model."""

    name: str
    layers: int
    heads: int
    shared: int  # key-value heads
    width: int
    causal: bool
    lengths: Callable[[Sizes, list[int]], tuple[int, ...]]  # of the pieces of a micro-batch's row

    def call(self, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> rule.Call:
        return rule.Call(
            packed.capability(device), dtype, self.heads, self.shared, self.width, self.causal, pieces=len(lengths),
            longest=max(lengths), tokens=sum(lengths), runs=len(packed.runs_of(starts_of(lengths))),
            shortest=min(lengths),
        )  # fmt: skip


@dataclass
class Kind:
    """Calls of one part whose lengths are alike."""

    part: Part
    call: rule.Call  # the first of them
    lengths: tuple[int, ...]
    count: int  # in the micro-batches that were looked at
    new: dict[str, float]  # of a kernel: the share of the calls in which it meets a shape for the first time


def choose_kernels(
    config: Config, model_config, device: torch.device, dtype: torch.dtype, sizes: Sizes, steps: Steps
) -> None:
    """Let `--attention auto` take what is the fastest here; and put into words, for the plan, what a run will use.

    The first rank measures and decides for all. All ranks must call.
    """
    asked = choose_attention(config.attention, device, dtype)
    known = rule.known = rule.Known()
    if asked not in rule.WORDS and asked != rule.AUTO:
        known.words = asked
        return
    if ranks.is_first():
        kinds = kinds_of(parts_of(model_config, config), sizes, steps, device, dtype)
        times: Times = {}
        if asked == rule.AUTO:
            pays = len(steps) * steps.survey.most >= FEWEST
            times = times_of(kinds, kept_sizes.folder_of(config, FOLDER), device, pays)
        for kind in kinds:
            if found := times.get(kind.call.bucket):
                known.fastest[kind.call.bucket] = fastest(kind, found)
        known.words = in_words(asked, kinds, times)
    known.fastest, known.words = ranks.from_first((known.fastest, known.words))  # type: ignore[misc]


def in_words(asked: str, kinds: list[Kind], times: Times) -> str:
    """`auto: tower dense (1.92 ms a layer, varlen 2.80), language model varlen by the rule`, for each part's usual
    lengths."""
    told = {}
    for kind in kinds:  # the most frequent come first
        name = packed.name_of(asked, kind.call)
        text = f"{kind.part.name} {name}"
        if found := times.get(kind.call.bucket):
            others = [f"{other} {milliseconds[1]:.2f}" for other, milliseconds in found.items() if other != name]
            text += f" ({found[name][1]:.2f} ms a layer; {', '.join(others)})" if others else ""
        elif asked == rule.AUTO:
            text += " (by the rule)"
        told.setdefault(kind.part.name, text)
    return f"{asked}: {', '.join(told.values())}" if told else asked


# ---- the calls of a run ---------------------------------------------------------------------------------------------


def parts_of(model_config, config: Config) -> list[Part]:
    """The tower and the language model, with the heads that one rank has. Blocks that see windows are a part by itself.

    A rank that shares a row attends over all of it, for some of the language model's heads (parallel/context.py). One
    that has parts of matrices has some heads of both (parallel/tensor.py).
    """
    tower = model_config.vision_config
    text = model_config.text_config
    of_matrix = config.tensor_parallel_size
    heads = tower.num_heads // of_matrix
    own = -(-text.num_attention_heads // of_matrix // config.context_parallel_size)
    shared = -(-own // (text.num_attention_heads // text.num_key_value_heads))
    of_tower = {"heads": heads, "shared": heads, "causal": False}
    of_tower["width"] = shapes_of(model_config).block.queries // tower.num_heads
    whole = whole_blocks(tower)
    family = FAMILIES[model_config.model_type]
    parts = [
        Part("tower", whole, lengths=patches_of, **of_tower),
        Part("tower's windows", tower.depth - whole, lengths=partial(windows_of, family), **of_tower),
        Part("language model", text.num_hidden_layers, own, shared, head_width(text), causal=True, lengths=tokens_of),
    ]
    return [part for part in parts if part.layers]


def kinds_of(parts: list[Part], sizes: Sizes, steps: Steps, device: torch.device, dtype: torch.dtype) -> list[Kind]:
    """The calls of the first micro-batches, those that are alike together, the most frequent first."""
    seen: dict[tuple[Part, str], list[tuple[int, ...]]] = {}
    for micro_batch in islice(steps.micro_batches(), LOOKED_AT):
        for part in parts:
            if lengths := part.lengths(sizes, micro_batch):
                bucket = part.call(lengths, device, dtype).bucket
                seen.setdefault((part, bucket), []).append(lengths)
    kinds = []
    for (part, _), calls in seen.items():
        new = {"dense": share_of_new(packed.runs_of(starts_of(lengths)) for lengths in calls)}
        new["cudnn"] = share_of_new((len(lengths), max(lengths)) for lengths in calls)
        kinds.append(Kind(part, part.call(calls[0], device, dtype), calls[0], len(calls), new))
    return sorted(kinds, key=lambda kind: -kind.count)


def tokens_of(sizes: Sizes, micro_batch: list[int]) -> tuple[int, ...]:
    """The lengths of the language model's pieces: samples."""
    return tuple(int(sizes.tokens[sample]) for sample in micro_batch)


def patches_of(sizes: Sizes, micro_batch: list[int]) -> tuple[int, ...]:
    """Those of the tower's: images, and pairs of a video's frames."""
    lengths: list[int] = []
    for sample in micro_batch:
        for grid in sizes.table.size(sample).grids:
            lengths += [grid.h * grid.w] * grid.t
    return tuple(lengths)


def windows_of(family: Family, sizes: Sizes, micro_batch: list[int]) -> tuple[int, ...]:
    """Those of its blocks that see windows."""
    lengths: list[int] = []
    for sample in micro_batch:
        for grid in sizes.table.size(sample).grids:
            lengths += collator.windows_of(grid, family)[1]
    return tuple(lengths)


def starts_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


def share_of_new(shapes: Iterable[object]) -> float:
    """How many of the shapes differ from all before them."""
    counts = Counter(shapes)
    return len(counts) / counts.total()


def fastest(kind: Kind, times: dict[str, list[float]]) -> str:
    """The kernel in which a micro-batch's layers take the least time, plans for new shapes included."""

    def milliseconds(name: str) -> float:
        first, later = times[name]
        return kind.part.layers * later + kind.new.get(name, 0.0) * max(0.0, first - later)

    return min(times, key=milliseconds)


# ---- measuring ------------------------------------------------------------------------------------------------------


def times_of(kinds: list[Kind], folder: Path, device: torch.device, pays: bool) -> Times:
    """What is remembered of these kinds of calls; what is not is measured where that pays, and remembered from then."""
    file = folder / f"{mark(device)}.json"
    times = read(file, device)
    wanted = [kind for kind in kinds if kind.call.bucket not in times and len(candidates(kind.call)) > 1]
    if not (pays and wanted and tells_work_apart(device)):
        return times
    until = time.monotonic() + SECONDS
    for kind in wanted:
        if time.monotonic() < until:
            times[kind.call.bucket] = measure(kind, device)
    torch.cuda.empty_cache()  # the forecast of memory looks at what is free
    with suppress(OSError):  # a folder that cannot be written to: the next run measures again
        write(file, device, times)
    return times


def candidates(call: rule.Call) -> list[str]:
    return [name for name in rule.WORDS if name in rule.installed() and rule.serves(name, call)]


def measure(kind: Kind, device: torch.device) -> dict[str, list[float]]:
    """Of each kernel that computes these calls, and as the default does: milliseconds of its first call, and of a
    later one, forward and backward pass together."""
    part, call = kind.part, kind.call
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(call.tokens, heads, part.width, generator=generator, device=device).to(call.dtype)

    q, k, v, gradient = (draw(heads) for heads in (part.heads, part.shared, part.shared, part.heads))
    starts = starts_of(kind.lengths)
    pieces = packed.Pieces(torch.tensor(starts, dtype=torch.int32, device=device), call.longest, packed.runs_of(starts))
    given = (q, k, v, pieces, part.causal, part.width**-0.5)

    def both(name: str) -> None:
        out, sums = packed.forward_by(name, given)
        packed.kernel(name).backward(gradient, q, k, v, out, sums, *given[3:])

    times = {}
    for name in candidates(call):
        try:
            run = partial(both, name)
            first = milliseconds(run)
            is_right = name == rule.DEFAULT or packed.difference(name, given) < packed.LARGEST_GAP
            later = statistics.median(milliseconds(run) for _ in range(REPEATS))
        except Exception:  # of any library, memory included: what cannot do it is no candidate
            continue
        if is_right:
            times[name] = [first, later]
    return times


def milliseconds(run: Callable[[], object]) -> float:
    """What one call takes on the current GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def tells_work_apart(device: torch.device) -> bool:
    """Whether times of this device mean anything: a hundred times the work takes longer. In a simulation it may not."""
    if device.type != "cuda":
        return False
    small, large = (torch.ones(side, side, dtype=torch.bfloat16, device=device) for side in (1024, 8192))
    for warm_up in (small, large):
        milliseconds(partial(torch.mm, warm_up, warm_up))
    return milliseconds(partial(torch.mm, large, large)) > 2 * milliseconds(partial(torch.mm, small, small))


# ---- remembering ----------------------------------------------------------------------------------------------------


def origin(device: torch.device) -> dict[str, object]:
    """What times depend on, beside the lengths and heads that their keys name."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": sorted(rule.installed()),
    }


def mark(device: torch.device) -> str:
    return hashlib.sha256(json.dumps(origin(device)).encode()).hexdigest()[:32]


def read(file: Path, device: torch.device) -> Times:
    """The times of a file that this device and these versions wrote; of any other one none."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(kept, dict) or kept.get("origin") != origin(device) or not isinstance(kept.get("times"), dict):
        return {}
    return {bucket: found for bucket, found in kept["times"].items() if are_times(found)}


def are_times(found: object) -> bool:
    """{kernel: [milliseconds, milliseconds]}, the default among them."""
    if not isinstance(found, dict) or rule.DEFAULT not in found or not found.keys() <= rule.installed():
        return False
    pairs = [pair for pair in found.values() if isinstance(pair, list) and len(pair) == 2]
    numbers = [number for number in chain.from_iterable(pairs) if isinstance(number, float) and 0 <= number < math.inf]
    return len(numbers) == 2 * len(found)


def write(file: Path, device: torch.device, times: Times) -> None:
    """Complete or absent, whoever else writes it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.stem}.{secrets.token_hex(8)}.unfinished")
    try:
        unfinished.write_text(json.dumps({"origin": origin(device), "times": times}) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        with suppress(OSError):
            os.unlink(unfinished)
