"""Layouts of ranks: weights and memory of each stage against counts by hand, the seconds of a step against formulas, and
what `check --gpus` says."""

import dataclasses
import itertools
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import scaling
from tests.official import official_config
from util.__main__ import main as command
from util.config import Config
from util.cost import choose_layout, layouts, memory
from util.cost.activations import Divided, kept_by
from util.cost.choose_layout import Search
from util.cost.flops import training_flops
from util.cost.layouts import Shape, Weights, cut_stages, in_flight, stage_forecast
from util.cost.links import Hardware
from util.cost.settings import GIB
from util.cost.step_time import Course, pipeline_seconds, step_seconds
from util.cost.work import Workload, typical
from util.dataset import Size
from util.steps import deal
from util.vision import Grid

ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16

# 72B by hand, of the published config: width 8192, 80 layers, 8 of 64 heads have keys and values, inner width 29568
ATTENTION = 8192 * 8192 + 8192 + 2 * (8192 * 1024 + 1024) + 8192 * 8192
MLP = 3 * 8192 * 29568
LAYER = ATTENTION + MLP + 2 * 8192
VOCABULARY = 152064 * 8192
QKV = 1280 * 3840 + 3840
BLOCK = 2 * 2 * 1280 + QKV + 1280 * 1280 + 1280 + 2 * 1280 * 5120 + 5120 + 1280
PATCHES = 1176 * 1280
MERGER = 2 * 1280 + 5120 * 5120 + 5120 + 5120 * 8192 + 8192
TOTAL = 80 * LAYER + 2 * VOCABULARY + 8192 + 32 * BLOCK + PATCHES + MERGER


@cache
def weights_of(size: str) -> Weights:
    return Weights.of(official_config(size))


def work_of(sizes: list[Size], size: str = "72b", **changes) -> Workload:
    config = Config(global_batch_size=len(sizes), **changes)
    return Workload.of_sizes(sizes, config, official_config(size), "samples of a test")


TEXT = Size(tokens=16384, supervised=1000, grids=[])
PICTURE = Size(tokens=1480, supervised=100, grids=[Grid(1, 64, 80)])


# ---- weights --------------------------------------------------------------------------------------------------------


def test_parameters_of_72b_are_those_published():
    counts = weights_of("72b").stage(0, (80,)).counts()
    assert TOTAL == 73_405_560_320, "what the hub says of Qwen2-VL-72B-Instruct: 73.4 B"
    assert sum(counts[part] for part in ("vision", "merger", "language_model")) == TOTAL
    assert counts["vision"] == 32 * BLOCK + PATCHES
    assert counts["merger"] == MERGER
    assert (counts["block"], counts["layer"]) == (BLOCK, LAYER)
    assert counts["all_layers"] == 80 * LAYER + 32 * BLOCK


@pytest.mark.parametrize("size", ["2b", "7b"])
def test_counts_are_those_of_the_whole_model(size):
    model_config = official_config(size)
    counts = weights_of(size).stage(0, (28,)).counts()
    assert counts == {name: number for name, number in memory.count_parameters(model_config, Config()).items()
                      if name != "adapters"}  # fmt: skip


def test_parameters_of_stages_and_tensor_ranks():
    cut = (17, 21, 21, 21)
    stages = [weights_of("72b").stage(number, cut) for number in range(4)]
    totals = [sum(stage.counts()[part] for part in ("vision", "merger", "language_model")) for stage in stages]
    assert totals[0] == 17 * LAYER + VOCABULARY + 32 * BLOCK + PATCHES + MERGER
    assert totals[1] == totals[2] == 21 * LAYER
    assert totals[3] == 21 * LAYER + VOCABULARY + 8192
    assert sum(totals) == TOTAL

    # of 8 tensor ranks: norms, and biases that are added after a sum, are whole; so is the tower's fused qkv
    layer = (ATTENTION + MLP) // 8 + 2 * 8192
    assert weights_of("72b").stage(1, cut, tensor=8).counts()["language_model"] == 21 * layer
    block = 2 * 2 * 1280 + QKV + 1280 * 1280 // 8 + 1280 + (1280 * 5120 + 5120 + 5120 * 1280) // 8 + 1280
    assert weights_of("72b").stage(0, cut, tensor=8).counts()["vision"] == 32 * block + PATCHES


