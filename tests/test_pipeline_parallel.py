"""--pipeline_parallel_size on 2, 3 and 4 real processes (gloo, CPU): the same losses and weights as finetune.py.

The cut into stages, the rows and the schedule are compared with what is written by hand here.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

import finetune
from tests import runs
from tests.runs import metrics, weights
from tests.test_distributed import ROOT, gap, same, settings, torchrun
from util.command_line import UserError
from util.config import Config
from util.cost import stages
from util.model import load_config
from util.parallel import pipeline
from util.parallel.layout import Layout
from util.publish.export import export
from util.steps import even_rows

SCRIPT = "tests/pipeline_runs.py"
EVALUATED = {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_every": 2}

# ---- the schedule ---------------------------------------------------------------------------------------------------


class Line:
    """A stage's model that notes what it does, and takes one unit of time forward and two backward."""

    def __init__(self, index: int, count: int) -> None:
        self.pipe = pipeline.Pipe(list(range(count)), index, None, None, None)
        self.pixel_scale = torch.zeros(1)
        self.done: list[tuple[str, int]] = []


def order_of(index: int, count: int, rows: int, monkeypatch) -> list[tuple[str, int]]:
    """The passes of a stage as the schedule calls them: ("F" or "B", number of the row)."""
    done: list[tuple[str, int]] = []

    class Noted(pipeline.StagePasses):
        def forward(self, batch):
            self.rows.append(batch)
            done.append(("F", batch))

        def backward(self):
            done.append(("B", self.rows.popleft()))

    line = Line(index, count)
    line.set_is_last_backward = line.room_for = lambda argument: None
    monkeypatch.setattr(pipeline, "StagePasses", Noted)
    pipeline.one_forward_one_backward(line, range(rows), 1.0, lambda is_last: None)
    return done


def picture(orders: list[list[tuple[str, int]]]) -> list[str]:
    """When each stage does what, `..` where it waits: a forward pass needs that of the stage before, a backward pass
    that of the stage after."""
    ends: dict[tuple, int] = {}
    lines = [[] for _ in orders]
    waiting = [list(order) for order in orders]
    while any(waiting):
        for stage, order in enumerate(waiting):
            if not order:
                continue
            kind, row = order[0]
            needed = (kind, stage - 1, row) if kind == "F" else (kind, stage + 1, row)
            if needed[1] in range(len(orders)) and needed not in ends:
                continue
            begin = max(len(lines[stage]), ends.get(needed, 0))
            lines[stage] += [".."] * (begin - len(lines[stage])) + [f"{kind}{row}"] * (1 if kind == "F" else 2)
            ends[kind, stage, row] = len(lines[stage])
            order.pop(0)
    length = max(map(len, lines))
    return [" ".join([*line, *[".."] * (length - len(line))]) for line in lines]


def test_the_schedule_is_the_picture_of_its_page(monkeypatch):
    """What the code calls, laid out in time, is drawn in the module's docstring and in docs/many_gpus.md."""
    orders = [order_of(stage, 3, 6, monkeypatch) for stage in range(3)]
    for stage, line in enumerate(picture(orders)):
        for text in (pipeline.__doc__, (ROOT / "docs" / "many_gpus.md").read_text()):
            assert f"stage {stage}   {line}\n" in text


@pytest.mark.parametrize(("count", "rows"), [(2, 1), (2, 4), (4, 3), (4, 9), (7, 2)])
def test_a_stage_holds_as_many_rows_as_there_are_stages_to_the_last(count, rows, monkeypatch):
    for stage in range(count):
        held, most = 0, 0
        order = order_of(stage, count, rows, monkeypatch)
        for kind, _ in order:
            held += 1 if kind == "F" else -1
            most = max(most, held)
        assert [row for kind, row in order if kind == "F"] == [row for kind, row in order if kind == "B"]
        assert (held, most) == (0, min(count - stage, rows))


# ---- rows and stages by hand ----------------------------------------------------------------------------------------


def rows_of(costs, tokens, least, max_tokens=100, micro_batch_size=None, hands=None, ranks=1):
    costs, tokens = np.array([costs], float), np.array([tokens])
    hands = np.zeros_like(tokens) if hands is None else np.array([hands])
    there = tokens > 0
    return even_rows(costs, tokens, there, hands, ranks, least, max_tokens, micro_batch_size)[0].tolist()


