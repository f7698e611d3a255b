"""The start of a run: sizes kept from the last one, a plan that a resumed run compares, processes without work."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import finetune
from tests.runs import log, weights
from tests.samples import assistant, text, user
from util.command_line import UserError
from util.config import Config
from util.cost import measure
from util.cost.sizes import Finding, Sizes, Table
from util.data.settings import SampleSettings
from util.dataset import DataError, Examples, Samples, Size
from util.parallel import distributed
from util.plan import of_ranks
from util.steps import Dealing, Steps
from util.vision import Budget, Grid

LONG = 200  # tokens, --max_tokens of most runs here


def asking(name: str, answer: str = "A wave.") -> dict:
    return {"messages": [user([{"type": "image", "image": name}, text("?")]), assistant(answer)]}


def entries(numbers=range(6)) -> list[dict]:
    return [asking(f"{number}.png", "x" * (number + 1)) for number in numbers]


@pytest.fixture
def folder(tmp_path, picture, monkeypatch) -> Path:
    """Six small pictures and a large one; the current folder is another one, with a picture of its own."""
    here = tmp_path / "here"
    here.mkdir()
    Image.fromarray(picture(56, 84)).save(here / "elsewhere.png")
    monkeypatch.chdir(here)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(6):
        Image.fromarray(picture(56, 84, number)).save(data / f"{number}.png")
    Image.fromarray(picture(600, 800)).save(data / "large.jpg")
    return data


def write(folder: Path, rows: list, name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


# ---- sizes that are kept --------------------------------------------------------------------------------------------


@pytest.fixture
def measured(processor, tmp_path, monkeypatch):
    """Measure with sizes kept in a folder; return the sizes and which samples were looked at. They must be what they
    are without the folder."""
    looked: list[int] = []
    one = measure.Chunks.one
    monkeypatch.setattr(measure.Chunks, "one", lambda self, index: looked.append(index) or one(self, index))

    def run(
        *files: str, max_tokens=LONG, on_long="skip", keep_in=tmp_path / "kept", **budget
    ) -> tuple[Sizes, list[int]]:
        found = []
        for kept in (keep_in, None):
            looked.clear()
            samples = Samples(Examples(list(files), processor), processor, Budget(min_pixels=784, **budget))
            settings = SampleSettings(on_bad_sample="skip", on_long_sample=on_long)
            found.append((measure.measure(samples, max_tokens, settings, 0, kept), sorted(looked), samples))
        (sizes, seen, samples), (fresh, _, plain) = found
        assert list(sizes) == list(fresh)
        assert sizes.mark() == fresh.mark()
        assert sizes.left_out == fresh.left_out
        assert sizes.refusals(sizes.left_out) == fresh.refusals(fresh.left_out)
        assert samples.shrunk == plain.shrunk
        return sizes, seen

    return run


def test_a_second_start_reads_no_header(measured, folder):
    for on_long in ("skip", "shrink"):
        file = write(folder, [*entries(), asking("large.jpg")])
        sizes, seen = measured(file, on_long=on_long)
        assert seen == list(range(7))
        assert len(sizes.usable) == (7 if on_long == "shrink" else 6)
        assert measured(file, on_long=on_long)[1] == []


def test_what_changed_costs_itself_alone(measured, folder, picture):
    rows = [*entries(), asking("large.jpg")]
    file = write(folder, rows)
    measured(file)
    rows[3]["messages"][1]["content"] = "another answer"
    assert measured(write(folder, rows))[1] == [3], "an edited sample"
    rows.insert(2, asking("0.png", "new"))
    assert measured(write(folder, rows))[1] == [2], "an added sample"
    del rows[0]
    assert measured(write(folder, rows))[1] == [], "a sample taken out"
    Image.fromarray(picture(112, 84)).save(folder / "5.png")
    sizes, seen = measured(file)
    assert seen == [5], "an image of another size"
    assert sizes[5].grids == [Grid(1, 8, 6)]
    os.utime(folder / "5.png", (1, 1))
    assert measured(file)[1] == [5], "an image written again"
    other = write(folder, entries([1, 2]), "other.jsonl")
    assert measured(file, other)[1] == [7, 8], "a file more"
    assert measured(other, file)[1] == []
    as_list = folder / "list.json"
    as_list.write_text(json.dumps(rows))
    assert measured(str(as_list))[1] == list(range(7))
    assert measured(str(as_list))[1] == []


def test_other_settings_are_other_sizes(measured, folder):
    file = write(folder, [*entries(), asking("large.jpg")])
    measured(file)
    assert len(measured(file, max_pixels=3136)[1]) == 7
    assert len(measured(file, on_long="shrink")[1]) == 7
    assert len(measured(file, on_long="shrink", max_tokens=150)[1]) == 7
    for limit in (10, 60, 10_000):
        assert measured(file, max_tokens=limit)[1] == [] if limit > 10 else True, "a limit alone changes no size"


def test_a_bad_sample_is_looked_at_each_time(measured, folder):
    file = write(folder, [*entries(), asking("gone.png")])
    assert measured(file)[1] == list(range(7))
    assert measured(file)[1] == [6]
    (folder / "gone.png").write_bytes((folder / "0.png").read_bytes())
    sizes, seen = measured(file)
    assert (seen, len(sizes.usable)) == ([6], 7)
    assert measured(file)[1] == []
    (folder / "3.png").unlink()
    sizes, seen = measured(file)
    assert (seen, sizes.left_out) == ([3], {"no such file": 1})


def test_a_file_that_takes_the_place_of_another_is_seen(measured, folder, picture):
    """A path is looked for in the data file's folder first: one that appears there is what training will read."""
    file = write(folder, [asking("elsewhere.png")])
    assert measured(file)[1] == [0]
    assert measured(file)[1] == []
    Image.fromarray(picture(112, 112)).save(folder / "elsewhere.png")
    assert measured(file)[1] == [0]


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other"])
def test_a_damaged_file_of_sizes_is_not_used(measured, folder, tmp_path, damage):
    file = write(folder, entries())
    measured(file)
    (kept,) = (tmp_path / "kept").iterdir()
    content = bytearray(kept.read_bytes())
    if damage == "changed":
        place = content.index(np.load(kept)["tokens"].tobytes())
        content[place] ^= 1
    kept.write_bytes({"cut": content[:-200], "empty": b"", "changed": content, "other": b"PK nothing"}[damage])
    assert len(measured(file)[1]) == 6
    assert measured(file)[1] == [], "it is written anew"