def test_a_tied_embedding_is_on_the_first_and_on_the_last_stage():
    cut = (10, 18)
    first, last = (weights_of("2b").stage(number, cut).counts()["language_model"] for number in range(2))
    merger = 2 * 1280 + 5120 * 5120 + 5120 + 5120 * 1536 + 1536
    assert first + last == 2_208_985_600 - 32 * BLOCK - PATCHES - merger + 151_936 * 1536


def test_layers_are_cut_so_that_the_costliest_stage_costs_least():
    assert cut_stages(28, 4, before=0, layer=1, after=0) == (7, 7, 7, 7)
    assert cut_stages(28, 4, before=4, layer=1, after=0) == (4, 8, 8, 8)
    assert cut_stages(28, 4, before=74, layer=1, after=0) == (1, 9, 9, 9), "a tower that is more than all layers"
    for depth, stages, before, after in itertools.product((5, 8), (2, 3), (0.0, 2.5, 9.0), (0.0, 1.5)):
        cuts = [cut for cut in itertools.product(range(1, depth + 1), repeat=stages) if sum(cut) == depth]

        def slowest(cut: tuple[int, ...], before=before, after=after) -> float:
            return max(cut[0] + before, *cut[1:-1], cut[-1] + after)

        assert slowest(cut_stages(depth, stages, before, 1, after)) == min(map(slowest, cuts))
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 stages"):
        cut_stages(3, 4, 0, 1, 0)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("sharding", ["full", "gradients", "optimizer", "none"])
@pytest.mark.parametrize("frozen", [[], ["vision"]])
def test_data_alone_is_forecast_as_a_run_is(checkpointing, sharding, frozen):
    model_config = official_config("2b")
    config = Config(freeze=frozen, sharding=sharding, activation_checkpointing=checkpointing)
    work = work_of([PICTURE] * 8 + [TEXT] * 8, "2b", freeze=frozen)
    group = 1 if sharding == "none" else 8
    shape = Shape(data=8, sharding=sharding, group=group, checkpointing=checkpointing, rows=2)
    rows = work.rows(8, 2)
    found = stage_forecast(model_config, config, BF16, shape, 0, (28,), weights_of("2b"), rows)
    counts = memory.count_parameters(model_config, config)
    loads = [(16384, 0, 1000), (1480, 64 * 80, 100)]
    if sharding != "none":  # a lone process keeps its weights in another way
        expected = memory.forecast(model_config, counts, config, BF16, loads, shards=8, passes=2)
        assert found == expected
        of_run = layouts.run_forecast(model_config, config, BF16, shape, (28,), np.array(loads))
        assert of_run == (0, expected), "as the plan of a run may ask"
    else:
        assert found["weights"] == 4 * 2_208_985_600
        layer = 2 * 1536 * 1536 + 1536 + 2 * (256 * 1536 + 256) + 3 * 8960 * 1536 + 2 * 1536
        through = layer if checkpointing == "full" else 0  # most is there in the backward pass of the layer before
        assert found["copies at work"] == 2 * (2_208_985_600 - through)


def test_states_of_a_rank_by_hand():
    """Stage 2 of 4, 8 tensor ranks, 4 ranks that share these weights: 16 bytes for each parameter there."""
    cut, layer = (17, 21, 21, 21), (ATTENTION + MLP) // 8 + 2 * 8192
    shape = Shape(data=4, pipeline=4, tensor=8, group=4, rows=8)
    rows = work_of([TEXT] * 32).rows(4, 8)
    needs = stage_forecast(official_config("72b"), Config(), BF16, shape, 1, cut, weights_of("72b"), rows)
    own = 21 * layer
    assert needs["weights"] == needs["gradients"] == 4 * own / 4
    assert needs["moments"] == 8 * own / 4
    assert needs["copies at work"] == 2 * 2 * layer, "it has no embedding and no head"
    assert needs["logits"] == 0


