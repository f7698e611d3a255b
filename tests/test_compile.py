"""`--compile`: few graphs serve batches of every shape, in training and evaluation, and who runs out of them is told."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune
from tests import runs
from util import compilation
from util.collator import Collator
from util.config import Config
from util.dataset import Samples, load_examples
from util.model import build_model
from util.vision import Budget

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
SHOWCASE = "train_data/data.json"


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that were made since: everything is compiled by a backend that keeps them and runs them as they are."""
    torch._dynamo.reset()
    made = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> object:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", keep)
    monkeypatch.setattr(compilation.Compiled, "cannot", "")
    yield made
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def samples(processor) -> Samples:
    budget = Budget(min_pixels=3136, max_pixels=28 * 28 * 16, video_max_frames=4)
    return Samples(load_examples([SHOWCASE], processor), processor, budget)


def draw(samples: Samples, count: int, collate: Collator = Collator()) -> list:
    """Batches: a video, an image, text alone, no sample at all (a row of one token), then as chance has it."""
    kinds = {kind: [] for kind in ("video", "image", "text")}
    for index in range(len(samples)):
        media = samples.example(index).media
        kinds[media[0]["type"] if media else "text"].append(index)
    chance = random.Random(0)
    drawn = [kinds["video"][:1], kinds["image"][:1], kinds["text"][:2], kinds["image"][:3] + kinds["text"][:1]]
    drawn += [kinds["image"][3:6], kinds["text"][2:5], kinds["video"][1:3]]
    drawn += [chance.sample(range(len(samples)), chance.randint(1, 3)) for _ in range(count - len(drawn) - 1)]
    return [collate([samples[index] for index in batch]) for batch in [*drawn, []]]


