"""Which layout of ranks trains fastest on so many GPUs: python -m util check --gpus 64 --gpu_memory 80GiB.

Every layout that the model allows is looked at: which of its settings fit the memory, by the forecast of each stage,
and how long a step then takes. All of it is computed, nothing measured; docs/scaling.md says from what.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from util import compilation
from util.command_line import UserError, choices_of
from util.config import Config
from util.cost.flops import part_factors
from util.cost.layouts import Shape, Weights, cut_stages, layers_with_the_tower, stage_forecast
from util.cost.links import Hardware
from util.cost.memory import GIB, Forecast, parts_in_words
from util.cost.shapes import shapes_of
from util.cost.step_time import Course, StepTime, step_seconds
from util.cost.work import Workload

MOST_STAGES = 32
MOST_CONTEXT = 64
AXIS_COSTS = 0.01  # share of a step that each axis beside data must save to be worth its while
MOST_SHOWN = 5  # layouts that were not taken


@dataclass
class Candidate:
    """A layout with its settings, what it needs, and how long its step takes where that fits."""

    shape: Shape
    cut: tuple[int, ...]  # layers of each stage
    needs: Forecast  # of the stage that needs most
    stage: int
    max_tokens: int  # of its longest row
    time: StepTime | None = None

    @property
    def needed(self) -> float:
        return sum(self.needs.values())

    @property
    def score(self) -> float:
        """What is least for the one to take: seconds of a step, and a little more for each axis beside data."""
        assert self.time
        in_groups = 1 < self.shape.group < self.shape.of_a_weight
        return self.time.step * (1 + AXIS_COSTS * (sum(kind_of(self.shape)) + in_groups))

    @property
    def least_score(self) -> float:
        """No score of the same axes is below this, whatever the sharding, the checkpointing and the number of rows:
        these change what is sent of weights, their update, the bubble, and what is computed again."""
        assert self.time
        changing = ("sharding", "update", "bubble", "recomputation")
        step = self.time.step - sum(self.time.parts[name] for name in changing)
        return step * (1 + AXIS_COSTS * sum(kind_of(self.shape)))


@dataclass
class Search:
    """All that a choice goes by."""

    model_config: object
    config: Config
    work: Workload
    gpus: int
    hardware: Hardware
    device: torch.device = torch.device("cuda")
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        self.weights = Weights.of(self.model_config)

    @property
    def room(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return self.hardware.memory * self.hardware.memory_usable

    # ---- which there are

    def layouts(self) -> Iterator[Shape]:
        """Every way to lay out the GPUs that the model, the data and the typed settings allow."""
        for tensor in self.sizes("tensor", self.tensor_sizes()):
            of_stages = [size for size in divisors(self.gpus // tensor) if size <= self.most_stages()]
            for pipeline in self.sizes("pipeline", of_stages):
                rest = self.gpus // tensor // pipeline
                heads = self.model_config.text_config.num_attention_heads // tensor  # each context rank has one
                of_rows = [size for size in divisors(rest) if size <= min(MOST_CONTEXT, heads)]
                for context in self.sizes("context", of_rows):
                    if rest % context == 0 and rest // context <= self.work.samples:
                        yield Shape(rest // context, pipeline, context, tensor)

    def sizes(self, axis: str, possible: list[int]) -> list[int]:
        """The possible sizes of an axis, or of these the one that was typed."""
        name = f"{axis}_parallel_size"
        if name not in self.config.given:
            return possible
        return [size for size in possible if size == getattr(self.config, name)]

    def tensor_sizes(self) -> list[int]:
        """Those that leave every rank whole heads, key-value heads among them, and equal parts of the MLPs, and stay
        within a machine."""
        text, tower = self.model_config.text_config, self.model_config.vision_config
        if self.has_adapters():
            return [1]
        # whatever divides all of these, and the GPUs: their greatest common divisor's divisors
        shapes = shapes_of(self.model_config)
        heads = math.gcd(text.num_key_value_heads, text.num_attention_heads, tower.num_heads)
        common = math.gcd(heads, shapes.layer.inner, shapes.block.inner, self.gpus)
        return [size for size in divisors(common) if self.hardware.machine % size == 0]

    def most_stages(self) -> int:
        if self.has_adapters():
            return 1
        depth = self.model_config.text_config.num_hidden_layers
        return max(1, min(MOST_STAGES, depth - layers_with_the_tower(self.model_config) + 1))

    def has_adapters(self) -> bool:
        """Whether adapters are trained beside whole or 4-bit weights, which neither stages nor tensor ranks cut."""
        return bool(self.config.lora_rank) or self.config.quantize != "none"

    def settings_of(self, layout: Shape) -> Iterator[Shape]:
        """A layout with each sharding, group and kind of checkpointing that was not typed otherwise."""
        ranks = layout.of_a_weight
        within = self.hardware.machine // layout.tensor
        groups = {ranks} | ({within} if 1 < within < ranks and ranks % within == 0 else set())
        if self.config.shard_group_size:
            groups = {self.config.shard_group_size} & set(divisors(ranks))
        for checkpointing in self.choices("activation_checkpointing"):
            for sharding in self.choices("sharding") if ranks > 1 else ("full",):
                for group in sorted(groups, reverse=True) if sharding != "none" else (1,):
                    yield replace(layout, sharding=sharding, group=group, checkpointing=checkpointing)

    def choices(self, name: str) -> tuple[str, ...]:
        return (getattr(self.config, name),) if name in self.config.given else choices_of(Config, name)

    # ---- what one needs, and how long it takes

    def cut(self, stages: int) -> tuple[int, ...]:
        """The layers of each stage, by the work of all samples."""
        factors = part_factors(self.config)
        of_parts = {part: factors[part] * float(flops.sum()) for part, flops in self.work.forward.items()}
        layers = self.weights.layers
        before = of_parts["vision"] + of_parts["merger"]
        of_first = layers_with_the_tower(self.model_config)
        return cut_stages(layers, stages, before, of_parts["language_model"] / layers, of_parts["head"], of_first)

    def needs(self, shape: Shape) -> Candidate:
        """A layout with the forecast of the stage that needs most."""
        cut = self.cut(shape.pipeline)
        rows = self.work.rows(shape.data, shape.rows)
        found = []
        for stage in telling_stages(cut):
            forecast = stage_forecast(
                self.model_config, self.config, self.dtype, shape, stage, cut, self.weights, rows, self.device
            )
            longest = max(rows.tokens.max(), rows.heaviest[:, 0].max())
            found.append(Candidate(shape, cut, forecast, stage, int(longest)))
        return max(found, key=lambda candidate: candidate.needed)

    def fewest_rows(self, shape: Shape) -> Candidate:
        """With the fewest rows that fit; where not even one sample a row fits, with so many."""
        most = self.work.own(shape.data).shape[1]
        counts = row_counts(most)
        found = self.needs(replace(shape, rows=most))
        low, high = 0, len(counts) - 1
        while low < high and found.needed <= self.room:
            middle = (low + high) // 2
            tried = self.needs(replace(shape, rows=counts[middle]))
            if tried.needed <= self.room:
                found = tried
                high = middle
            else:
                low = middle + 1
        return found

    def candidates(self, shape: Shape) -> list[Candidate]:
        """A layout with its settings: with the fewest rows, and of a pipeline also with more, which wait less."""
        first = self.fewest_rows(shape)
        if first.needed > self.room:
            return [first]
        found = [first]
        most = self.work.own(shape.data).shape[1]
        # beyond 8 rows a stage less than an eighth of a step waits
        while shape.pipeline > 1 and (rows := 2 * found[-1].shape.rows) <= min(most, 16 * shape.pipeline):
            found.append(self.needs(replace(shape, rows=rows)))
        for candidate in found:
            course = Course(
                candidate.shape, candidate.cut, self.weights, self.model_config, self.config, self.hardware,
                compilation.is_on(self.config.compile, self.device),
            )  # fmt: skip
            candidate.time = step_seconds(course, self.work)
        return found

    def worth_a_look(self, layout: Shape, best: float) -> list[Candidate]:
        """The candidates of a layout. Settings are left out that cannot come below `best`, a score, or that need more
        memory than others that do not fit; of data alone none are left out, since people ask for these."""
        is_plain = layout.ranks == layout.data
        found: list[Candidate] = []
        too_large = set()  # kinds of checkpointing under which not even full sharding over all fits, which needs least
        for shape in self.settings_of(layout):
            least = max((one.least_score for one in found if one.time), default=0.0)
            if not is_plain and (least >= best or shape.checkpointing in too_large):
                continue
            made = self.candidates(shape)
            if not made[0].time and shape.sharding == "full" and shape.group == layout.of_a_weight:
                too_large.add(shape.checkpointing)
            found += made
        return found

    def run(self) -> list[Candidate]:
        """All of them, those that fit by their score, then those that do not by what they need."""
        from tqdm import tqdm

        found = []
        best: dict[tuple, float] = {}  # score of each kind of layout
        for layout in tqdm(list(self.layouts()), desc="layouts", leave=False, delay=1):
            of_layout = self.worth_a_look(layout, best.get(kind_of(layout), math.inf))
            found += of_layout
            scores = [one.score for one in of_layout if one.time]
            best[kind_of(layout)] = min([*scores, best.get(kind_of(layout), math.inf)])
        return sorted(found, key=lambda one: (one.time is None, one.score if one.time else one.needed))


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def row_counts(most: int) -> list[int]:
    """1 to 8, then in steps of about an eighth, to `most`."""
    counts = [1]
    while counts[-1] < most:
        counts.append(min(most, counts[-1] + max(1, counts[-1] // 8)))
    return counts


def telling_stages(cut: tuple[int, ...]) -> list[int]:
    """Of stages with equally many layers the first one has most rows in flight; the first and the last have more
    than layers."""
    last = len(cut) - 1
    firsts = {cut[stage]: stage for stage in range(last - 1, 0, -1)}
    return sorted({0, last, *firsts.values()})


# ---- in words -------------------------------------------------------------------------------------------------------


def axes_in_words(shape: Shape) -> str:
    """`pipeline 4 x data 8 x tensor 2`, outermost first."""
    sizes = {"pipeline": shape.pipeline, "data": shape.data, "context": shape.context, "tensor": shape.tensor}
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one GPU"


def layout_in_words(shape: Shape) -> str:
    """`data 8 x context 8, sharding full over 64, checkpointing selective, 2 rows`."""
    words = [axes_in_words(shape)]
    if shape.of_a_weight > 1:
        over = f" over {shape.group}" if shape.sharding != "none" else ""
        words.append(f"sharding {shape.sharding}{over}")
    if shape.checkpointing != "none":
        words.append(f"checkpointing {shape.checkpointing}")
    words.append("1 row a step" if shape.rows == 1 else f"{shape.rows} rows a step")
    return ", ".join(words)


def parts_of_time(time: StepTime) -> str:
    """`computation 71 %, recomputation 22 %`: what a step is spent on, the most first; below half a percent nothing."""
    found = sorted(time.parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, seconds in found if (share := seconds / time.step) >= 0.005)


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """`13.2 s (+7.1 %): uneven ranks +0.9 s, tensor +0.2 s`: what costs it more than the best one."""
    assert candidate.time
    assert best.time
    more = {name: seconds - best.time.parts[name] for name, seconds in candidate.time.parts.items()}
    worst = sorted(more, key=more.__getitem__, reverse=True)[:2]
    slower = candidate.time.step / best.time.step - 1
    reasons = ", ".join(f"{name} {more[name]:+.2f} s" for name in worst if more[name] > 0)
    return f"{candidate.time.step:.2f} s ({slower:+.1%}): {reasons}"


def flags_of(candidate: Candidate, config: Config) -> dict[str, object]:
    """The flags that ask for a layout; those that the defaults give are left out."""
    shape = candidate.shape
    found: dict[str, object] = {"global_batch_size": config.global_batch_size}
    longest = max(candidate.max_tokens, config.max_tokens if "max_tokens" in config.given else 0)
    found["max_tokens"] = -(-longest // 256) * 256
    for axis in ("tensor", "pipeline", "context"):
        if (size := getattr(shape, axis)) > 1:
            found[f"{axis}_parallel_size"] = size
    if shape.tensor > 1:
        found["sequence_parallel"] = ""
    if shape.of_a_weight > 1:
        found["sharding"] = shape.sharding
        if shape.sharding != "none" and shape.group < shape.of_a_weight:
            found["shard_group_size"] = shape.group
    found["activation_checkpointing"] = shape.checkpointing
    return found


def commands_of(candidate: Candidate, config: Config, machine: int) -> list[str]:
    """The command line that starts it, as it is typed on each machine."""
    ranks = candidate.shape.ranks
    machines = -(-ranks // machine)
    start = "./finetune.sh" if ranks == 1 else f"NPROC_PER_NODE={min(ranks, machine)} ./finetune_distributed.sh"
    if machines > 1:
        start = f"NNODES={machines} NODE_RANK=0 MASTER_ADDR=10.0.0.1 {start}"
    words = [start]
    if config.model:
        words.append(f"--model {shlex.quote(config.model)}")
    if "data" in config.given:
        words.append(f"--data {shlex.join(config.data)}")
    words += [f"--{name} {value}".strip() for name, value in flags_of(candidate, config).items()]
    lines = [" ".join(words)]
    if machines > 1:
        lines.append(f"on each machine, with its NODE_RANK (0 to {machines - 1}) and the first one's address")
    return lines


def facts_of(search: Search, best: Candidate) -> dict[str, str]:
    """Lines about the layout that is taken."""
    assert best.time
    shape, work = best.shape, search.work
    step = best.time.step
    mfu = work.work / (step * shape.ranks * search.hardware.peak)
    of_stage = f" (stage {best.stage + 1} of {len(best.cut)})" if len(best.cut) > 1 else ""
    facts = {
        "samples": f"{work.samples:,} a step, {work.tokens:,.0f} tokens: {work.words}",
        "layout": layout_in_words(shape),
        "rows": f"of at most {best.max_tokens:,} tokens, {shape.rows} for each of {shape.data} places of the data axis",
    }
    if len(best.cut) > 1:
        facts["stages"] = f"{', '.join(map(str, best.cut))} layers; the tower with the first, the head with the last"
    return facts | {
        "step": f"{step:.2f} s, {work.samples / step:,.1f} samples and {work.tokens / step:,.0f} tokens a second; "
        f"MFU {mfu:.1%}",
        "spent on": parts_of_time(best.time),
        "bound by": best.time.bound,
        "memory": f"{best.needed / GIB:.1f} of {search.room / GIB:.1f} GiB{of_stage}: {parts_in_words(best.needs)}; "
        f"most at {best.needs.moment}",
    }


def others_in_words(found: list[Candidate], best: Candidate) -> dict[str, str]:
    """Of every other kind of layout the best, in their order, and why it loses; data alone always among them."""
    lines = {}
    seen = {kind_of(best.shape)}
    fitting = [candidate for candidate in found if candidate.time]
    plain = [one for one in fitting if one.shape.ranks == one.shape.data]
    for candidate in [*plain[:1], *fitting]:
        kind = kind_of(candidate.shape)
        if kind not in seen and len(lines) < MOST_SHOWN:
            seen.add(kind)
            lines[layout_in_words(candidate.shape)] = why_slower(candidate, best)
    return lines


def kind_of(shape: Shape) -> tuple[bool, ...]:
    """Which axes beside data are used."""
    return (shape.pipeline > 1, shape.context > 1, shape.tensor > 1)


def misfits_in_words(found: list[Candidate], room: float) -> dict[str, str]:
    """What does not fit with any checkpointing, and by how much: data alone, by its sharding, and the nearest of
    others."""
    fits = {(axes_in_words(one.shape), one.shape.sharding) for one in found if one.time}
    too_large: dict[tuple, Candidate] = {}
    for candidate in found:
        key = (axes_in_words(candidate.shape), candidate.shape.sharding)
        if not candidate.time and key not in fits:
            too_large.setdefault(key, candidate)  # they come by what they need
    plain = [one for one in too_large.values() if one.shape.ranks == one.shape.data]
    chosen = list({id(one): one for one in [*plain, *too_large.values()]}.values())
    lines = {}
    for candidate in chosen[:MOST_SHOWN]:
        above = candidate.needed - room
        lines[layout_in_words(candidate.shape)] = (
            f"needs {candidate.needed / GIB:.1f} GiB, {above / GIB:.1f} too many, most at {candidate.needs.moment}"
        )
    return lines


@dataclass
class Proposal:
    """A layout and why it is taken, in words."""

    title: str
    facts: dict[str, str]
    others: list[str]  # why not another one
    misfits: list[str]  # what does not fit, and by how much
    commands: list[str]
    best: Candidate


def propose(search: Search) -> Proposal:
    """The layout that trains fastest. Raises UserError where none fits."""
    found = search.run()
    if not found or not found[0].time:
        raise none_fits(search, found)
    best = found[0]
    machine = search.hardware.machine
    machines = f" in {search.gpus // machine} machines of {machine}" if search.gpus > machine else ""
    return Proposal(
        f"layout for {search.gpus:,} H100 of {search.hardware.memory / GIB:.0f} GiB{machines}: computed, not measured",
        {**facts_of(search, best), "by": assumptions_in_words(search.hardware)},
        [f"{name}: {reason}" for name, reason in others_in_words(found, best).items()],
        [f"{name}: {reason}" for name, reason in misfits_in_words(found, search.room).items()],
        commands_of(best, search.config, machine),
        best,
    )


def assumptions_in_words(hardware: Hardware) -> str:
    return (
        f"{hardware.mfu:.0%} of {hardware.peak / 1e12:.0f} TFLOP/s while computing, "
        f"{hardware.link_efficiency:.0%} of NVLink's {hardware.nvlink / 1e9:.0f} and the network's "
        f"{hardware.network / 1e9:.0f} GB/s, {hardware.memory_usable:.0%} of the memory for tensors; docs/scaling.md "
        "says what else is assumed"
    )


def none_fits(search: Search, found: list[Candidate]) -> UserError:
    """What to say where no layout is left, or none of them fits."""
    if not found:
        return UserError(
            f"no layout of {search.gpus} GPUs is left: tensor ranks must divide the "
            f"{search.model_config.text_config.num_key_value_heads} key-value heads and stay within a machine of "
            f"{search.hardware.machine}, stages are at most the {search.weights.layers} layers, and each place of the "
            f"data axis needs one of the {search.work.samples:,} samples of a step (--global_batch_size)"
        )
    nearest = found[0]
    return UserError(
        f"no layout of {search.gpus} GPUs fits: the nearest, {layout_in_words(nearest.shape)}, needs "
        f"{nearest.needed / GIB:.1f} GiB on a GPU ({parts_in_words(nearest.needs)}), and {search.room / GIB:.1f} GiB "
        f"of {search.hardware.memory / GIB:.0f} are counted on. More or larger GPUs help, a shorter longest sample "
        "(--video_max_tokens), or training less: --freeze vision, --lora_rank 16"
    )