def test_a_stage_keeps_as_many_rows_as_there_are_stages_to_the_last():
    """Under full checkpointing a row leaves the input of each layer: 2 bytes x 16,384 tokens x 8,192, on 8 ranks. Most
    is there when the last layer is through, whose gradients are being reduced, and the one before is made anew."""
    cut = (20, 20, 20, 20)
    shape = Shape(data=1, pipeline=4, tensor=8, group=1, checkpointing="full", rows=8)
    rows = work_of([TEXT] * 8).rows(1, 8)
    for stage, flying in enumerate((4, 3, 2, 1)):
        assert in_flight(stage, 4, 8) == flying
        needs = stage_forecast(official_config("72b"), Config(), BF16, shape, stage, cut, weights_of("72b"), rows)
        kept = (flying * 20 - 1) * 2 * 16384 * 8192 / 8
        # beside it one layer's activations, made anew: the residual; queries to mixed values; the MLP; statistics; and
        # what products read, twice, of which each rank has all rows
        of_a_layer = 2 * 16384 * (8192 + 2 * 8192 + 2 * 1024 + 4 * 29568) / 8 + 4 * 16384 * 64 / 8
        of_a_layer += 2 * 16384 * 2 * 8192
        assert needs["activations"] == pytest.approx(kept + of_a_layer, rel=1e-3)
    assert in_flight(0, 4, 2) == 2
    loads = np.array([[16384, 0, 1000]])
    stage, needs = layouts.run_forecast(official_config("72b"), Config(), BF16, shape, cut, loads)
    assert stage == 0
    assert needs["activations"] == pytest.approx(79 * 2 * 16384 * 8192 / 8 + of_a_layer, rel=1e-3)


def test_logits_are_of_a_part_of_the_vocabulary_and_on_the_last_stage_alone():
    """1,000 supervised tokens, three numbers in fp32 for each logit."""
    for is_last, tensor, vocabulary in ((True, 1, 152064), (True, 8, 19008), (False, 8, 0)):
        own = layouts.config_of_stage(official_config("72b"), 20, is_last, tensor)
        kept = kept_by(own, Config(), BF16, (16384, 0, 1000), divided=Divided(tensor, tensor))
        assert kept.logits == 1000 * vocabulary * 3 * 4


def test_context_ranks_keep_a_part_of_each_row_and_tensor_ranks_of_each_layer():
    """Of rows so long that nothing beside their activations decides when most is there."""
    long = dataclasses.replace(TEXT, tokens=8 * 16384)

    def activations(**axes) -> float:
        shape = Shape(checkpointing="selective", group=axes.get("context", 1), **axes)
        rows = work_of([long]).rows(1, 1)
        needs = stage_forecast(official_config("72b"), Config(), BF16, shape, 0, (80,), weights_of("72b"), rows)
        return needs["activations"]

    assert activations(context=8) == pytest.approx(activations() / 8, rel=0.02)
    # of one layer, made anew, all rows that its products read twice
    gathered = 2 * 2 * long.tokens * 8192 * 7 / 8
    assert activations(tensor=8) == pytest.approx(activations() / 8 + gathered, rel=0.02)


def test_an_hour_of_video_fits_8_gpus_of_80_gib_in_7b():
    """The target of context parallelism: 131,072 visual tokens, 16,384 on each of 8 ranks."""
    grid = Grid(384, 36, 38)
    assert grid.tokens > 131_072
    work = work_of([Size(grid.tokens + 200, 100, [grid])], "7b")
    shape = Shape(context=8, group=8, checkpointing="full")
    needs = stage_forecast(official_config("7b"), Config(), BF16, shape, 0, (28,), weights_of("7b"), work.rows(1, 1))
    assert sum(needs.values()) < 0.9 * 80 * GIB
    alone = dataclasses.replace(shape, context=1, data=8)
    needs = stage_forecast(official_config("7b"), Config(), BF16, alone, 0, (28,), weights_of("7b"), work.rows(1, 1))
    assert sum(needs.values()) > 80 * GIB


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_samples_are_dealt_as_the_loop_deals_them():
    work = typical(Config(global_batch_size=48), official_config("2b"))
    hands = deal(work.training, 8)
    rows = work.rows(8, 3)
    for step in range(len(work.training)):
        for rank in range(8):
            own = hands[step] == rank
            assert rows.tokens[8 * step + rank].sum() == work.columns.tokens[step][own].sum()
            assert rows.training[8 * step + rank].sum() == pytest.approx(work.training[step][own].sum())
    assert rows.largest.max() == work.largest.max()