def test_rows_of_equal_cost_by_hand():
    assert rows_of([9, 7, 6, 5, 4, 1], [1] * 6, 3) == [0, 1, 2, 2, 1, 0], "each to the one that costs least so far"
    assert rows_of([9, 7, 6, 5, 4, 1], [60, 50, 60, 50, 30, 10], 3) == [0, 1, 2, 1, 2, 0], "where it has room"
    assert rows_of([5, 5, 5], [60, 60, 60], 2) == [0, 1, 2], "a further one, where none has room"
    assert rows_of([5, 4, 3, 2], [1] * 4, 2, micro_batch_size=1) == [0, 1, 2, 3]
    assert rows_of([5, 4], [1, 1], 4) == [0, 1], "the last ones stay empty"
    assert rows_of([5, 4, 3, 2], [1] * 4, 2, hands=[0, 1, 0, 1], ranks=2) == [0, 0, 1, 1], "each rank has its own"


def test_rows_are_complete_and_within_their_limits():
    generator = np.random.default_rng(0)
    for least in (2, 4, 8):
        tokens = generator.integers(1, 90, (5, 24))
        costs, hands = tokens**1.5, generator.integers(0, 2, (5, 24))
        rows = even_rows(costs, tokens, tokens > 0, hands, 2, least, 100, 5)
        for step in range(5):
            for hand in (0, 1):
                own = hands[step] == hand
                loads = np.bincount(rows[step, own], tokens[step, own])
                assert loads.max() <= 100
                assert np.bincount(rows[step, own]).max() <= 5
                assert (loads > 0).all(), "no row between others is empty"


class Work:
    """Sizes of which only the work is asked for."""


@pytest.mark.parametrize(
    ("work", "counts"),
    [
        ({"vision": 0, "merger": 0, "language_model": 28, "head": 0}, [7, 7, 7, 7]),
        ({"vision": 3, "merger": 1, "language_model": 28, "head": 2}, [4, 8, 9, 7]),
        ({"vision": 70, "merger": 4, "language_model": 28, "head": 0}, [1, 9, 9, 9]),  # 2B on one large image
    ],
)
def test_stages_are_cut_by_work(work, counts, monkeypatch, tiny_path):
    monkeypatch.setattr(stages.flops, "epoch_work", lambda *arguments: work)
    model_config = load_config(str(tiny_path))
    model_config.text_config.num_hidden_layers = 28
    sizes = type("Sizes", (), {"usable": None})()
    found = stages.stages_of(model_config, Config(device="cpu", pipeline_parallel_size=4), sizes)
    assert [len(stage.layers) for stage in found] == counts
    assert [layer for stage in found for layer in stage.layers] == list(range(28))
    assert sum(stage.share for stage in found) == pytest.approx(1)
    text = " ".join(stages.what_cannot_pay(model_config, Config(device="cpu"), sizes, found))
    assert ("SO MANY STAGES CANNOT PAY" in text) == (counts[0] == 1)
    if counts[0] == 1:  # 102 in all, of which 75 cannot be cut
        assert "worth 74 of the 28 layers" in text
        assert "more than 1.4 times as fast" in text