def train_and_evaluate(model, batches: list) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of all batches, every fourth one in evaluation; then the gradients of the others together."""
    model.zero_grad()
    losses = []
    for number, batch in enumerate(batches):
        if number % 4 == 3:
            with torch.no_grad():
                losses.append(model.eval().score(batch)[0].sum().item())
        else:
            loss = model.train()(batch)
            if loss.requires_grad:  # a text has no gradient where the language model is frozen
                loss.backward()
            losses.append(loss.item())
    return losses, [parameter.grad for parameter in model.parameters()]


def check_as_without_compiling(compiled: tuple[list, list], plain: tuple[list, list], trained: str) -> None:
    """Losses and gradients of `train_and_evaluate`; `trained`: "bfloat16", or what is computed more exactly."""
    rounding = 2e-2 if trained == "bfloat16" else 1e-5
    assert compiled[0] == pytest.approx(plain[0], abs=rounding, rel=rounding)
    for found, right in zip(compiled[1], plain[1], strict=True):
        assert (found is None) == (right is None)
        if right is not None and trained != "bfloat16":  # its rounding is not the same in another order
            torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


TRAINED = {
    "everything": {},
    "frozen tower": {"freeze": ["vision"]},
    "frozen language model": {"freeze": ["language_model"]},
    "adapters": {"lora_rank": 4, "lora_vision": True},
    "adapters over 4 bits": {"lora_rank": 4, "quantize": "nf4"},
    "recomputed": {"activation_checkpointing": "full"},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16"},
}
QUICK = ("everything", "adapters")
MOST_GRAPHS = 8


@pytest.mark.parametrize(
    "trained", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TRAINED]
)
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_few_graphs_serve_batches_of_every_shape(trained, tiny_path, processor, samples, graphs):
    """50 batches of other lengths, a quarter of them in evaluation; losses and gradients are those without compiling."""
    if "lora_rank" in TRAINED[trained]:
        pytest.importorskip("peft", reason="adapters need peft (pip install peft)")
    if "quantize" in TRAINED[trained]:
        pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes (pip install bitsandbytes)")
    count = 50 if trained == "everything" else 12
    batches = draw(samples, count)
    settings = {"device": "cpu", "dtype": "float32", **TRAINED[trained]}
    torch.manual_seed(0)
    compiled = build_model(Config(compile="on", **settings), str(tiny_path), processor, CPU)
    found = train_and_evaluate(compiled, batches)
    assert 0 < len(graphs) <= MOST_GRAPHS, f"{len(graphs)} graphs"
    torch.manual_seed(0)
    plain = build_model(Config(compile="off", **settings), str(tiny_path), processor, CPU)
    check_as_without_compiling(found, train_and_evaluate(plain, batches), trained)


def test_evaluation_keeps_nothing_and_makes_no_graph(tiny_path, processor, samples, graphs):
    batch = draw(samples, 9)[3]
    model = build_model(Config(device="cpu", dtype="float32", compile="on"), str(tiny_path), processor, CPU)
    loss = model(batch)
    made = len(graphs)
    with torch.no_grad():
        losses, _ = model.eval().score(batch)
        visual = model.visual_tokens(batch)
    assert len(graphs) == made
    assert losses.grad_fn is None
    assert not losses.requires_grad
    assert visual.grad_fn is None
    assert not visual.requires_grad
    assert losses.sum().item() == pytest.approx(loss.item(), rel=1e-6)


@torch._dynamo.config.patch(recompile_limit=1)
def test_who_reaches_the_limit_is_told_once(tiny_path, processor, samples, graphs, capsys):
    """Two precisions in one process are two graphs of each function."""
    batch = draw(samples, 9)[2]
    for dtype in ("float32", "float64"):
        model = build_model(Config(device="cpu", dtype=dtype, compile="on"), str(tiny_path), processor, CPU)
        for _ in range(3):
            model(batch).backward()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--compile: ")]
    assert [line for line in lines if "1 graphs of 'before_layer_attention'" in line], lines
    assert len(lines) == len({line.split(" were made")[0] for line in lines}), "told again and again"


def test_who_has_no_compiler_trains_without(tiny_path, processor, samples, monkeypatch, capsys):
    def no_compiler(graph: torch.fx.GraphModule, inputs: list) -> object:
        raise RuntimeError("No working C++ compiler found\nand more lines")

    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", no_compiler)
    monkeypatch.setattr(compilation.Compiled, "cannot", "")
    batches = draw(samples, 9)
    compiled = build_model(Config(device="cpu", dtype="float32", compile="on"), str(tiny_path), processor, CPU)
    plain = build_model(Config(device="cpu", dtype="float32"), str(tiny_path), processor, CPU)
    assert train_and_evaluate(compiled, batches)[0] == train_and_evaluate(plain, batches)[0]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--compile: ")]
    assert "trains without it" in line
    assert "RuntimeError: No working C++ compiler found)" in line
    torch._dynamo.reset()


def test_out_of_memory_while_compiled_code_runs_is_not_taken_for_a_missing_compiler(
    tiny_path, processor, samples, graphs, monkeypatch
):
    batch = draw(samples, 9)[2]
    model = build_model(Config(device="cpu", dtype="float32", compile="on"), str(tiny_path), processor, CPU)

    def no_memory(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    for layer in model.model.model.language_model.layers:
        monkeypatch.setattr(layer.forward.args[2].before, "compiled", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(batch)
    assert not compilation.Compiled.cannot


def test_compiling_is_told_and_is_no_part_of_the_speed(tiny_path, tmp_path, graphs, capsys):
    config = runs.settings(tiny_path, tmp_path / "run", compile="on", max_steps=3)
    finetune.train(Config(**config))
    said = capsys.readouterr().out
    (plan,) = re.findall(r"^ *compile  (.*)$", said, re.MULTILINE)
    assert plan.startswith("the layers and the loss")
    news = [line for line in said.splitlines() if "compiling: " in line]
    assert news, said
    assert news[0].startswith("step 1: compiling: ")
    assert re.search(r"^done: 3 steps .* of them compiling; peak", said, re.MULTILINE)
    first = runs.log(tmp_path / "run")[0]
    assert 0 < first["compile_seconds"] < first["step_seconds"]
    at_work = first["step_seconds"] - first["compile_seconds"]
    assert first["tokens_per_second"] == pytest.approx(first["tokens"] / at_work, rel=0.02)


def test_auto_compiles_on_an_nvidia_gpu_alone(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.version, "hip", None)
    assert [compilation.is_on(choice, gpu) for choice in ("auto", "on", "off")] == [True, True, False]
    assert [compilation.is_on(choice, CPU) for choice in ("auto", "on", "off")] == [False, True, False]
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert not compilation.is_on("auto", gpu)


@pytest.mark.slow  # a C++ compiler builds every graph, which takes a minute
def test_a_second_process_finds_the_graphs_of_the_first(tiny_path, tmp_path):
    """By the command line with torch's own compiler; then without any compiler, from which the run must not suffer."""
    words = [
        sys.executable,
        "finetune.py",
        "--model",
        str(tiny_path),
        "--device",
        "cpu",
        "--compile",
        "--max_steps",
        "2",
    ]

    def run(name: str, **environment: str) -> tuple[str, list[float]]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name), **environment}
        folder = tmp_path / f"run_{len(list(tmp_path.glob('run_*')))}"
        told = subprocess.run(
            [*words, "--output_dir", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr[-3000:]
        assert "Traceback" not in told.stdout + told.stderr
        return told.stdout + told.stderr, runs.metrics(folder)

    first, losses = run("cache")
    assert "from the cache" not in first
    (found,) = re.findall(r"(\d+) graphs so far, (\d+) of them from the cache of an earlier run", run("cache")[0])[-1:]
    assert int(found[0]) == int(found[1]) >= 5
    without, eager_losses = run("empty", CXX=str(tmp_path / "no_compiler"))
    assert without.count("--compile: not possible here") == 1
    assert eager_losses == pytest.approx(losses, rel=1e-5)