# ---- seconds --------------------------------------------------------------------------------------------------------


def seconds(
    work: Workload, shape: Shape, size: str = "72b", cut: tuple[int, ...] | None = None, is_compiled=True, **hardware
):
    model_config = official_config(size)
    layer_count = model_config.text_config.num_hidden_layers
    course = Course(
        shape,
        cut or (layer_count,),
        weights_of(size),
        model_config,
        Config(),
        dataclasses.replace(Hardware(), **hardware),
        is_compiled,
    )
    return step_seconds(course, work)


SLOW = {"nvlink": 1e6, "link_efficiency": 1.0}  # bytes per second: beside it no latency counts


def test_tensor_ranks_send_two_all_reduces_a_layer_and_pass():
    """16,384 tokens of 72B on 8 ranks: 150 GB from each. Each all-reduce is a gather and a reduction of rows here, of
    7 / 8 of them; at the ends of the layers there are two more gathers, and an all-reduce at the embedding."""
    found = seconds(work_of([TEXT]), Shape(tensor=8), **SLOW).parts["tensor"] * 1e6
    once = (7 / 8) * 16384 * 8192 * 2
    by_hand = (80 * 2 * 2 * 2 + 2 + 2) * once
    assert found == pytest.approx(by_hand, rel=1e-3)
    assert by_hand == pytest.approx(150e9, rel=0.02)
    full = Shape(tensor=8, checkpointing="full")
    again = seconds(work_of([TEXT]), full, **SLOW).parts["tensor"] * 1e6
    assert again == pytest.approx(by_hand + 80 * 3 * once, rel=1e-3), "without the sum after a layer's last product"
    selective = Shape(tensor=8, checkpointing="selective")
    for is_compiled, more in ((True, 0), (False, 80 * 2 * once)):
        again = seconds(work_of([TEXT]), selective, is_compiled=is_compiled, **SLOW).parts["tensor"] * 1e6
        assert again == pytest.approx(by_hand + more, rel=1e-3), "sums are kept, gathered rows in graphs alone"


def test_context_ranks_send_all_to_alls_around_attention():
    """16,384 tokens of 72B on 8 ranks: 10.6 GB from each. Queries, keys and values there, what was attended back."""
    found = seconds(work_of([TEXT]), Shape(context=8, group=8), **SLOW).parts["context"] * 1e6
    by_hand = 80 * 2 * (7 / 8) * (16384 / 8) * 2 * (8192 + 1024 + 1024 + 8192)
    assert found == pytest.approx(by_hand, rel=1e-3)
    assert by_hand == pytest.approx(10.6e9, rel=0.01)
    for checkpointing, is_compiled, times in (("full", True, 3), ("selective", True, 2), ("selective", False, 3)):
        shape = Shape(context=8, group=8, checkpointing=checkpointing)
        again = seconds(work_of([TEXT]), shape, is_compiled=is_compiled, **SLOW).parts["context"] * 1e6
        assert again == pytest.approx(by_hand * times / 2, rel=1e-3)