def test_a_folder_that_cannot_be_written_is_done_without(measured, folder, capsys):
    file = write(folder, entries())
    (folder / "a_file").write_text("")
    for _ in range(2):
        assert len(measured(file, keep_in=folder / "a_file" / "sizes")[1]) == 6
    assert "the next start reads headers again" in capsys.readouterr().out


def test_columns_are_taken_and_joined_as_lists_are():
    rng = np.random.default_rng(0)
    sizes = [Size(int(n), 1, [Grid(1, 2, int(k)) for k in range(n % 4)]) for n in rng.integers(1, 50, 60)]
    table, _ = Table.of(Finding(size, files=b"x" * size.tokens) for size in sizes)
    for rows in (rng.permutation(60), np.array([], dtype=int), np.array([7, 7, 0])):
        taken = table.take(rows)
        assert list(Sizes(taken)) == [sizes[row] for row in rows]
        assert np.diff(taken.lists["files"][0], prepend=0).tolist() == [sizes[row].tokens for row in rows]
    assert list(Sizes(Table.joined([table, table.take(np.array([3]))]))) == [*sizes, sizes[3]]
    columns = Sizes(table).columns()
    for number, size in enumerate(sizes):
        of_one = (size.tokens, size.supervised, size.patches, size.squares, size.window_squares)
        assert tuple(column[number] for column in columns) == of_one


