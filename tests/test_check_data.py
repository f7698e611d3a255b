"""Bad and over-long samples, before and while training; sizes measured fast, in parallel and right; the look over data."""

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import finetune
from tests.conftest import ROOT
from tests.runs import log
from tests.samples import assistant, user
from tests.test_distributed import torchrun
from util import conversation
from util.__main__ import main as command
from util.collator import Collator
from util.config import Config
from util.cost import check_data, measure
from util.cost.sizes import Finding, Sizes
from util.data import bad_samples
from util.data.settings import SampleSettings
from util.dataset import DataError, Examples, Samples, Size, load_examples
from util.results import show
from util.vision import Budget

LONG = 200  # tokens, --max_tokens of most runs here


def asking(*items, answer: str = "A wave.") -> dict:
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return {"messages": [user(content), assistant(answer)]}


def image(name: str, **keys) -> dict:
    return {"type": "image", "image": name, **keys}


@pytest.fixture
def folder(tmp_path, picture, write_video) -> Path:
    """Six small pictures, a large one, a video, and media that are none or end too early."""
    for number in range(6):
        Image.fromarray(picture(56, 84, number)).save(tmp_path / f"{number}.png")
    Image.fromarray(picture(600, 800)).save(tmp_path / "large.jpg", quality=90)
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "hollow.png").write_bytes(content[: len(content) // 2] + content[-12:])  # its end is there
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    write_video(tmp_path / "clip.mp4", [picture(120, 180, seed) for seed in range(20)], 5)
    return tmp_path


def write(folder: Path, entries: list, name: str = "data.json") -> str:
    (folder / name).write_text(json.dumps(entries))
    return str(folder / name)


def good(numbers=range(6)) -> list[dict]:
    return [asking(image(f"{number}.png"), f"Number {number}?", answer="x" * (number + 1)) for number in numbers]


BAD = [  # and the reason it is counted under
    (asking(image("gone.png"), "?"), "no such file", "no such file 'gone.png'"),
    (asking(image("broken.png"), "?"), "not readable", "broken.png: not a readable image"),
    ({"messages": [user("Hi")]}, "bad conversation", "ends with a user message"),
]
TOO_LONG = asking(image("large.jpg"), "And this?")


@pytest.fixture
def train(tiny_path, tmp_path, monkeypatch, capfd):
    """Train tiny for an epoch of small steps; return what it logged and what it said."""
    monkeypatch.chdir(ROOT)
    numbers = iter(range(100))

    def run(data: str, **changes) -> tuple[list[dict], str]:
        settings = {"model": str(tiny_path), "data": [data], "device": "cpu", "dtype": "float32", "epochs": 1,
                    "global_batch_size": 3, "learning_rate": 1e-3, "num_workers": 0, "max_tokens": LONG,
                    "min_pixels": 784, "output_dir": str(tmp_path / f"run{next(numbers)}")}  # fmt: skip
        directory = Path(finetune.train(Config(**{**settings, **changes})))
        lines = log(directory)
        captured = capfd.readouterr()
        return lines, captured.out + captured.err

    return run


def make(folder: Path, entries: list, processor, **budget) -> Samples:
    return Samples(Examples([write(folder, entries)], processor), processor, Budget(min_pixels=784, **budget))


# ---- before training ------------------------------------------------------------------------------------------------


def test_stop_names_all_and_writes_nothing(train, folder):
    data = write(folder, [*good(), *(entry for entry, _, _ in BAD), TOO_LONG])
    with pytest.raises(DataError) as error:
        train(data, output_dir=str(folder / "run"))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for line, said in zip(lines, [*(said for _, _, said in BAD), f"above --max_tokens {LONG}"], strict=True):
        assert said in line
    assert not (folder / "run").exists()


def test_skip_leaves_them_out_and_says_so(train, folder):
    """They leave their places in the steps empty; each is named, and counted by reason."""
    data = write(folder, [BAD[0][0], *good(), BAD[1][0], BAD[2][0], TOO_LONG])
    lines, said = train(data, on_bad_sample="skip", on_long_sample="skip", epochs=2, eval_data=[data], eval_samples=99)
    counts = [line["samples"] for line in lines if "samples" in line]
    assert len(counts) == 8, "as many steps as of ten samples"
    assert (sum(counts[:4]), sum(counts[4:])) == (6, 6)
    assert "left out: 1 no such file, 1 not readable, 1 bad conversation, 1 too long" in said
    assert "left out  4 of 10 samples" in said
    for number, words in ((0, BAD[0][2]), (7, BAD[1][2]), (8, BAD[2][2]), (9, f"above --max_tokens {LONG}")):
        assert re.search(rf"sample {number}\b.*{re.escape(words)}", said), (number, words)
    assert "2 epochs x 4 steps (10 / 3, rounded up)" in said
    assert "their places stay empty: as many steps, of 1.5 samples on average" in said
    assert lines[-1]["eval_questions"] == 6, "held-out samples are left out, too"
    tokens = {line["epoch"]: 0 for line in lines if "epoch" in line}
    for line in lines:
        tokens[line.get("epoch", 0)] += line.get("supervised_tokens", 0)
    assert tokens[0] == tokens[1], "all good samples in each epoch"


def test_each_policy_is_for_its_own_kind(train, folder):
    data = write(folder, [*good(), BAD[0][0], TOO_LONG])
    with pytest.raises(DataError) as error:
        train(data, on_bad_sample="skip")
    assert "above --max_tokens" in str(error.value)
    assert "gone.png" not in str(error.value)
    with pytest.raises(DataError) as error:
        train(data, on_long_sample="skip")
    assert "gone.png" in str(error.value)
    assert "above" not in str(error.value)
    with pytest.raises(DataError, match=r"no sample is left: 1 no such file; the first: .*sample 0.*gone\.png"):
        train(write(folder, [BAD[0][0]]), on_bad_sample="skip")


def test_a_line_of_json_that_is_none_is_skipped(train, folder):
    lines = [json.dumps(entry) for entry in good()]
    (folder / "data.jsonl").write_text("\n".join([*lines[:3], "{not json", *lines[3:]]))
    logged, said = train(str(folder / "data.jsonl"), on_bad_sample="skip")
    assert sum(line["samples"] for line in logged) == 6
    assert "left out: 1 not valid JSON" in said
    assert "data.jsonl, line 4" in said


# ---- shrinking ------------------------------------------------------------------------------------------------------


def test_shrunk_samples_fit_and_load_as_measured(folder, processor, any_processor):
    entries = [
        *good(range(2)),
        TOO_LONG,
        asking(image("large.jpg"), image("0.png"), image("large.jpg", min_pixels=300_000), "Same?"),
        asking(image("large.jpg", resized_height=560, resized_width=280), "?"),
        asking({"type": "video", "video": "clip.mp4", "fps": 5, "min_pixels": 40_000, "total_pixels": 10**7}, "?"),
        asking({"type": "video", "video": ["large.jpg"] * 3}, image("large.jpg"), "?"),
    ]
    for limit in (150, 300):
        samples = make(folder, entries, any_processor)
        before = measure.measure(samples, 10**6)
        sizes = measure.measure(samples, limit, SampleSettings(on_long_sample="shrink"))
        assert set(samples.shrunk) == {index for index, size in enumerate(before) if size.tokens > limit}
        assert len(samples.shrunk) >= 3
        for index, size in enumerate(sizes):
            sample, batch = samples[index], Collator()([samples[index]])
            assert size == samples.size(index), "the budget found is the budget used"
            assert [medium.grid for medium in sample.media] == size.grids
            assert len(batch.input_ids) == size.tokens <= limit
            assert len(batch.visual_index) == sum(grid.tokens for grid in size.grids), "no visual token is cut"
            assert [grid.t for grid in size.grids] == [grid.t for grid in before[index].grids], "no frame is left out"
            assert size.supervised == before[index].supervised
            text = [s.tokens - sum(grid.tokens for grid in s.grids) for s in (size, before[index])]
            assert text[0] == text[1]
            if index in samples.shrunk:
                larger = dict(vars(samples.shrunk[index]))
                larger["cap_pixels"] += 784
                samples.shrunk[index] = Budget(**larger)
                assert samples.size(index).tokens > limit, "no more was taken away than had to be"
            else:
                assert size == before[index]
        if 3 in samples.shrunk:
            assert sizes[3].grids[1] == before[3].grids[1], "what is small already stays"


def test_what_cannot_be_shrunk_is_refused(folder, processor):
    entries = [
        *good(),
        asking(image("large.jpg"), "word " * 300),
        asking({"type": "video", "video": ["0.png"] * 400}, "?"),
    ]
    samples = make(folder, entries, processor)
    with pytest.raises(DataError) as error:
        measure.measure(samples, LONG, SampleSettings(on_long_sample="shrink"))
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all("with one token for each image and pair of frames; raise --max_tokens" in line for line in lines)
    sizes = measure.measure(samples, LONG, SampleSettings(on_long_sample="shrink", on_bad_sample="skip"))
    assert sizes.left_out == {"too long": 2}
    assert sizes.usable.tolist() == list(range(6))
    assert sorted(samples.examples.order(0, 0)) == list(range(8)), "what is left out keeps its place"


def test_a_run_that_shrinks(train, folder):
    lines, said = train(write(folder, [*good(range(5)), TOO_LONG]), on_long_sample="shrink", global_batch_size=6)
    assert [line["samples"] for line in lines] == [6]
    assert re.search(rf"shrunk  1 samples to fit --max_tokens {LONG}, \d+ to \d+ tokens", said)


def test_remote_paths_and_the_cache_shrink_as_local_files(folder, processor, tmp_path):
    import base64

    from util.data.media import MediaReader

    address = "data:image/jpeg;base64," + base64.b64encode((folder / "large.jpg").read_bytes()).decode()
    entries = [TOO_LONG, asking(image(address), "And this?")]
    reader = MediaReader(Config(cache_dir=str(tmp_path / "cache")))
    examples = Examples([write(folder, entries)], processor)
    samples = Samples(examples, processor, Budget(), reader)
    _ = samples[0], samples[1]  # stored as large as they are
    sizes = measure.measure(samples, LONG, SampleSettings(on_long_sample="shrink"))
    assert sizes[0] == sizes[1]
    assert [[medium.grid for medium in samples[index].media] for index in (0, 1)] == [size.grids for size in sizes]


# ---- while training -------------------------------------------------------------------------------------------------


def after_the_look(monkeypatch, do) -> None:
    """Call `do` when headers have been read and nothing is loaded yet."""
    monkeypatch.setattr(show, "describe_first", lambda *arguments: do() or "")


def test_a_file_that_is_gone_stops_the_run_by_name(train, folder, monkeypatch):
    after_the_look(monkeypatch, (folder / "2.png").unlink)
    with pytest.raises(DataError, match=r"sample 2, message 0: no such file '2\.png'"):
        train(write(folder, good()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro", [None, 1])
def test_a_file_that_is_gone_is_skipped_and_counted(train, folder, monkeypatch, workers, micro):
    """Its batch, and with --micro_batch_size 1 its emptied micro-batch, trains with what is left."""
    after_the_look(monkeypatch, (folder / "2.png").unlink)
    data = write(folder, [*good(), asking(image("hollow.png"), "?")])
    lines, said = train(data, on_bad_sample="skip", num_workers=workers, micro_batch_size=micro, max_tokens=20480)
    assert [line["samples"] + line.get("skipped", 0) for line in lines] == [3, 3, 1]
    assert sum(line["samples"] for line in lines) == 5
    assert sum(line.get("skipped_no_such_file", 0) for line in lines) == 1
    assert sum(line.get("skipped_not_readable", 0) for line in lines) == 1
    assert sum(line["supervised_tokens"] for line in lines) > 0
    assert re.search(r"skipped: .*sample 2, message 0: no such file '2\.png'", said)
    assert re.search(r"skipped: .*sample 6: .*hollow\.png", said)


def test_the_loss_of_a_batch_is_that_of_what_is_left(train, folder, monkeypatch):
    """One step of six samples of which one is gone: the loss and the weights of a step of the other five."""
    whole, others = write(folder, good()), write(folder, good([0, 1, 3, 4, 5]), "others.json")
    runs = {}
    for name, data in (("others", others), ("whole", whole)):
        if name == "whole":
            after_the_look(monkeypatch, (folder / "2.png").unlink)
        runs[name], _ = train(
            data, on_bad_sample="skip", global_batch_size=6, dtype="float64", output_dir=str(folder / name)
        )
    assert runs["whole"][0]["loss"] == pytest.approx(runs["others"][0]["loss"], abs=1e-12)
    one, other = (load_file(folder / name / "model.safetensors") for name in ("whole", "others"))
    assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-12


def test_held_out_samples_that_are_gone_are_left_out_and_said(train, folder, monkeypatch):
    held = {
        name: write(folder, good(which), f"{name}.json") for name, which in (("whole", range(6)), ("others", range(2)))
    }
    found = {}
    for name in ("others", "whole"):
        if name == "whole":
            after_the_look(
                monkeypatch, lambda: [(folder / f"{number}.png").unlink() for number in range(2, 6)] and None
            )
        lines, said = train(
            write(folder, good(range(2)), "train.json"), on_bad_sample="skip", max_steps=1, eval_data=[held[name]],
            eval_samples=6, output_dir=str(folder / name),
        )  # fmt: skip
        (found[name],) = [line for line in lines if "eval_loss" in line]
    assert found["whole"]["eval_loss"] == pytest.approx(found["others"]["eval_loss"], abs=1e-6)
    assert found["whole"]["eval_skipped"] == found["whole"]["eval_skipped_no_such_file"] == 4
    assert "eval_skipped" not in found["others"]
    assert found["whole"]["eval_questions"] == found["others"]["eval_questions"] == 2
    assert "held-out samples left out: 4 no such file" in said


def test_a_step_without_any_sample_left_changes_nothing(train, folder, monkeypatch, tiny_path):
    after_the_look(monkeypatch, lambda: [(folder / f"{number}.png").unlink() for number in range(2)] and None)
    data = write(folder, good(range(2)))
    lines, said = train(data, on_bad_sample="skip", global_batch_size=1, output_dir=str(folder / "run"))
    assert [(line["samples"], line["skipped"], line["supervised_tokens"]) for line in lines] == [(0, 1, 0)] * 2
    assert all(line["loss"] is None or line["loss"] != line["loss"] for line in lines), "no loss, not a loss of 0"
    assert "this update is left out" in said
    before, after = load_file(tiny_path / "model.safetensors"), load_file(folder / "run" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_ranks_skip_as_one(folder, tiny_path, monkeypatch, tmp_path):
    """Refused samples, one whose pixels end early, a batch in which nothing is left: the same on two ranks."""
    monkeypatch.chdir(ROOT)
    cut = asking(image("hollow.png"), "?")
    mixed = write(folder, [*good(), BAD[0][0], cut, TOO_LONG])
    settings = {
        "model": str(tiny_path), "data": [mixed], "device": "cpu", "dtype": "float64", "epochs": 2, "num_workers": 0,
        "global_batch_size": 4, "min_pixels": 784, "max_tokens": 300, "on_bad_sample": "skip", "on_long_sample": "shrink",
        "output_dir": str(tmp_path / "two"),
    }  # fmt: skip
    finetune.train(Config(**{**settings, "output_dir": str(tmp_path / "one")}))
    torchrun(2, [settings], tmp_path)
    one, two = (log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 6
    assert sum(line.get("skipped_not_readable", 0) for line in one) == 2, "once in each epoch"
    for line, other in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-10)
        for key in {*line, *other}:
            if key.startswith("skipped") or key in ("samples", "tokens", "supervised_tokens"):
                assert line.get(key) == other.get(key), key


def test_what_the_log_makes_of_the_counts():
    tally = bad_samples.Tally()
    nothing = bad_samples.count_skipped([])
    assert tally.take({"loss": 0.0, "samples": 0, **nothing}) == {"loss": 0.0, "samples": 0, "unread": 0}
    assert tally.summary() == ""
    some = bad_samples.count_skipped([bad_samples.Skipped("a.json, sample 1: gone", "no such file")] * 2)
    assert some.keys() == nothing.keys(), "ranks add them up"
    assert tally.take({"loss": 1.0, **some}) == {"loss": 1.0, "skipped": 2, "skipped_no_such_file": 2, "unread": 0}
    tally.take(some)
    assert tally.summary() == "samples left out: 4 no such file while training, counted each time"
    from_start = Sizes.of([Finding(problem="a", reason="too long")]).left_out
    assert tally.summary(from_start).startswith("samples left out: 1 too long from the start; 4 no such file while")


# ---- fast, parallel, right ------------------------------------------------------------------------------------------


TEXTS = ["Hi", "", " ", "\n", " two  spaces ", "\nA line", "What is\tthis? ", "{{ messages }}", "{% if %}", "描述一下这个图片",
         "🙂" * 3, "<|box_start|>(1,2),(3,4)<|box_end|>", "é vs e\u0301", "a" * 300, "1 + 1 = ?", "\u200bzero", "0", "\ue001"]  # fmt: skip


def random_conversation(choose: random.Random) -> dict:
    def content(role: str):
        if choose.random() < 0.4:
            return choose.choice(TEXTS)
        items = []
        for _ in range(choose.randrange(4)):
            media = [image("0.png"), {"image": "1.png"}, {"type": "video", "video": ["0.png", "1.png"]},
                     image("2.png", max_pixels=3136)]  # fmt: skip
            is_text = role != "user" or choose.random() < 0.6
            items.append({"type": "text", "text": choose.choice(TEXTS)} if is_text else choose.choice(media))
        return items

    messages = [{"role": "system", "content": content("system")}] if choose.random() < 0.3 else []
    for _ in range(choose.randint(1, 3)):
        messages += [user(content("user")), assistant(content("assistant"))]
        if not "".join(part if isinstance(part, str) else part["text"] for part in messages[-1]["content"]).strip():
            messages[-1]["content"] = "Yes."  # an empty answer is refused
    return {"messages": messages}


def quick_sizes(samples: Samples) -> list[Size]:
    quick = measure.QuickSize(samples)
    return [quick(samples.example(index)) for index in range(len(samples))]


def test_quick_sizes_are_the_sizes(folder, any_processor):
    files = [str(ROOT / name / "data.json") for name in ("train_data", "test_data")]
    shown = Samples(load_examples(files, any_processor), any_processor, Budget())
    assert quick_sizes(shown) == [shown.size(index) for index in range(len(shown))]
    choose = random.Random(0)
    samples = make(folder, [random_conversation(choose) for _ in range(400)], any_processor)
    assert quick_sizes(samples) == [samples.size(index) for index in range(len(samples))]


def test_conversations_of_one_structure_are_rendered_once(folder, processor, monkeypatch):
    samples, calls = make(folder, good() * 5, processor), []
    render = conversation.render
    monkeypatch.setattr(conversation, "render", lambda *arguments: calls.append(1) or render(*arguments))
    quick_sizes(samples)
    assert len(calls) == 1


@pytest.mark.parametrize("edit", ["| trim", "| upper", "| e", "~ item.text", "| replace('\\n', ' ')"])
def test_a_template_that_edits_texts_is_rendered_each_time(edit, folder, tiny_path):
    from transformers import AutoProcessor

    odd = AutoProcessor.from_pretrained(tiny_path)
    assert "{{- item.text -}}" in odd.chat_template
    odd.chat_template = odd.chat_template.replace("{{- item.text -}}", f"{{{{- item.text {edit} -}}}}")
    samples = make(folder, [*good(), asking(image("0.png"), " what \n Is ", answer=" no ")], odd)
    quick = measure.QuickSize(samples)
    assert [quick(example) for example in samples.examples] == [samples.size(index) for index in range(len(samples))]
    assert None in quick.structures.values()


def test_parallel_equals_sequential(folder, processor, monkeypatch):
    choose = random.Random(1)
    entries = [random_conversation(choose) for _ in range(150)] + [entry for entry, _, _ in BAD] + [TOO_LONG] * 3
    choose.shuffle(entries)
    samples = make(folder, entries, processor)
    alone = measure.look(samples, LONG, "shrink", 0, check_data.note)
    monkeypatch.setattr(measure, "WORTH_WORKERS", -1)
    state = torch.get_rng_state()
    assert measure.look(samples, LONG, "shrink", 2, check_data.note) == alone
    assert torch.equal(torch.get_rng_state(), state), "training's random numbers stay what they are"
    assert len(alone) == len(samples)
    assert {finding.reason for finding in alone} == {"", "too long", *(reason for _, reason, _ in BAD)}
    assert measure.look(samples, LONG, "stop", None) == measure.look(samples, LONG, "stop", 0)


def test_headers_are_read_fast(tmp_path, any_processor, capsys):
    """Samples a second on one core, of its own time, since others use this machine. The mark is 2,000."""
    words = ["red", "blue", "circle", "bar", "left", "under", "kingfisher", "which", "how", "many", "what", "colour"]
    choose, noise = random.Random(0), np.random.default_rng(0)
    names = [f"{number}.{'png' if number % 2 else 'jpg'}" for number in range(50)]
    for name in names:
        Image.fromarray(noise.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / name)
    entries = [
        asking(image(choose.choice(names)), " ".join(choose.choices(words, k=10)) + f" {number}?",
               answer=" ".join(choose.choices(words, k=8)))
        for number in range(1500)
    ]  # fmt: skip
    best = 0.0
    for _ in range(3):
        samples = make(tmp_path, entries, any_processor)
        began = time.process_time()
        sizes = measure.measure(samples, 20480)
        best = max(best, len(sizes) / (time.process_time() - began))
    with capsys.disabled():
        print(f"\n{best:,.0f} samples a second per core")
    assert best >= 1000


# ---- python -m util check --------------------------------------------------------------------------------------


@pytest.fixture
def check(tiny_path, folder, monkeypatch, capsys):
    """The command: arguments -> (exit code, what it printed and said)."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str]:
        code = 0
        try:
            command(["check", *arguments, "--model", str(tiny_path), "--device", "cpu", "--min_pixels", "784"])
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_good_data_is_described_and_forecast(check, folder):
    code, said = check(write(folder, good()), "--global_batch_size", "4", "--epochs", "2")
    assert code == 0, said
    for words in ("6 samples, 6 can be trained on", "6 one image", "tokens", "supervised", "patches",
                  "4 of at most 4 samples in 2 epoch(s)", "weights", "gradients", "moments", "activations",
                  "a rough estimate", "GFLOP/s just measured"):  # fmt: skip
        assert words in said, words
    assert "refused" not in said
    assert not (folder / "test_output").exists()


@pytest.fixture
def odd_pictures(folder) -> str:
    """Good data, and one picture each: of 16 bits, of which a small part is used; of all 16 bits; moving; black."""
    ramp = np.linspace(0, 1, 56 * 84).reshape(56, 84)
    Image.fromarray((ramp * 4095).astype(np.uint16)).save(folder / "dark.png")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(folder / "deep.png")
    moving = [Image.fromarray((ramp * 255).astype(np.uint8) // (number + 1)) for number in range(3)]
    moving[0].save(folder / "moving.gif", save_all=True, append_images=moving[1:])
    Image.fromarray(np.full((56, 84), 63, np.uint8)).save(folder / "black.png")
    names = ["dark.png", "deep.png", "moving.gif", "black.png"]
    return write(folder, [*good(), *[asking(image(name), "?") for name in names]])


def test_pictures_that_are_not_plain_are_said_by_the_check(check, odd_pictures, folder):
    code, said = check(odd_pictures, "--decode")
    assert code == 2
    assert f"sample 6: {folder}/dark.png: its values are from 0 to 4,095, a small part of the 65,535 of 16 bits" in said
    assert "save it as 8 bits, at training and at inference (docs/data.md, Pictures and videos that" in said
    assert "deep images   1 are not of 8 bits" in said
    assert f"sample 7: {folder}/deep.png (16 bits, values from 0 to 65,535)" in said
    assert "first images  1 are the first of several in their files" in said
    assert f"sample 8: {folder}/moving.gif\n" in said
    assert "nearly black  1 images, in which no value is above 63 of 255" in said
    assert f"sample 9: {folder}/black.png\n" in said
    assert "1 samples cannot be trained on" in said


def test_pictures_that_are_not_plain_are_said_by_the_plan(train, odd_pictures):
    with pytest.raises(DataError, match="values are from 0 to 4,095"):
        train(odd_pictures)
    for start in ("read now", "read before, and kept"):
        _, said = train(odd_pictures, on_bad_sample="skip", max_steps=1)
        assert "deep images  1 are not of 8 bits" in said, start
        assert "first images  1 are the first of several" in said, start
        assert "left out: 1 not readable" in said, start


def test_what_is_refused_is_named_with_exit_code_2(check, folder):
    data = write(folder, [*good(), *(entry for entry, _, _ in BAD), TOO_LONG])
    code, said = check(data, "--max_tokens", str(LONG))
    assert code == 2
    for _, reason, words in BAD:
        assert words in said
        assert f"1 {reason}" in said
    assert f"above --max_tokens {LONG}" in said
    assert "4 samples cannot be trained on" in said
    assert not (folder / "test_output").exists()
    code, said = check(data, "--max_tokens", str(LONG), "--on_long_sample", "shrink")
    assert code == 2
    assert "shrunk" in said
    assert "above" not in said
    code, said = check(write(folder, [*good(), TOO_LONG]), "--max_tokens", str(LONG), "--on_long_sample", "shrink")
    assert code == 0, said


def test_many_refusals_go_to_a_file(check, folder):
    data = write(folder, [*good(), *[BAD[0][0]] * 30])
    code, said = check(data)
    assert code == 2
    assert said.count("no such file 'gone.png'") == 20
    assert "... and 10 more: all are in test_output/refused.txt" in said
    lines = (folder / "test_output" / "refused.txt").read_text().splitlines()
    assert len(lines) == 30
    assert lines[-1].startswith(f"{data}, sample 35, message 0: no such file")
    code, said = check(data, "--report", str(folder / "mine.txt"))
    assert len((folder / "mine.txt").read_text().splitlines()) == 30
    code, said = check(data, "--report", str(folder))
    assert code == 2
    assert "cannot be written" in said


def test_what_is_in_both_sets_is_found(check, folder):
    """A picture under another name; a conversation that differs in white space and case; neither where bytes differ."""
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())
    changed = bytearray((folder / "4.png").read_bytes())
    changed[-20] ^= 1
    (folder / "alike.png").write_bytes(changed)
    train = write(folder, good())
    held_out = write(
        folder,
        [asking(image("copy.png"), "  number   3? ", answer="XXXX"), asking(image("copy.png"), "Another?"),
         asking(image("alike.png"), "Number 4?", answer="xxxxx")],
        "held_out.json",
    )  # fmt: skip
    code, said = check(train, "--eval_data", held_out)
    assert code == 0, said
    assert f"{held_out}, sample 0 is {train}, sample 3" in said
    assert re.search(r"conversations +1\n", said)
    assert re.search(r"media +1\n", said)
    assert "copy.png" in said
    assert "alike.png" not in said
    _, said = check(train, "--eval_data", train)
    assert re.search(r"conversations +6\n", said)
    assert re.search(r"media +6\n", said)


def test_a_wrong_command_line(check, folder):
    code, said = check(write(folder, good()), "--eval_dat", "x")
    assert code == 2
    assert "unknown flag --eval_dat" in said
    code, said = check(str(folder / "nothing.json"))
    assert code == 2
    assert "no such data file" in said