def test_queries_hide_behind_the_products_of_keys_and_values():
    """16,384 tokens of 72B on 8 ranks of a machine, 80 layers. Queries travel for 0.09 ms beside 0.17 ms of products,
    and twice as many in the backward pass, so that keys, values and what was attended are left. On links of a tenth of
    the speed the products are shorter, and that much of the queries is hidden."""
    shape = Shape(context=8, group=8)
    tokens = 16384 / 8

    def travels(elements: float, bandwidth: float) -> float:
        return 8.4e-6 + 3.4e-6 + 7 / 8 * 2 * elements / bandwidth

    products = 2 * tokens * 8192 * (1024 + 1024) / (0.4 * 989e12)
    queries, others = tokens * 8192, tokens * (1024 + 1024)
    assert travels(queries, 360e9) < products < 2 * products
    found = seconds(work_of([TEXT]), shape).parts["context"]
    assert found == pytest.approx(80 * 2 * (travels(others, 360e9) + travels(queries, 360e9)), rel=1e-6)
    assert travels(queries, 36e9) > 2 * products
    found = seconds(work_of([TEXT]), shape, link_efficiency=0.08).parts["context"]
    sent = 80 * 2 * (travels(others, 36e9) + 2 * travels(queries, 36e9))
    assert found == pytest.approx(sent - 80 * 3 * products, rel=1e-6)
    again = seconds(work_of([TEXT]), dataclasses.replace(shape, checkpointing="full"), link_efficiency=0.08)
    assert again.parts["context"] == pytest.approx(sent * 3 / 2 - 80 * 4 * products, rel=1e-6)


def test_where_ranks_do_not_divide_the_heads_some_have_one_more():
    """The 28 heads of 7B on 8 ranks: 3 or 4 each, and each reads one key-value head. There go 28 + 8 + 8 heads of a
    rank's tokens, back come 4 heads of all tokens; and of attention, 200,704 s^2 FLOPs, the fullest rank has 4 / 28."""
    shape = Shape(context=8, group=8)
    parts = seconds(work_of([TEXT], "7b"), shape, "7b", **SLOW).parts
    sent = (7 / 8) * 128 * 2 * (16384 / 8 * (28 + 8 + 8) + 16384 * 4)
    assert parts["context"] * 1e6 == pytest.approx(28 * 2 * sent, rel=1e-3)
    more = 3 * 200_704 * 16384**2 * (4 / 28 - 1 / 8) / (989e12 * 0.4)
    assert parts["uneven ranks"] == pytest.approx(more, rel=1e-6)


@pytest.mark.parametrize(("rows", "stages"), [(1, 1), (1, 4), (4, 4), (8, 4), (32, 8)])
def test_of_equal_rows_the_bubble_is_that_of_the_formula(rows, stages):
    forward, backward = [[1.0] * stages] * rows, [[2.0] * stages] * rows
    whole = pipeline_seconds(forward, backward)
    assert whole == 3.0 * (rows + stages - 1)
    assert (whole - 3.0 * rows) / whole == pytest.approx((stages - 1) / (rows + stages - 1))


def test_unequal_rows_by_hand():
    """Two stages, rows of 1 and 3 seconds forward and as long back. Stage 1 begins at 1 and goes through the first row
    at once, until 3; the second row arrives there at 4, as stage 0 works on it ahead of the first one's backward pass:
    7, and back at 10; stage 0 then needs 3 more."""
    assert pipeline_seconds([[1.0, 1.0], [3.0, 3.0]], [[1.0, 1.0], [3.0, 3.0]]) == 13.0


@pytest.mark.parametrize(("sharding", "group"), [("full", 16), ("full", 8), ("gradients", 16), ("none", 1)])
def test_data_alone_takes_what_the_other_tables_say(sharding, group):
    """The formula of benchmarks/scaling.py, which knows nothing of stages: a third of the work forward, even ranks."""
    work = work_of([PICTURE] * 64, "7b")
    shape = Shape(data=16, sharding=sharding, group=group, rows=2)
    flops = 4 * training_flops(official_config("7b"), [PICTURE], Config())
    expected = scaling.step_time(layouts.units_of(official_config("7b")), flops, sharding, 16, group, 2)
    found = seconds(work, shape, "7b")
    assert found.step == pytest.approx(expected["step"], rel=1e-9)
    assert found.parts["computation"] == pytest.approx(expected["compute"], rel=1e-9)
    assert found.parts["sharding"] == pytest.approx(expected["exposed"], rel=1e-9)