def test_the_layout_has_stages_outermost():
    layout = Layout.of(Config(device="cpu", pipeline_parallel_size=2, context_parallel_size=2), 8)
    assert (layout.data, layout.of_a_row, layout.of_a_weight) == (2, 4, 4)
    assert layout.pipelines() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.weight_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.row_groups() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert "through 2 stages" in layout.in_words()
    with pytest.raises(
        UserError, match=r"--pipeline_parallel_size 3 does not divide the 4 processes: start a multiple of 3"
    ):
        Layout.of(Config(device="cpu", pipeline_parallel_size=3), 4)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "--lora_rank 4 with --pipeline_parallel_size 2: adapters are not cut into stages"),
        ({"eval_samples": 3}, "--eval_samples 3 with --pipeline_parallel_size 2.*Give --eval_samples 0"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        Config(device="cpu", pipeline_parallel_size=2, **changes)


# ---- real processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """The showcase; a picture among texts, so that most rows and some steps have none; texts of equal length, so that
    no row is known by its length."""
    folder = tmp_path_factory.mktemp("data")
    showcase = ROOT / "train_data" / "data.json"
    picture = next(entry for entry in json.loads(showcase.read_text()) if entry["kind"] == "shape")
    item = next(item for item in picture["messages"][-2]["content"] if item["type"] == "image")
    item["image"] = str(showcase.parent / item["image"])

    def text(asked: str, answer: str, **more) -> dict:
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], **more}

    texts = [text(f"Say {n}", "x" * n, weight=n / 2) for n in range(1, 8)]
    equal = [text("Say it", letter) for letter in "bcdf"]
    (folder / "texts.json").write_text(json.dumps([picture, *texts]))
    (folder / "equal.json").write_text(json.dumps(equal))
    (folder / "tokens.txt").write_text("\n".join(["xx", "xxx", *(f"<place_{number}>" for number in range(40))]))
    names = ("texts.json", "equal.json", "tokens.txt")
    return {"showcase": showcase, **{Path(name).stem: folder / name for name in names}}


@pytest.fixture(scope="module")
def untied(tiny_path, tmp_path_factory) -> Path:
    """tiny with a head of its own, as 7B and 72B have."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_path)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.9)
    model.save_pretrained(folder)
    for file in Path(tiny_path).iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


TWO = {
    "optimizer, evaluated, saved": {
        **EVALUATED,
        "sharding": "optimizer",
        "save_every": 2,
        "max_steps": 4,
        "final": "last",
    },
    "texts": {"data": "texts", "global_batch_size": 3, "max_steps": 6, "sharding": "optimizer"},
    "untied, recomputed": {"model": "untied", "max_steps": 2, "activation_checkpointing": "full"},
}
TWO_SLOW = {
    "full": {"max_steps": 3},
    "frozen language model": {"data": "texts", "freeze": ["language_model"], "global_batch_size": 3, "max_steps": 6},
    "gradients, every row alone": {"sharding": "gradients", "micro_batch_size": 1, "max_steps": 3},
    "not sharded, few tokens": {"sharding": "none", "max_tokens": 800, "max_steps": 3},
    "frozen tower": {"freeze": ["vision", "merger"], "activation_checkpointing": "full", "max_steps": 3},
    "selective checkpointing": {"activation_checkpointing": "selective", "max_steps": 3, "sharding": "gradients"},
    "new tokens": {"data": "texts", "new_tokens": "tokens", "max_steps": 3},
}
THREE = {"three": {"pipeline_parallel_size": 3, "max_steps": 2, **EVALUATED}}
FOUR = {
    "two of two": {"data": "texts", "global_batch_size": 3, "max_steps": 6},
    "two of two parts": {"context_parallel_size": 2, "max_steps": 2},
    "two of two, optimizer": {"sharding": "optimizer", "max_steps": 4, "save_every": 2, "keep": 9},
    "two of two, replicas": {"sharding": "none", "max_steps": 3, "micro_batch_size": 1},
    "four": {"pipeline_parallel_size": 4, "max_steps": 3, "activation_checkpointing": "full"},
}
EQUAL = {"data": "equal", "micro_batch_size": 1, "global_batch_size": 4, "max_steps": 2, "max_grad_norm": 0.1}
FAULTS = {"tied gradient added twice": EQUAL}
SLOW_FAULTS = {
    "tied gradient not added": EQUAL,
    "tied gradient counted twice in the norm": EQUAL,
    "sent in the wrong order": EQUAL,
    "position of another row": {"max_steps": 2},  # with pictures: texts have the same positions
}
SAVED = {"max_steps": 4, "save_every": 2, "keep": 9}
STAGES = ("pipeline_parallel_size", "context_parallel_size")


def case(changes: dict, directory: Path, tiny_path: Path, untied: Path, data: dict[str, Path]) -> dict:
    changes = {"pipeline_parallel_size": 2, **changes}
    if "new_tokens" in changes:
        changes["new_tokens"] = str(data[changes["new_tokens"]])
    model = untied if changes.pop("model", "") == "untied" else tiny_path
    return settings(model, data[changes.pop("data", "showcase")], directory, **changes)


def planted(faults: dict[str, dict]) -> dict[str, dict]:
    return {fault: {**changes, "plant": fault} for fault, changes in faults.items()}


def alone(config: dict) -> dict:
    """The same run for one process."""
    return {name: value for name, value in config.items() if name not in (*STAGES, "plant")}


@pytest.fixture(scope="module")
def one(tiny_path, untied, data, tmp_path_factory):
    """Runs a case on one process, once; its directory."""
    folder, found = tmp_path_factory.mktemp("one"), {}

    def run(name: str, changes: dict) -> Path:
        if name not in found:
            config = alone(case(changes, folder / name, tiny_path, untied, data))
            found[name] = Path(finetune.train(Config(**config)))
        return found[name]

    return run


@pytest.fixture(scope="module")
def saved(one) -> Path:
    return one("saved", SAVED)


@pytest.fixture(scope="module")
def on_ranks(tiny_path, untied, data, tmp_path_factory):
    """A function (number of ranks, name of a folder, runs): trains all in one job, as starting one takes longer than
    training; the folder."""

    def run(ranks: int, name: str, runs_of: dict[str, dict]) -> Path:
        folder = tmp_path_factory.mktemp(name)
        configs = [case(changes, folder / name, tiny_path, untied, data) for name, changes in runs_of.items()]
        torchrun(ranks, configs, folder, SCRIPT)
        return folder

    return run


@pytest.fixture(scope="module")
def two(on_ranks, tmp_path_factory) -> Path:
    cache = {"freeze": ["vision"], "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    more = {"float32": {"dtype": "float32", "max_steps": 2}, "cached": cache, "equal": EQUAL}
    return on_ranks(2, "two", {**TWO, **more, **planted(FAULTS)})


@pytest.fixture(scope="module")
def slow_two(on_ranks, saved) -> Path:
    second = str(saved / "checkpoints" / "step_000002")
    more = {
        "bfloat16": {"dtype": "bfloat16", "max_steps": 4, **EVALUATED, "save_every": 2},
        "saved": SAVED,
        "from one": {**SAVED, "resume": second, "sharding": "gradients"},
    }
    return on_ranks(2, "slow_two", {**TWO_SLOW, **more, **planted(SLOW_FAULTS)})


@pytest.fixture(scope="module")
def three(on_ranks) -> Path:
    return on_ranks(3, "three", THREE)


@pytest.fixture(scope="module")
def four(on_ranks, slow_two) -> Path:
    third = {**SAVED, "resume": str(slow_two / "saved" / "checkpoints" / "step_000002"), "pipeline_parallel_size": 4}
    resumed = {"2 to 4": third, "2 to data": {**third, "pipeline_parallel_size": 1}}
    return on_ranks(4, "four", {**FOUR, **resumed})


def counted(run: Path, ranks: int) -> tuple[list[int], list[int]]:
    """By rank, the most rows whose activations it held, and how many samples it has read."""
    each_rank = [json.loads((run / f"counted_{rank}").read_text()) for rank in range(ranks)]
    return [most for most, _ in each_rank], [read for _, read in each_rank]


def same_evaluation(run: Path, reference: Path, changes: dict) -> None:
    if "eval_data" in changes:
        assert metrics(run, "eval_loss") == pytest.approx(metrics(reference, "eval_loss"), abs=1e-10)
        assert len(metrics(run, "eval_loss")) == changes["max_steps"] // 2


def equals_one_process(run: Path, reference: Path, changes: dict) -> None:
    same(run, reference)
    same_evaluation(run, reference, changes)
    held, read = counted(run, 2)
    assert held == [2, 1], "rows whose activations each stage held at most"
    assert read[0] > 0
    assert read[1] == 0, "the first stage alone reads"


@pytest.mark.parametrize("name", TWO)
def test_two_stages_equal_one_process(name, two, one):
    equals_one_process(two / name, one(name, TWO[name]), TWO[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_SLOW)
def test_more_on_two_stages_equals_one_process(name, slow_two, one):
    equals_one_process(slow_two / name, one(name, TWO_SLOW[name]), TWO_SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_stages_of_several_ranks_equal_one_process(name, four, one):
    changes = FOUR[name]
    same(four / name, one(name, changes))
    of_first = 4 // changes.get("pipeline_parallel_size", 2)
    _, read = counted(four / name, 4)
    assert min(read[:of_first]) > 0
    assert max(read[of_first:]) == 0, "the ranks of the first stage alone read"


@pytest.mark.slow
def test_three_stages_equal_one_process(three, one):
    """Three ranks: the shards of none are cut, so the last bits are those of one process, too."""
    same(three / "three", one("three", THREE["three"]))
    same_evaluation(three / "three", one("three", THREE["three"]), THREE["three"])
    assert counted(three / "three", 3)[0] == [3, 2, 1]


def test_two_stages_in_float32(two, one):
    reference = one("float32", {"dtype": "float32", "max_steps": 2})
    assert metrics(two / "float32") == pytest.approx(metrics(reference), abs=1e-5)


@pytest.mark.slow
def test_two_stages_in_bfloat16(slow_two, one):
    run, reference = slow_two / "bfloat16", one("bfloat16", {"dtype": "bfloat16", "max_steps": 4, **EVALUATED})
    for key in ("loss", "eval_loss"):
        assert metrics(run, key) == pytest.approx(metrics(reference, key), rel=2e-2), key
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.bfloat16}


def ends_alike(run: Path, saved: Path) -> None:
    assert gap(run, saved) < 1e-12, run.name
    assert [line["step"] for line in runs.log(run) if "loss" in line] == [3, 4], run.name


@pytest.mark.slow
def test_checkpoints_know_no_stages(saved, slow_two, tiny_path, data, tmp_path):
    """1 -> 2 and 2 -> 1 stages end where the uninterrupted run ends."""
    same(slow_two / "saved", saved)
    third = {**SAVED, "resume": str(slow_two / "saved" / "checkpoints" / "step_000002")}
    to_one = finetune.train(Config(**settings(tiny_path, data["showcase"], tmp_path / "to one", **third)))
    ends_alike(Path(to_one), saved)
    ends_alike(slow_two / "from one", saved)


@pytest.mark.slow
def test_checkpoints_of_stages_resume_on_four_ranks(saved, four):
    """2 -> 4 stages, and 2 stages -> 4 ranks with samples of their own."""
    ends_alike(four / "2 to 4", saved)
    ends_alike(four / "2 to data", saved)
    ours, theirs = (run / "generation_config.json" for run in (four / "2 to data", saved))
    assert ours.read_text() == theirs.read_text(), "that of the model that was trained, also without stages"


KEPT = "optimizer, evaluated, saved"


def test_a_checkpoint_of_stages_is_exported_as_the_final_model(two, tmp_path):
    export(two / KEPT / "checkpoints" / "step_000004", tmp_path / "out")
    ours, theirs = weights(tmp_path / "out"), weights(two / KEPT)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_saved_model_opens_in_transformers(two, one):
    """With all layers, although the rank that wrote it had some; its config is that which one process writes."""
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(two / KEPT, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert len(model.model.language_model.layers) == 4
    for name in ("config.json", "generation_config.json"):
        assert (two / KEPT / name).read_text() == (one(KEPT, TWO[KEPT]) / name).read_text(), name


def test_features_of_a_frozen_tower_are_refused(two):
    for rank in (0, 1):
        text = (two / "cached" / f"refused_{rank}").read_text()
        assert re.search(r"--cache_dir keeps .*through 2 stages.*leave --cache_dir out", text)


def test_rows_of_equal_length_equal_one_process(two, one):
    same(two / "equal", one("equal", EQUAL))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, two, one):
    """The same runs without it equal those of one process, in the tests above."""
    with pytest.raises(AssertionError):
        same(two / fault, one("equal", EQUAL))


@pytest.mark.slow
@pytest.mark.parametrize("fault", SLOW_FAULTS)
def test_more_planted_faults_are_seen(fault, slow_two, one):
    changes = SLOW_FAULTS[fault]
    with pytest.raises(AssertionError):
        same(slow_two / fault, one("equal" if changes is EQUAL else "two steps", changes))


@pytest.mark.slow
def test_compiled_layers_give_the_same(slow_two, tiny_path, untied, data, tmp_path):
    config = case({**TWO_SLOW["full"], "compile": "on"}, tmp_path / "run", tiny_path, untied, data)
    torchrun(2, [config], tmp_path)
    assert metrics(tmp_path / "run") == pytest.approx(metrics(slow_two / "full"), rel=1e-6)
