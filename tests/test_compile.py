"""`--compile`: few graphs serve batches of every shape, in training and evaluation, and who runs out of them is told."""

import random
from dataclasses import replace

import pytest
import torch

from util.collator import Collator
from util.config import Config
from util.dataset import Samples, load_examples
from util.model import build_model
from util.vision import Budget

CPU = torch.device("cpu")
SHOWCASE = "train_data/data.json"


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that were made since: the layers are compiled by a backend that keeps them and runs them as they are."""
    torch._dynamo.reset()
    made, compile_module = [], torch.nn.Module.compile

    def keep(graph: torch.fx.GraphModule, inputs: list) -> object:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **changes: compile_module(self, backend=keep, **changes)
    )
    yield made
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def samples(processor) -> Samples:
    budget = Budget(min_pixels=3136, max_pixels=28 * 28 * 16, video_max_frames=4)
    return Samples(load_examples([SHOWCASE], processor), processor, budget)


def draw(samples: Samples, count: int) -> list:
    """Batches: a video, an image, text alone, several of all, then as chance has it."""
    kinds = {kind: [] for kind in ("video", "image", "text")}
    for index in range(len(samples)):
        media = samples.example(index).media
        kinds[media[0]["type"] if media else "text"].append(index)
    chance = random.Random(0)
    drawn = [kinds["video"][:1], kinds["image"][:1], kinds["text"][:2], kinds["image"][:3] + kinds["text"][:1]]
    drawn += [chance.sample(range(len(samples)), chance.randint(1, 8)) for _ in range(count - len(drawn))]
    return [Collator()([samples[index] for index in batch]) for batch in drawn]


def draw_texts(samples: Samples, count: int) -> list:
    """Batches without the tower, which is most of what is traced: texts of other lengths, from one sample on."""
    text = next(samples[index] for index in range(len(samples)) if not samples.example(index).media)
    rows = [[grown(text, number + copy) for copy in range(1 + number % 3)] for number in range(count)]
    return [Collator()(row) for row in rows]


def grown(sample, tokens: int):
    """The sample with so many tokens more in front."""
    encoded = sample.encoded
    longer = replace(
        encoded,
        input_ids=encoded.input_ids[:1] * tokens + encoded.input_ids,
        weights=[0.0] * tokens + encoded.weights,
    )
    return replace(sample, encoded=longer)


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
            loss.backward()
            losses.append(loss.item())
    return losses, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("kinds", ["text alone", pytest.param("all", marks=pytest.mark.slow)])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_graphs_do_not_grow_with_the_batches(kinds, tiny_path, processor, samples, graphs):
    """Batches of all lengths: the graphs of the first four serve the rest, and no limit is met."""
    count = 20
    batches = draw(samples, count) if kinds == "all" else draw_texts(samples, count)
    assert len({tuple(batch.segments.lengths) for batch in batches}) == count
    compiled = build_model(Config(device="cpu", dtype="float32", compile=True), str(tiny_path), processor, CPU)
    train_and_evaluate(compiled, batches[:4])
    warm = len(graphs)
    # of the tower and the language model, with gradients and without, what stands before attention and after it
    assert 0 < warm <= 20
    losses, gradients = train_and_evaluate(compiled, batches)
    assert len(graphs) == warm, f"{warm} graphs after 4 batches, {len(graphs)} after {count}"
    plain = build_model(Config(device="cpu", dtype="float32"), str(tiny_path), processor, CPU)
    expected, wanted = train_and_evaluate(plain, batches)
    assert losses == pytest.approx(expected, abs=1e-5, rel=1e-5)
    for found, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


@torch._dynamo.config.patch(recompile_limit=1)
def test_who_reaches_the_limit_is_told_once(tiny_path, processor, samples, graphs, capsys):
    (batch,) = draw_texts(samples, 1)
    model = build_model(Config(device="cpu", dtype="float32", compile=True), str(tiny_path), processor, CPU)
    train_and_evaluate(model, [batch] * 8)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--compile: ")]
    assert [line for line in lines if "1 graphs of 'decoder_layer'" in line], lines
    assert len(lines) == len({line.split(" were made")[0] for line in lines}), "told again and again"