def test_the_parts_of_a_step_add_up_and_none_is_lost():
    work = typical(Config(global_batch_size=64), official_config("72b"))
    shape = Shape(data=2, pipeline=4, context=2, tensor=2, group=4, checkpointing="full", rows=8)
    found = seconds(work, shape, cut=(17, 21, 21, 21))
    even = work.work / 32 / (989e12 * 0.4)
    assert found.parts["computation"] == pytest.approx(even)
    assert all(value >= -1e-9 for value in found.parts.values()), found.parts
    assert {name for name, value in found.parts.items() if value > 0} == set(found.parts)
    assert found.parts["recomputation"] < even / 3 * 1.5


# ---- the choice -----------------------------------------------------------------------------------------------------


def search(size: str, gpus: int, samples: int = 32, memory: float = 80 * GIB, machine: int = 8, **typed) -> Search:
    config = Config(global_batch_size=samples, **typed)
    config.given = frozenset(typed)
    work = typical(config, official_config(size))
    return Search(official_config(size), config, work, gpus, Hardware(memory=memory, machine=machine))


@pytest.mark.parametrize(("size", "machine", "tensor"), [("2b", 8, {1, 2}), ("7b", 8, {1, 2, 4}),
                                                         ("72b", 8, {1, 2, 4, 8}), ("72b", 4, {1, 2, 4})])  # fmt: skip
def test_tensor_ranks_divide_the_key_value_heads_and_stay_within_a_machine(size, machine, tensor):
    found = list(search(size, 64, 512, machine=machine).layouts())
    assert {shape.tensor for shape in found} == tensor
    assert all(shape.ranks == 64 for shape in found)
    assert max(shape.pipeline for shape in found) == (16 if size != "72b" else 32), "at most its layers, and 32"
    few = list(search(size, 64, 4).layouts())
    assert max(shape.data for shape in few) == 4, "every place of the data axis has a sample"


def test_with_more_memory_the_choice_is_never_worse():
    scores = []
    for gib in (24, 32, 48, 80, 141):
        best = search("7b", 8, samples=16, memory=gib * GIB, sharding="full").run()[0]
        assert best.time, f"{gib} GiB"
        assert best.needed <= 0.9 * gib * GIB
        scores.append(best.score)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


def test_nothing_faster_is_left_out():
    """Against every layout with all of its settings."""
    few = search("7b", 4, samples=12)
    every = []
    for layout in few.layouts():
        for shape in few.settings_of(layout):
            every += few.candidates(shape)
    found = few.run()
    assert len(found) < len(every)
    assert found[0].score == min(one.score for one in every if one.time)


def test_2b_on_images_wants_nothing_but_data():
    work = work_of([PICTURE] * 64, "2b")
    best = Search(official_config("2b"), Config(global_batch_size=64), work, 8, Hardware(memory=80 * GIB)).run()[0]
    assert best.shape.data == 8


def test_typed_settings_stay():
    found = search("7b", 8, sharding="gradients", activation_checkpointing="full", context_parallel_size=2).run()
    assert {one.shape.sharding for one in found} <= {"gradients", "full"}, "where one rank has a weight, none is shared"
    assert {one.shape.checkpointing for one in found} == {"full"}
    assert {one.shape.context for one in found} == {2}


def test_adapters_are_laid_out_along_data_and_context_alone():
    shapes = list(search("7b", 8, lora_rank=16).layouts())
    assert {(shape.tensor, shape.pipeline) for shape in shapes} == {(1, 1)}


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """72B as a config alone, which is enough."""
    path = tmp_path_factory.mktemp("72b")
    official_config("72b").save_pretrained(path)
    return path


def said(capsys, *arguments) -> tuple[str, str, int]:
    code = 0
    try:
        command(["check", *map(str, arguments)])
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return captured.out, captured.err, code


