"""How long a step of a layout takes, computed: docs/scaling.md has the formulas, links.py the assumptions.

What ranks do while they work on one row, in one pass:

    compute         FLOPs / (peak x MFU), divided among tensor and context ranks
    tensor          two gathers and two reductions of rows a layer (--sequence_parallel): nothing hides them
    context         all-to-alls around attention: queries travel while keys and values are made, nothing hides the rest
    sharding        gathers and reductions of weights, hidden behind the compute of their pass as far as it lasts
    transfer        a row's hidden states to the next stage, or their gradients back

and what a step has beside: that the slowest rank has more work than the mean, and the costliest stage more than others;
stages that wait for the first row and after the last (the bubble); and the update of the weights.
"""

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from util.config import Config
from util.cost.activations import parts_that_learn
from util.cost.flops import part_factors
from util.cost.layouts import Shape, Unit, Weights, collectives, update_bytes
from util.cost.links import (
    EXCHANGE,
    GATHER,
    REDUCE,
    SCATTER,
    Hardware,
    collective_time,
    duration,
    seconds_of,
    send_time,
)
from util.cost.shapes import head_width, number_of_deeper, shapes_of
from util.cost.work import Rows, Workload
from util.vision import MERGE

SCALAR_ALL_REDUCES = 3  # a few numbers each: a step's counts, its loss, and the norms of its gradients
COMPUTE = 2  # bytes of an element that is computed with, gathered or sent
REDUCED = 4  # of one that is reduced


@dataclass
class StepTime:
    """Seconds of an optimizer step. `parts` add up to it."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What beside the computation itself costs most, where it is a tenth of the step or more; else that."""
        beside = {name: seconds for name, seconds in self.parts.items() if name != "computation"}
        largest = max(beside, key=beside.__getitem__)
        return largest if beside[largest] >= self.step / 10 else "computation"


# ---- sharding -------------------------------------------------------------------------------------------------------


def pass_times(
    calls: list, hardware: Hardware, group: int, stride: int, is_forward: bool
) -> tuple[float, float, dict[str, float]]:
    """Of the collectives of one pass the seconds that can be hidden, those that cannot, and both by link.

    Nothing can hide the gathers of the root and of the first layer before the forward pass, and the reduction of the
    root's gradients after the backward pass. `stride`: from one rank to the next of those that share weights.
    """
    links = {"latency": 0.0, "nvlink": 0.0, "network": 0.0}
    hidden = bare = 0.0
    is_first_layer = is_forward
    for name, unit, elements, members in calls:
        whole = elements * (COMPUTE if name == GATHER else REDUCED)
        seconds = collective_time(hardware, name, whole, members, stride * (group if name == REDUCE else 1))
        links = {key: links[key] + seconds[key] for key in links}
        if unit.is_root or is_first_layer:
            bare += duration(seconds)
        else:
            hidden += duration(seconds)
        is_first_layer = is_first_layer and unit.is_root
    return hidden, bare, links


