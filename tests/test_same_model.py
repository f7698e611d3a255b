"""A model is the same however it was built: precision and value of every parameter and buffer, and what it computes."""

import itertools
from pathlib import Path

import pytest
import torch

from tests import built_models
from tests.test_distributed import torchrun
from util.config import Config
from util.mixed_adamw import exact_value
from util.model import build_model, load_config, load_processor, load_weights

KINDS = {
    "full": {},
    "LoRA": {"lora_rank": 4},
    "LoRA with the tower": {"lora_rank": 4, "lora_vision": True},
    "DoRA": {"lora_rank": 4, "lora_dora": True},
    "QLoRA": {"lora_rank": 4, "quantize": "nf4"},
    "new tokens": {"new_tokens": "tokens.txt"},
    "LoRA with new tokens": {"lora_rank": 4, "new_tokens": "tokens.txt"},
}
CASES = [
    *itertools.product(KINDS, ("bfloat16",), ("full",)),
    *itertools.product(("full", "LoRA"), ("float32",), ("full",)),
    *itertools.product(("full", "LoRA"), ("bfloat16",), ("none",)),
]


def config_of(kind: str, dtype: str, sharding: str, model: Path) -> dict:
    config = {"model": str(model), "device": "cpu", "dtype": dtype, "sharding": sharding, **KINDS[kind]}
    if "new_tokens" in config:
        file = model.with_name("tokens.txt")
        file.write_text("\n".join(f"<place_{number}>" for number in range(40)))  # 31 rows of tiny are unused
        config["new_tokens"] = str(file)
    return config


@pytest.fixture(scope="module")
def on_two_ranks(tiny_path, tmp_path_factory) -> dict[tuple, dict]:
    """What each case holds and computes, built on two ranks."""
    folder = tmp_path_factory.mktemp("built")
    configs = [config_of(*case, tiny_path) for case in CASES]
    torchrun(2, configs, folder, "tests/built_models.py", str(folder))
    return {case: torch.load(folder / f"{number}.pt") for number, case in enumerate(CASES)}


@pytest.fixture(scope="module")
def alone(tiny_path):
    """A function (kind, dtype) -> the same, built in this process."""
    made = {}

    def build(kind: str, dtype: str) -> dict:
        if (kind, dtype) not in made:
            config = Config(**config_of(kind, dtype, "full", tiny_path))
            torch.manual_seed(config.seed)
            packed = build_model(config, str(tiny_path), load_processor(str(tiny_path)), torch.device("cpu"))
            held = built_models.held_by(packed)
            round_ties_to_even(packed)
            made[kind, dtype] = {"held": held, "losses": built_models.token_losses(packed)}
        return made[kind, dtype]

    return build


def round_ties_to_even(packed) -> None:
    """Let bf16 weights be those that `fully_shard` makes of the same fp32: 14 of tiny's lie halfway between two."""
    for parameter in packed.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data.copy_(exact_value(parameter).to(torch.bfloat16))


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_two_ranks_build_the_model_that_one_process_builds(case, alone, on_two_ranks):
    kind, dtype, _ = case
    ours, theirs = on_two_ranks[case]["held"], alone(kind, dtype)["held"]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, f"{name}: {ours[name].dtype} on two ranks, {tensor.dtype} on one"
        assert torch.equal(ours[name], tensor), f"{name}: not the same value"


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_two_ranks_compute_the_same_far_along_a_row(case, alone, on_two_ranks):
    """The bound is the rounding of the precision of compute; rotary frequencies in bf16 miss it by far."""
    kind, dtype, _ = case
    bound = {"float32": 1e-5, "bfloat16": 1e-3}[dtype]
    torch.testing.assert_close(on_two_ranks[case]["losses"], alone(kind, dtype)["losses"], atol=bound, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rotary_frequencies_are_those_of_the_formula(kind, dtype, alone, tiny_path):
    """theta ** (-2 i / d) in fp32, whatever the precision of compute (arXiv 2104.09864)."""
    text = load_config(str(tiny_path)).text_config
    width = text.hidden_size // text.num_attention_heads
    theta = text.rope_parameters["rope_theta"]
    expected = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)])
    found = alone(kind, dtype)["held"]["model.model.language_model.rotary_emb.inv_freq"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_far_along_a_row_losses_are_those_of_transformers(alone, tiny_path):
    batch = built_models.row_with_a_gap()
    model = load_weights(str(tiny_path), torch.float32, torch.device("cpu")).eval()
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[:, None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], batch.input_ids[1:], reduction="none")
    torch.testing.assert_close(alone("full", "float32")["losses"], expected, atol=1e-5, rtol=0)