def test_check_proposes_a_layout_and_says_why(folder, capsys):
    typed = ("--sharding", "full", "--activation_checkpointing", "selective")
    out, _, code = said(capsys, "--gpus", 64, "--gpu_memory", "80GiB", "--model", folder, *typed)
    assert code == 0
    assert "layout for 64 H100 of 80 GiB in 8 machines of 8: computed, not measured" in out
    facts = dict(re.findall(r"^  (\w[\w ]*?)  +(.+)$", out, re.MULTILINE))
    assert {"samples", "layout", "step", "spent on", "bound by", "memory", "by", "assumed"} <= facts.keys()
    assert "why not another one" in out
    assert re.search(r"pipeline \d.*: \d+\.\d\d s \(\+\d+\.\d%\): \w+", out), "a runner-up and what it loses"
    line = next(line for line in out.splitlines() if "./finetune_distributed.sh" in line)
    assert line.startswith("  NNODES=8 NODE_RANK=0 MASTER_ADDR=10.0.0.1 NPROC_PER_NODE=8")
    flags = dict(re.findall(r"--(\w+) ?([^-\s]\S*)?", line))
    assert flags["global_batch_size"] == "512"
    later = {"tensor_parallel_size", "pipeline_parallel_size", "sequence_parallel"}
    assert set(flags) <= {item.name for item in dataclasses.fields(Config)} | later
    sizes = dict(re.findall(r"(data|pipeline|context|tensor) (\d+)", facts["layout"]))
    assert np.prod([int(size) for size in sizes.values()]) == 64
    for axis in ("context", "tensor", "pipeline"):
        assert flags.get(f"{axis}_parallel_size") == sizes.get(axis)


def test_check_lays_out_the_data_that_it_looked_at(tiny_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out, _, code = said(capsys, "train_data/data.json", "--model", tiny_path, "--gpus", 2, "--global_batch_size", 8)
    assert code == 0
    assert "training data" in out
    assert "8 a step, " in out
    assert "of train_data/data.json" in out
    assert "\n  assumed" not in out, "the batch was typed"
    assert "--data train_data/data.json" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", 12], "--gpus 12: must be at most the 8 of a machine, or whole machines of 8"),
        (["--gpus", 0], "--gpus 0: must be at least 1"),
        (["--gpu_memory", "80GiB"], "--gpu_memory 80GiB needs --gpus"),
        (["--gpus", 8, "--gpu_memory", "much"], "--gpu_memory much: must be a size above 0 such as 80GiB"),
        (["--gpus", 8, "--dtype", "float32"], "--gpus counts in bfloat16"),
        (["--gpus", 8, "--optimizer", "adamw_8bit"], "--optimizer adamw_8bit runs on one GPU alone"),
        (["--gpus", 8, "--gpu_memory", "24GiB", "--activation_checkpointing", "full", "--sharding", "full"],
         "no layout of 8 GPUs fits: the nearest, "),
        (["--gpus", 64, "--context_parallel_size", 3], "no layout of 64 GPUs is left"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_message(arguments, words, folder, capsys):
    _, err, code = said(capsys, "--model", folder, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.strip() and "layouts:" not in line]) == 1


# ---- the table of docs/scaling.md -----------------------------------------------------------------------------------


CASES = [
    case if case == ("2b", "8 a GPU", 8) else pytest.param(*case, marks=pytest.mark.slow) for case in scaling.LAYOUTS
]


@pytest.mark.parametrize(("size", "samples", "gpus"), CASES)
def test_the_results_are_what_is_computed(size, samples, gpus):
    import json

    rows = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())["rows"]["layouts"]
    stored = next(row for row in rows if (row["model"], row["samples"], row["gpus"]) == (size, samples, gpus))
    assert scaling.significant(scaling.layout_row(size, samples, gpus, Hardware())) == stored


def test_flags_say_the_layout():
    shape = Shape(data=4, pipeline=2, tensor=2, sharding="optimizer", group=2, checkpointing="selective", rows=4)
    candidate = choose_layout.Candidate(shape, (14, 14), memory.Forecast(), 0, 20481)
    assert choose_layout.flags_of(candidate, Config(global_batch_size=64)) == {
        "global_batch_size": 64, "max_tokens": 20736, "tensor_parallel_size": 2, "pipeline_parallel_size": 2,
        "sequence_parallel": "", "sharding": "optimizer", "shard_group_size": 2, "activation_checkpointing": "selective",
    }  # fmt: skip