@cache
def sharding_times(
    units: tuple[Unit, ...], sharding: str, ranks: int, group: int, stride: int, kind: str, hardware: Hardware
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(hidden, bare) seconds of forward and backward pass of a row: of "the only", "the first", "the last" of a step,
    or one "between"."""
    number, rows = {"the only": (0, 1), "the first": (0, 2), "the last": (1, 2), "between": (1, 3)}[kind]
    forward, backward = collectives(units, sharding, ranks, group, number, rows)
    of_forward = pass_times(forward, hardware, group, stride, True)
    of_backward = pass_times(backward, hardware, group, stride, False)
    return of_forward[:2], of_backward[:2]


def exposed(hidden, bare, work):
    """Of communication the seconds in which nothing is computed; arrays (M,), or numbers."""
    return bare + np.maximum(0.0, hidden - work)


# ---- a stage's passes over a row ------------------------------------------------------------------------------------


@dataclass
class Passes:
    """Seconds of the two passes of one stage over each row (M,) of a rank, by what they are spent on."""

    forward: dict[str, np.ndarray]
    backward: dict[str, np.ndarray]

    def total(self, name: str) -> float:
        return float((self.forward[name] + self.backward[name]).sum())


@dataclass
class Course:
    """How the steps of one layout run."""

    shape: Shape
    cut: tuple[int, ...]
    weights: Weights
    model_config: Any
    config: Config
    hardware: Hardware
    is_compiled: bool = True  # the layers, as on a GPU: what of it is made anew for a backward pass

    def __post_init__(self) -> None:
        frozen = tuple(self.config.freeze)
        stages = [self.weights.stage(number, self.cut, self.shape.tensor) for number in range(len(self.cut))]
        self.units = [stage.units(frozen) for stage in stages]

    def passes(self, stage: int, rows: Rows, rank: int) -> Passes:
        """What one rank's rows take on one stage."""
        computed, remade = self.computation(stage, rows, rank)
        forward = {"computation": computed[0], "recomputation": 0 * remade}
        backward = {"computation": computed[1], "recomputation": remade}
        for name, (seconds, seconds_back) in self.messages(stage, rows, rank).items():
            forward[name] = seconds
            backward[name] = seconds_back
        hidden = self.hidden_queries(stage, rows, rank, False)
        hidden_back = self.hidden_queries(stage, rows, rank, True) + self.exchanges_again * hidden
        forward["context"] = forward["context"] - hidden
        backward["context"] = backward["context"] - hidden_back
        of_forward, of_backward = self.sharding_of_rows(stage, len(remade))
        # a second of computation hides one message: not that of weights and that of queries
        forward["sharding"] = exposed(*of_forward, computed[0] - hidden)
        backward["sharding"] = exposed(*of_backward, computed[1] + remade - hidden_back)
        return Passes(forward, backward)

    def sharding_of_rows(self, stage: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds that can be hidden, and that cannot, (2, M), of the forward and of the backward pass of each row."""
        kinds = ["the only"] if rows == 1 else ["the first", *["between"] * (rows - 2), "the last"]
        shape = self.shape
        times = {}
        for kind in set(kinds):
            times[kind] = sharding_times(
                self.units[stage], shape.sharding, shape.of_a_weight, shape.group, shape.tensor, kind, self.hardware
            )
        both = np.array([times[kind] for kind in kinds])  # (M, 2, 2)
        return both[:, 0].T, both[:, 1].T

    def computation(self, stage: int, rows: Rows, rank: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """((forward, backward), what is made anew): seconds (M,) each."""
        shape = self.shape
        patches = np.maximum(rows.patches[rank], 1)
        of_tower = np.maximum(1 / shape.context, rows.largest[rank] / patches)  # no picture is cut
        layers = self.cut[stage] / sum(self.cut) / shape.context
        shares = {
            "vision": of_tower * (stage == 0),
            "merger": of_tower * (stage == 0),
            "language_model": layers,
            "head": (stage == len(self.cut) - 1) / shape.context,
        }
        rate = self.hardware.peak * self.hardware.mfu * shape.tensor
        factors = part_factors(self.config)
        learns = parts_that_learn(self.config)
        forward = backward = remade = np.zeros(len(patches))
        # attention takes as long as the rank with most heads, whose part may be more than the mean
        cuts = self.cuts_of_heads()
        uneven = most_between(cuts) * shape.context / cuts[-1] - 1
        for part, operations in rows.forward.items():
            flops = operations[rank] + uneven * rows.attention[rank] * (part == "language_model")
            seconds = flops * shares[part] / rate
            forward = forward + seconds
            backward = backward + (factors[part] - 1) * seconds
            if shape.checkpointing == "full" and part in ("vision", "language_model") and part in learns:
                remade = remade + seconds
        return (forward, backward), remade

    def messages(self, stage: int, rows: Rows, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Seconds (M,) of the forward and of the backward pass that tensor, context and pipeline ranks talk to each
        other."""
        patches = rows.patches[rank] * (stage == 0) / self.shape.context
        tokens = rows.tokens[rank] / self.shape.context
        transfer = self.transfers(stage, tokens)
        return {
            "tensor": self.tensor_messages(stage, tokens, patches, rows.supervised[rank] / self.shape.context),
            "context": self.context_messages(stage, tokens, patches),
            "transfers": (transfer, transfer),
        }

    def tensor_messages(self, stage, tokens, patches, supervised) -> tuple[np.ndarray, np.ndarray]:
        """Of rows that tensor ranks gather and add up, as util/parallel/tensor.py does in sequence parallelism, under
        which the forecast of memory divides them. As many bytes as two all-reduces in each layer and pass."""
        text, tower = self.model_config.text_config, self.model_config.vision_config
        layers, blocks = self.cut[stage], tower.depth * (stage == 0)
        token = COMPUTE * text.hidden_size
        patch = COMPUTE * shapes_of(self.model_config).block.width
        there, back = np.zeros_like(tokens), np.zeros_like(tokens)
        for depth, whole in ((layers, token * tokens), (blocks, patch * patches)):
            gather = self.among_tensor_ranks(GATHER, whole)
            scatter = self.among_tensor_ranks(SCATTER, whole)
            # one more gather at the end of all layers, or, of gradients, before the first
            there = there + 2 * depth * (gather + scatter) + gather * (depth > 0)
            back = back + 2 * depth * (gather + scatter) + gather * (depth > 0)
            if self.shape.checkpointing == "full":
                # A layer that is made anew ends before its last product, whose sum nothing needs.
                back = back + depth * (2 * gather + scatter)
            elif self.shape.checkpointing == "selective" and not self.is_compiled:
                # Sums are kept, and rows that were gathered are not (util/recompute.py); a graph keeps both.
                back = back + depth * 2 * gather
        if stage == 0:
            there = there + self.among_tensor_ranks(REDUCE, token * tokens)  # the embedding
            there = there + self.among_tensor_ranks(REDUCE, token * self.visual_rows(patches))  # the merger
            back = back + self.among_tensor_ranks(REDUCE, patch * patches)
        if stage == len(self.cut) - 1:
            for numbers in (1, 2):  # of the loss: the largest logit; the sum, and that of the target
                there = there + self.among_tensor_ranks(REDUCE, numbers * REDUCED * supervised)
            back = back + self.among_tensor_ranks(REDUCE, token * supervised)  # what the head reads
        return there, back

    def among_tensor_ranks(self, name: str, whole: np.ndarray) -> np.ndarray:
        """Seconds of collectives over `whole` bytes each, where there are any."""
        return seconds_of(self.hardware, name, whole, self.shape.tensor) * (whole > 0)

    def context_messages(self, stage: int, tokens: np.ndarray, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of attention over a row of which each rank has `tokens`, and of visual tokens, which go where they stand."""
        text = self.model_config.text_config
        ranks, stride = self.shape.context, self.shape.tensor
        if ranks == 1:
            return 0 * tokens, 0 * tokens
        cuts = self.cuts_of_heads()
        read = text.num_attention_heads // text.num_key_value_heads  # query heads that read a key-value head
        keys = sum((end - 1) // read - begin // read + 1 for begin, end in pairwise(cuts))  # that all ranks get
        width = COMPUTE * head_width(text) * tokens
        around = self.queries_sent(tokens) + seconds_of(self.hardware, EXCHANGE, 2 * width * keys, ranks, stride)
        # back from the rank with most heads, for the tokens of all
        around = around + seconds_of(self.hardware, EXCHANGE, width * ranks * most_between(cuts), ranks, stride)
        size = COMPUTE * text.hidden_size * self.visual_rows(patches)
        of_visual = seconds_of(self.hardware, EXCHANGE, size, ranks, stride) * (patches > 0)
        layers = self.cut[stage]
        return layers * around + of_visual, (1 + self.exchanges_again) * layers * around + of_visual

    @property
    def exchanges_again(self) -> bool:
        """Whether the backward pass of a layer exchanges anew: where it is made anew.

        Under `selective` one of torch's contexts makes anew all but products and attention; where layers are compiled
        there is no such context, and attention is in no graph.
        """
        is_selective = self.shape.checkpointing == "selective" and not self.is_compiled
        return self.shape.checkpointing == "full" or is_selective

    def visual_rows(self, patches: np.ndarray) -> np.ndarray:
        """Rows as wide as the language model that visual tokens are; those of deepstack are rows of their own."""
        return (1 + number_of_deeper(self.model_config)) * patches / MERGE**2

    def queries_sent(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds (M,) in which a layer's queries of `tokens` on each rank travel, or their gradients."""
        text = self.model_config.text_config
        size = COMPUTE * text.num_attention_heads * head_width(text) / self.shape.tensor * tokens
        return seconds_of(self.hardware, EXCHANGE, size, self.shape.context, self.shape.tensor)

    def hidden_queries(self, stage: int, rows: Rows, rank: int, is_backward: bool) -> np.ndarray:
        """Of the seconds (M,) in which queries travel in a pass, those in which keys and values are made meanwhile, or
        have their backward pass."""
        text = self.model_config.text_config
        tokens = rows.tokens[rank] / self.shape.context
        outputs = 2 * head_width(text) * text.num_key_value_heads / self.shape.tensor
        products = 2 * text.hidden_size * outputs * tokens / (self.hardware.peak * self.hardware.mfu)
        if is_backward:
            products = products * (part_factors(self.config)["language_model"] - 1)
        return self.cut[stage] * np.minimum(self.queries_sent(tokens), products)

    def cuts_of_heads(self) -> list[int]:
        """Where the heads of a tensor rank are cut between context ranks: neighbours, as many for each or one more."""
        heads = self.model_config.text_config.num_attention_heads // self.shape.tensor
        return [heads * rank // self.shape.context for rank in range(self.shape.context + 1)]

    def transfers(self, stage: int, tokens: np.ndarray) -> np.ndarray:
        """Of hidden states that come from the stage before, or of gradients that come from the one after."""
        stages = len(self.cut)
        if stages == 1:
            return 0 * tokens
        ranks_of_stage = self.shape.ranks // stages
        to = max(1, stage)  # the first stage receives gradients, the others hidden states too
        machine = self.hardware.machine
        is_far = (to * ranks_of_stage - 1) // machine != to * ranks_of_stage // machine or ranks_of_stage >= machine
        size = COMPUTE * self.model_config.text_config.hidden_size * tokens
        return send_time(self.hardware, size, is_far)

    def update(self) -> float:
        """Seconds of the update on the stage with most weights, and of the numbers that all ranks add up."""
        most = max(update_bytes(units, self.shape.group) for units in self.units)
        scalars = SCALAR_ALL_REDUCES * collective_time(self.hardware, REDUCE, 8, self.shape.ranks)["latency"]
        return most / (self.hardware.memory_bandwidth * self.hardware.memory_efficiency) + scalars

    def of_rank(self, rows: Rows, rank: int) -> dict[str, float]:
        """Seconds by part until a rank, and the stages that have its rows, are through with them."""
        stages = [self.passes(stage, rows, rank) for stage in range(len(self.cut))]
        forward = np.array([sum(stage.forward.values()) for stage in stages])  # (stages, M)
        backward = np.array([sum(stage.backward.values()) for stage in stages])
        costliest = int((forward + backward).sum(axis=1).argmax())
        worst = stages[costliest]
        parts = {name: worst.total(name) for name in worst.forward}
        mean = sum(stage.total("computation") for stage in stages) / len(stages)
        parts["uneven stages"] = parts["computation"] - mean
        parts["computation"] = mean
        busy = float((forward + backward)[costliest].sum())
        waited = pipeline_seconds(forward.T.tolist(), backward.T.tolist()) - busy if len(stages) > 1 else 0.0
        parts["bubble"] = waited
        return parts


def most_between(cuts: list[int]) -> int:
    return max(end - begin for begin, end in pairwise(cuts))


def step_seconds(course: Course, work: Workload) -> StepTime:
    """The mean over the steps that `work` holds; of each step that of its rank with most work."""
    shape = course.shape
    rows = work.rows(shape.data, shape.rows)
    of_ranks = rows.training.sum(axis=1).reshape(-1, shape.data)  # (N, data)
    found: dict[str, float] = {}
    for step, rank in enumerate(of_ranks.argmax(axis=1).tolist()):
        for name, seconds in course.of_rank(rows, step * shape.data + rank).items():
            found[name] = found.get(name, 0.0) + seconds / len(of_ranks)
    # what the mean rank computes, and by how much the slowest has more of it
    factors = part_factors(course.config)
    flops = sum(factors[part] * operations.sum() for part, operations in work.forward.items()) / len(of_ranks)
    even = float(flops) / shape.ranks / (course.hardware.peak * course.hardware.mfu)
    found["uneven ranks"] = found["computation"] - even
    found["computation"] = even
    found["update"] = course.update()
    return StepTime(found)


# ---- the pipeline ---------------------------------------------------------------------------------------------------


def pipeline_seconds(forward: list[list[float]], backward: list[list[float]]) -> float:
    """Seconds of 1F1B over rows whose passes take (M, stages) seconds: each stage begins as many rows as there are
    stages from it to the last, then a backward and a forward pass in turn.

    With equal rows and stages (M + stages - 1) (forward + backward): a share of (stages - 1) / (M + stages - 1) waits.
    """
    rows, stages = len(forward), len(forward[0])
    orders = [order_of_passes(stage, stages, rows) for stage in range(stages)]
    clock = [0.0] * stages
    done: dict[tuple, float] = {}  # (is forward, row, stage): when
    places = [0] * stages
    while any(place < 2 * rows for place in places):
        for stage in range(stages):
            while places[stage] < 2 * rows:
                is_forward, row = orders[stage][places[stage]]
                before = stage - 1 if is_forward else stage + 1
                ready = 0.0
                if 0 <= before < stages:
                    if (is_forward, row, before) not in done:
                        break
                    ready = done[is_forward, row, before]
                seconds = (forward if is_forward else backward)[row][stage]
                clock[stage] = max(clock[stage], ready) + seconds
                done[is_forward, row, stage] = clock[stage]
                places[stage] += 1
    return max(clock)


@cache
def order_of_passes(stage: int, stages: int, rows: int) -> list[tuple[bool, int]]:
    """(is it a forward pass, row) in the order of 1F1B."""
    ahead = min(stages - stage - 1, rows)
    order = [(True, row) for row in range(ahead)]
    for row in range(rows):
        if row + ahead < rows:
            order.append((True, row + ahead))
        order.append((False, row))
    return order