# ---- a resumed run --------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tiny_path, folder, tmp_path):
    """Train tiny on all rows of a data file in small steps; return the run directory."""

    def run(data: str, **changes) -> Path:
        settings = {"model": str(tiny_path), "data": [data], "device": "cpu", "dtype": "float32", "epochs": 2,
                    "global_batch_size": 2, "learning_rate": 1e-3, "num_workers": 0, "max_tokens": LONG, "keep": 99,
                    "min_pixels": 784, "save_every": 2, "output_dir": str(tmp_path / "run")}  # fmt: skip
        return Path(finetune.train(Config(**{**settings, **changes})))

    return run


def test_one_more_bad_sample_is_named_and_moves_no_other(train, folder, tmp_path):
    data = write(folder, entries())
    before = log(train(data, on_bad_sample="skip"))
    (folder / "2.png").unlink()
    again = {"on_bad_sample": "skip", "resume": str(tmp_path / "run" / "checkpoints" / "step_000002")}
    with pytest.raises(UserError, match="another plan of the data") as error:
        train(data, **again)
    assert "samples left out: 0 -> 1" in str(error.value)
    assert f"newly: {data}, sample 2" in str(error.value)
    after = log(train(data, resume_anyway=True, **again))
    gone = [line["samples"] - other["samples"] for line, other in zip(before, after, strict=True)]
    assert set(gone) == {0, 1}
    assert gone[:2] == [0, 0], "these steps were done"
    for line, other, missing in zip(before, after, gone, strict=True):
        if not missing:
            assert line["supervised_tokens"] == other["supervised_tokens"], "a step has the samples it had"


def test_an_image_of_another_size_is_named(train, folder, picture, tmp_path):
    data = write(folder, entries())
    train(data)
    Image.fromarray(picture(112, 84)).save(folder / "5.png")
    resume = str(tmp_path / "run" / "checkpoints" / "step_000002")
    with pytest.raises(UserError, match="images or videos have changed"):
        train(data, resume=resume)


@pytest.mark.parametrize("policy", ["stop", "skip", "shrink"])
def test_max_tokens_is_harmless_where_it_leaves_the_data_alone(policy, train, folder, tmp_path):
    data = write(folder, entries() if policy == "stop" else [*entries(), asking("large.jpg")])
    train(data, on_long_sample=policy)
    again = {
        "on_long_sample": policy,
        "max_tokens": 150,
        "resume": str(tmp_path / "run" / "checkpoints" / "step_000002"),
    }
    if policy == "stop":
        train(data, **again)
        return
    with pytest.raises(UserError, match=rf"--max_tokens: {LONG} -> 150"):
        train(data, **again)


def test_a_run_that_stopped_for_a_bad_sample_goes_on_without_it(train, folder, tmp_path):
    """--on_bad_sample may change: what it leaves out is compared by itself."""
    data = write(folder, entries())
    train(data)
    train(data, on_bad_sample="skip", resume=str(tmp_path / "run" / "checkpoints" / "step_000002"))


def test_steps_without_a_sample_change_nothing_and_do_not_end_the_run(train, folder, tiny_path, capsys):
    """Three steps in a row whose loss is no number end a run; steps of which all samples are left out do not."""
    data = write(folder, [asking(f"gone{number}.png") for number in range(8)] + entries([0]))
    run = train(data, on_bad_sample="skip", global_batch_size=1, epochs=1)
    lines = log(run)
    assert sorted(line["samples"] for line in lines) == [0] * 8 + [1]
    said = capsys.readouterr().out
    assert "8 steps have none and change nothing" in said
    assert "this update is left out" not in said
    moved = [not torch.equal(w, load_file(tiny_path / "model.safetensors")[name]) for name, w in weights(run).items()]
    assert any(moved), "the one sample was trained on"


# ---- processes without work -----------------------------------------------------------------------------------------


