"""`--activation_checkpointing`: the same gradients whatever a layer keeps, no product twice, and less memory."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from util import recompute
from util.collator import Batch, Collator
from util.config import Config
from util.dataset import Samples, load_examples
from util.model import build_model
from util.tensors import part_of
from util.vision import Budget

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
TRAINED = {
    "everything": {},
    "frozen tower": {"freeze": ["vision"]},
    "frozen language model": {"freeze": ["language_model"]},
    "adapters": {"lora_rank": 4, "lora_vision": True, "lora_dropout": 0.5},
    "adapters over 4 bits": {"lora_rank": 4, "quantize": "nf4", "lora_dropout": 0.5},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def batch(processor) -> Batch:
    budget = Budget(min_pixels=3136, max_pixels=28 * 28 * 64, video_max_frames=4)
    samples = Samples(load_examples([str(ROOT / "train_data" / "data.json")], processor), processor, budget)
    return Collator()([samples[index] for index in range(8)])


def build(tiny_path, processor, how: str, **changes):
    torch.manual_seed(0)  # of the adapters
    settings = {"device": "cpu", "dtype": "float32", "activation_checkpointing": how, **changes}
    model = build_model(Config(**settings), str(tiny_path), processor, CPU)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at first, which would let no gradient through
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)  # of the dropout
    loss = model(batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("how", ["selective", "full"])
def test_gradients_are_the_same_bit_for_bit(how, trained, tiny_path, processor, batch):
    if "lora_rank" in TRAINED[trained]:
        pytest.importorskip("peft", reason="adapters need peft (pip install peft)")
    if "quantize" in TRAINED[trained]:
        pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes (pip install bitsandbytes)")
    plain_loss, plain = gradients(build(tiny_path, processor, "none", **TRAINED[trained]), batch)
    loss, found = gradients(build(tiny_path, processor, how, **TRAINED[trained]), batch)
    assert loss == plain_loss
    assert found.keys() == plain.keys(), "other weights have a gradient"
    different = [name for name in plain if not torch.equal(found[name], plain[name])]
    assert not different, f"{len(different)} gradients differ, first that of {different[0]}"


def test_dropout_that_is_drawn_anew_would_be_seen(tiny_path, processor, batch, monkeypatch):
    """The planted fault: a layer that is made anew with other random numbers."""
    pytest.importorskip("peft", reason="adapters need peft (pip install peft)")
    plain = gradients(build(tiny_path, processor, "none", **TRAINED["adapters"]), batch)[1]
    checkpoint = recompute.checkpoint
    monkeypatch.setattr(
        recompute, "checkpoint", lambda *words, **named: checkpoint(*words, **named, preserve_rng_state=False)
    )
    found = gradients(build(tiny_path, processor, "selective", **TRAINED["adapters"]), batch)[1]
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


def test_the_tower_has_its_gradients_although_its_input_has_none(tiny_path, processor, batch):
    """With adapters everything before the first block is frozen: a checkpoint that goes by its input gives none."""
    pytest.importorskip("peft", reason="adapters need peft (pip install peft)")
    found = gradients(build(tiny_path, processor, "selective", lora_rank=4, lora_vision=True), batch)[1]
    first = [name for name in found if part_of(name) == "vision" and "blocks.0." in name]
    assert len(first) == 2 * 4, "qkv, proj, fc1 and fc2 of the first block have two matrices each"  # fmt: skip


def flops(model, batch: Batch) -> int:
    """Of matrix products and attention, forward and backward pass together."""
    with FlopCounterMode(display=False) as counter:
        model(batch).backward()
    return counter.get_total_flops()


def test_selective_makes_no_product_twice(tiny_path, processor, batch):
    plain = flops(build(tiny_path, processor, "none"), batch)
    selective = flops(build(tiny_path, processor, "selective"), batch)
    full = flops(build(tiny_path, processor, "full"), batch)
    assert selective == plain, f"{selective / plain:.3f} of the work"
    assert full > 1.2 * plain


def test_a_product_that_is_not_kept_would_be_seen(tiny_path, processor, batch, monkeypatch):
    plain = flops(build(tiny_path, processor, "none"), batch)
    monkeypatch.setattr(recompute, "keep_products", lambda *unused, **also_unused: CheckpointPolicy.PREFER_RECOMPUTE)
    assert flops(build(tiny_path, processor, "selective"), batch) > 1.2 * plain


def held(model, batch: Batch) -> int:
    """Bytes that a forward pass allocates and its backward pass still needs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(batch)
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    del loss
    return sum(changes)


def test_each_keeps_less_than_the_one_before(tiny_path, processor, batch):
    none, selective, full = (held(build(tiny_path, processor, how), batch) for how in ("none", "selective", "full"))
    assert selective < 0.75 * none
    assert full < 0.5 * selective


def test_a_frozen_tower_keeps_nothing_more_under_selective(tiny_path, processor, batch):
    """Kept products of a tower without a backward pass would be memory for nothing."""
    none, selective = (
        held(build(tiny_path, processor, how, freeze=["vision", "merger", "language_model"][:2]), batch)
        for how in ("none", "selective")
    )
    assert selective < none


def test_attentions_of_all_kinds_are_kept_by_their_names():
    import torch.nn.attention.varlen

    operations = [
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._flash_attention_forward.default,
        "flash_attn._flash_attn_varlen_forward.default",
        "flash_attn_3._flash_attn_forward.default",
    ]
    for operation in operations:
        assert recompute.keep_products((), None, operation) == CheckpointPolicy.MUST_SAVE, operation
    for operation in (torch.ops.aten.silu.default, torch.ops.aten._fused_rms_norm.default, torch.ops.aten.mul.Tensor):
        assert recompute.keep_products((), None, operation) == CheckpointPolicy.PREFER_RECOMPUTE, operation
