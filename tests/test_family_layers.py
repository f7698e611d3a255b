"""Each family's layers, recomputed and compiled: the same gradients whatever a layer keeps, and few graphs for all of them."""

import pytest
import torch

from tests.test_compile import (  # noqa: F401  (graphs is a fixture)
    MOST_GRAPHS,
    check_as_without_compiling,
    draw,
    graphs,
    train_and_evaluate,
)
from tests.test_recompute import flops, gradients
from util import packed_layers
from util.collator import Batch, Collator
from util.config import Config
from util.dataset import Samples, load_examples
from util.model import build_model, load_processor
from util.tiny_model import make_tiny_model
from util.vision import Budget

CPU = torch.device("cpu")
SHOWCASE = "train_data/data.json"
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[str, str]:
    """A model_type, and the folder of its tiny checkpoint."""
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return request.param, str(make_tiny_model(folder, model_type=request.param))


@pytest.fixture(scope="module")
def samples(family) -> Samples:
    """The showcase in small pictures: 5 x 5 tokens at most, so that windows are cut."""
    budget = Budget(max_pixels=32 * 32 * 25, min_pixels=3136, video_max_frames=4, model_type=family[0])
    processor = load_processor(family[1])
    return Samples(load_examples([SHOWCASE], processor), processor, budget)


@pytest.fixture(scope="module")
def batch(family, samples) -> Batch:
    made = Collator(family[0])([samples[index] for index in range(8)])
    assert len(made.image_patches), "no image is among them"
    return made


def build(family, **settings):
    torch.manual_seed(0)  # of the adapters
    settings = {"device": "cpu", "dtype": "float32", **settings}
    return build_model(Config(**settings), family[1], load_processor(family[1]), CPU)


TRAINED = {"everything": {}, "frozen tower": {"freeze": ["vision"]}, "bfloat16": {"dtype": "bfloat16"}}


@pytest.mark.parametrize("trained", TRAINED)
def test_gradients_are_the_same_bit_for_bit_whatever_a_layer_keeps(trained, family, batch):
    loss, plain = gradients(build(family, **TRAINED[trained]), batch)
    for how in ("selective", "full"):
        found_loss, found = gradients(build(family, activation_checkpointing=how, **TRAINED[trained]), batch)
        assert found_loss == loss, how
        assert found.keys() == plain.keys(), f"{how}: other weights have a gradient"
        different = [name for name in plain if not torch.equal(found[name], plain[name])]
        assert not different, f"{how}: {len(different)} gradients differ, first that of {different[0]}"


def test_selective_makes_no_product_twice(family, batch):
    plain, selective, full = (
        flops(build(family, activation_checkpointing=how), batch) for how in ("none", "selective", "full")
    )
    assert selective == plain, f"{selective / plain:.3f} of the work"
    assert full > 1.2 * plain


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
@pytest.mark.parametrize(
    "trained", ["everything", *[pytest.param(name, marks=pytest.mark.slow) for name in ("recomputed", "bfloat16")]]
)
def test_few_graphs_serve_batches_of_every_shape(trained, family, samples, graphs):  # noqa: F811
    """Losses and gradients of 12 batches, a quarter of them in evaluation, are those without compiling."""
    settings = {"recomputed": {"activation_checkpointing": "full"}, "bfloat16": {"dtype": "bfloat16"}}.get(trained, {})
    batches = draw(samples, 12, Collator(family[0]))
    compiled = train_and_evaluate(build(family, compile="on", **settings), batches)
    assert 0 < len(graphs) <= MOST_GRAPHS, f"{len(graphs)} graphs"
    check_as_without_compiling(compiled, train_and_evaluate(build(family, compile="off", **settings), batches), trained)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=False)
def test_a_graph_for_each_layer_would_be_seen(family, samples, graphs, monkeypatch):  # noqa: F811
    """The planted fault: something that each layer has of its own is asked for within a graph."""
    rms_norm = packed_layers.rms_norm

    def of_its_own(norm, hidden):
        return rms_norm(norm, hidden) * (1.0 if norm.number else 0.0)

    monkeypatch.setattr(packed_layers, "rms_norm", of_its_own)
    model = build(family, compile="on")
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    for number, norm in enumerate(norms):
        norm.number = number
    for made in draw(samples, 9, Collator(family[0]))[:4]:
        model(made)
    assert len(graphs) > MOST_GRAPHS