def steps_on(ranks: int, count: int, size: int) -> Steps:
    sizes = Sizes.of([Finding(Size(10 + number, 1, [])) for number in range(count)])
    config = Config(global_batch_size=size, epochs=1)
    dealing = Dealing(sizes.tokens.astype(float), 0, ranks)
    return Steps(sizes, lambda epoch: np.arange(count), count, 1, None, config, dealing)


def refused(ranks: int, count: int, size: int) -> str:
    steps, world = steps_on(ranks, count, size), distributed.World(0, ranks, torch.device("cpu"))
    with pytest.raises(UserError) as error:
        distributed.refuse_idle_ranks(steps, steps.config, world)
    return str(error.value)


def test_a_process_that_would_never_have_a_sample_is_refused():
    said = refused(8, 100, 5)
    assert said.startswith("3 of the 8 processes would never have a sample: no step has more than 5")
    assert "give at least --global_batch_size 8, or start at most 5" in said
    said = refused(4, 3, 8)
    assert said.startswith("1 of the 4 processes")
    assert "--global_batch_size 4" not in said, "of three samples no batch of four can be made"
    for ranks, count, size in ((1, 3, 8), (4, 4, 8), (8, 100, 8)):
        steps = steps_on(ranks, count, size)
        distributed.refuse_idle_ranks(steps, steps.config, distributed.World(0, ranks, torch.device("cpu")))


def test_steps_in_which_a_process_has_nothing_are_counted():
    assert of_ranks("training", steps_on(4, 17, 8).survey) == "training: without a sample in 3 of 12 steps x processes"
    assert of_ranks("evaluation", steps_on(4, 3, 8).survey).endswith("1 of 4 steps x processes, 1 of 4 always")
    assert of_ranks("training", steps_on(4, 16, 8).survey) == of_ranks("training", steps_on(1, 17, 8).survey) == ""


# ---- answers in training --------------------------------------------------------------------------------------------


def test_answers_in_training_keep_to_max_tokens_and_to_what_was_shrunk(train, folder, monkeypatch):
    from util.results import evaluate
    from util.results.evaluate import Answerer

    rows, padded, read, generate = [], [], Answerer.read, Answerer.generate

    def noted_read(self, pairs, most):
        rows.append(sum(len(whole.encoded.input_ids) - 1 + whole.media[0].grid.tokens for _, whole in pairs))
        return read(self, pairs, most)

    def noted_generate(self, prompts, most):
        padded.append((len(prompts), len(prompts) * (most + max(len(embeddings) for embeddings, _ in prompts))))
        return generate(self, prompts, most)

    monkeypatch.setattr(Answerer, "read", noted_read)
    monkeypatch.setattr(Answerer, "generate", noted_generate)
    monkeypatch.setattr(evaluate, "MOST_NEW_TOKENS", 4)
    held_out = write(folder, [*entries(), asking("large.jpg"), *entries(), asking("large.jpg", "B")], "held_out.jsonl")
    run = train(write(folder, entries()), eval_data=[held_out], eval_samples=99, max_steps=1, on_long_sample="shrink")
    (evaluation,) = [line for line in log(run) if "eval_loss" in line]
    assert evaluation["eval_questions"] == 14
    assert max(rows) <= LONG, f"rows of {rows} tokens under --max_tokens {LONG}"
    assert len(rows) > 3
    assert all(size <= LONG or count == 1 for count, size in padded), padded
    assert any(count > 1 for count, _ in padded), "short ones are still answered together"


def test_refused_data_is_still_kept_for_the_next_start(measured, folder, processor, tmp_path):
    """What was read before a start is refused is not read again when the one bad sample is mended."""
    file = write(folder, [*entries(), asking("gone.png")])
    samples = Samples(Examples([file], processor), processor, Budget(min_pixels=784))
    with pytest.raises(DataError, match=r"gone\.png"):
        measure.measure(samples, LONG, None, 0, tmp_path / "kept")
    assert measured(write(folder, entries()))[1] == []
