"""The mixed bf16/fp32 AdamW: bit for bit torch's over fp32 weights, whatever precision the gradients come in."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import finetune
from tests import runs
from util import checkpoint, mixed_adamw, optimizer
from util.config import Config
from util.mixed_adamw import MixedAdamW, exact_value, join, keep_as_halves, set_exact_value, split
from util.model import build_model, is_stored_in_bf16, load_weights
from util.tensors import run_parameters, trained_parameters

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SHAPES = [(7,), (64, 33), (1,), (3, 5, 7), (700, 37)]
STEPS = 500


def from_bits(*bits: int) -> torch.Tensor:
    """fp32 numbers by the 32 bits of each."""
    return torch.tensor([number - 2**32 if number >= 2**31 else number for number in bits], dtype=torch.int32).view(
        torch.float32
    )


def halves_of(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    nearest = torch.empty_like(exact, dtype=torch.bfloat16)
    remainder = torch.empty_like(exact, dtype=torch.int16)
    split(exact, nearest, remainder)
    return nearest, remainder


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


# ---- one fp32 as two halves -----------------------------------------------------------------------------------------


# bits of the fp32, bits of its bf16, remainder: each written by hand
BY_HAND = {
    "1.0": (0x3F800000, 0x3F80, 0),
    "1.1": (0x3F8CCCCD, 0x3F8D, -0x3333),
    "just below a tie": (0x3F807FFF, 0x3F80, 0x7FFF),
    "a tie, upward to odd": (0x3F808000, 0x3F81, -0x8000),
    "a tie, upward to even": (0x3F818000, 0x3F82, -0x8000),
    "just above a tie": (0x3F808001, 0x3F81, -0x7FFF),
    "a negative tie, away from zero": (0xBF808000, 0xBF81, -0x8000),
    "carries into the exponent": (0x3FFFFFFF, 0x4000, -1),
    "0.0": (0x00000000, 0x0000, 0),
    "-0.0": (0x80000000, 0x8000, 0),
    "the smallest denormal": (0x00000001, 0x0000, 1),
    "the smallest negative denormal": (0x80000001, 0x8000, 1),
    "a denormal that rounds up": (0x0000C000, 0x0001, -0x4000),
    "the largest bf16": (0x7F7F0000, 0x7F7F, 0),
    "the largest fp32": (0x7F7FFFFF, 0x7F80, -1),
    "the lowest fp32": (0xFF7FFFFF, 0xFF80, -1),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_halves_written_by_hand(name):
    bits, upper, missing = BY_HAND[name]
    exact = from_bits(bits)
    nearest, remainder = halves_of(exact)
    assert nearest.view(torch.int16).item() & 0xFFFF == upper
    assert remainder.item() == missing
    assert same_bits(join(nearest, remainder), exact)


def test_every_pattern_of_the_missing_bits_comes_back():
    """All 2**16 of them, under exponents from the smallest to the largest, both signs."""
    low = torch.arange(2**16, dtype=torch.int64)
    for upper in (0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x7F7E, 0x8000, 0xBF80, 0xFF7E):
        bits = (upper << 16) + low
        exact = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
        nearest, remainder = halves_of(exact)
        assert same_bits(join(nearest, remainder), exact), hex(upper)
        gap = (nearest.double() - exact.double()).abs()
        best = (exact.to(torch.bfloat16).double() - exact.double()).abs()
        assert torch.equal(gap, best), f"{upper:x}: not the nearest bf16"


def test_a_large_tensor_is_cut_piece_by_piece(monkeypatch):
    monkeypatch.setattr(mixed_adamw, "PIECE", 1000)
    torch.manual_seed(0)
    exact = torch.randn(123, 45)
    parameter = nn.Parameter(exact.clone())
    keep_as_halves(parameter)
    assert same_bits(exact_value(parameter), exact)
    found = list(mixed_adamw.exact_pieces(parameter))
    assert max(map(len, found)) <= 1000
    assert same_bits(torch.cat(found), exact.flatten())


def test_a_frozen_weight_keeps_missing_bits_only_where_it_has_some():
    whole, cut = (nn.Parameter(torch.tensor(number), requires_grad=False) for number in ([1.5], [1.1]))
    for parameter, missing in ((whole, None), (cut, -0x3333)):
        before = parameter.detach().clone()
        keep_as_halves(parameter)
        found = getattr(parameter, mixed_adamw.REMAINDER)
        assert (None if found is None else found.item()) == missing
        assert same_bits(exact_value(parameter).float(), before)
    set_exact_value(whole, torch.tensor([1.1]))
    assert same_bits(exact_value(whole), torch.tensor([1.1]))
    set_exact_value(cut, torch.tensor([1.5]))
    assert getattr(cut, mixed_adamw.REMAINDER) is None


# ---- the update -----------------------------------------------------------------------------------------------------


def pairs(decay: float) -> tuple[list, torch.optim.Optimizer, list, MixedAdamW]:
    """The same weights twice: in fp32 under torch's AdamW in its plainest form, and in halves under ours."""
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES]
    ours = [nn.Parameter(parameter.detach().clone()) for parameter in theirs]
    for parameter in ours:
        keep_as_halves(parameter)

    def groups(parameters: list) -> list[dict]:  # another rate and another decay, as the model's parts have them
        first = {"params": parameters[:2], "lr": 1e-3, "weight_decay": decay}
        return [first, {"params": parameters[2:], "lr": 3e-3, "weight_decay": 2 * decay}]

    plain = torch.optim.AdamW(groups(theirs), betas=(0.9, 0.999), foreach=False, fused=False)
    return theirs, plain, ours, MixedAdamW(groups(ours), [ours[:3], ours[3:]])


def schedule(trained: torch.optim.Optimizer, step: int) -> None:
    for group, peak in zip(trained.param_groups, (1e-3, 3e-3), strict=True):
        group["lr"] = peak * (1 - step / STEPS)


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of very different sizes, and one that is zero now and then."""
    size = 10 ** (4 * torch.rand(()) - 4) * (torch.rand(()) > 0.02)
    return [(torch.randn(shape) * size).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clips", [False, True])
def test_bit_for_bit_torchs_adamw_over_fp32_weights(dtype, decay, clips):
    theirs, plain, ours, mixed = pairs(decay)
    module = nn.ParameterList(ours)
    if dtype == torch.float32:
        optimizer.sum_gradients_in_fp32(module)
    for step in range(STEPS):
        schedule(plain, step)
        schedule(mixed, step)
        for parameter, twin, gradient in zip(ours, theirs, gradients(dtype), strict=True):
            # a part without a gradient in some steps: its weights, moments and number of steps stay
            gone = step % 7 == 3 and parameter is ours[1]
            parameter.grad = None if gone else gradient
            twin.grad = None if gone else gradient.float().clone()
        norm = optimizer.clip_gradient(module, mixed, 0.5 if clips else 0.0)
        expected = torch.nn.utils.get_total_norm([twin.grad for twin in theirs if twin.grad is not None])
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, msg=f"step {step}: norm {norm}, not {expected}")
        if clips:
            torch.nn.utils.clip_grads_with_norm_(theirs, 0.5, norm)
        plain.step()
        mixed.step()
        for parameter, twin in zip(ours, theirs, strict=True):
            assert same_bits(exact_value(parameter), twin.detach()), f"step {step}, {tuple(twin.shape)}"
    for parameter, twin in zip(ours, theirs, strict=True):
        for name, value in plain.state[twin].items():
            found = mixed.state[parameter][name]
            assert torch.equal(found, value), name
            assert found.dtype == value.dtype == torch.float32, name


def test_a_factor_serves_one_step():
    _, _, ours, mixed = pairs(0.0)
    for parameter in ours:
        parameter.grad = torch.ones_like(parameter)
    optimizer.clip_gradient(nn.ParameterList(ours), mixed, 0.5)
    assert mixed.gradient_factor < 1
    mixed.step()
    assert mixed.gradient_factor is None


def test_small_gradients_of_many_passes_are_not_lost():
    """1 + 1000 x 0.001: a sum in bf16, whose neighbours of 1 are 0.0078 apart, would stay at 1."""
    parameter = nn.Parameter(torch.zeros(4))
    keep_as_halves(parameter)
    optimizer.sum_gradients_in_fp32(nn.ParameterList([parameter]))
    small = torch.tensor(0.001, dtype=torch.bfloat16)
    parameter.sum().backward()
    for _ in range(1000):
        (parameter * small).sum().backward()
    assert parameter.grad.dtype == torch.float32
    torch.testing.assert_close(parameter.grad, torch.full((4,), 1 + 1000 * small.item()), rtol=1e-5, atol=0)


def test_gradients_stay_in_bf16_where_each_step_has_one_pass(tiny_path, processor):
    config = Config(device="cpu", dtype="bfloat16")
    for micro_batches, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        model = build_model(config, str(tiny_path), processor, CPU)
        optimizer.build_optimizer(model, config, micro_batches)
        (sum(parameter.float().sum() for parameter in model.parameters())).backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}


def test_bytes_per_parameter(tiny_path, processor):
    """14 with one pass a step, 16 with several."""
    config = Config(device="cpu", dtype="bfloat16")
    for micro_batches, expected in ((1, 14), (2, 16)):
        model = build_model(config, str(tiny_path), processor, CPU)
        trained = optimizer.build_optimizer(model, config, micro_batches)
        for parameter in model.parameters():
            dtype = torch.float32 if micro_batches > 1 else torch.bfloat16
            parameter.grad = torch.zeros_like(parameter, dtype=dtype)
        trained.step()
        held = 0
        for parameter in model.parameters():
            tensors = [parameter, parameter.grad, getattr(parameter, mixed_adamw.REMAINDER)]
            tensors += [trained.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
            held += sum(tensor.nbytes for tensor in tensors)
        assert held == expected * sum(parameter.numel() for parameter in model.parameters())


# ---- loading --------------------------------------------------------------------------------------------------------


def test_a_model_in_fp32_keeps_all_its_bits(tiny_path, processor):
    exact = dict(load_weights(str(tiny_path), torch.float32, CPU).named_parameters())
    model = build_model(Config(device="cpu", dtype="bfloat16", freeze=["vision"]), str(tiny_path), processor, CPU).model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert same_bits(exact_value(parameter), exact[name].detach()), name


@pytest.fixture
def narrow(tiny_path, tmp_path) -> Path:
    """tiny as published checkpoints are, in bf16."""
    folder = tmp_path / "narrow"
    shutil.copytree(tiny_path, folder)
    load_weights(str(tiny_path), torch.bfloat16, CPU).save_pretrained(folder)
    return folder


def test_a_model_in_bf16_is_never_widened(narrow, processor, monkeypatch):
    precisions = []

    def watched(path, dtype, device):
        precisions.append(dtype)
        return load_weights(path, dtype, device)

    monkeypatch.setattr("util.model.load_weights", watched)
    model = build_model(Config(device="cpu", dtype="bfloat16", freeze=["vision"]), str(narrow), processor, CPU)
    assert precisions == [torch.bfloat16]
    for name, parameter in model.named_parameters():
        missing = getattr(parameter, mixed_adamw.REMAINDER, None)
        assert (missing is None) == (".visual." in name and ".merger." not in name), name
        assert missing is None or not missing.any()


def test_the_files_say_what_a_model_is_stored_in(narrow, tiny_path, tmp_path):
    """And not its config, which may be that of another copy."""
    assert is_stored_in_bf16(str(narrow))
    assert not is_stored_in_bf16(str(tiny_path))
    for file in tiny_path.glob("*.safetensors"):
        shutil.copy(file, narrow)
    assert not is_stored_in_bf16(str(narrow))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tiny_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def run(name: str, **changes) -> Path:
        own = {"dtype": "bfloat16", "max_steps": 4, "global_batch_size": 4, "save_every": 2, "learning_rate": 1e-3}
        return Path(finetune.train(Config(**runs.settings(tiny_path, tmp_path / name, **{**own, **changes}))))

    return run


@pytest.mark.parametrize("kind", [{}, {"freeze": ["vision"]}, {"lora_rank": 4, "lora_vision": True}])
def test_a_checkpoint_of_fp32_weights_is_taken_up_exactly(train, tiny_path, processor, kind):
    """Made by a float32 run, whose weights a bf16 one rounds nowhere: what it saves at once is the same bits."""
    run = train("wide", dtype="float32", max_steps=2, **kind)
    written = run / "checkpoints" / "step_000002"
    config = Config(device="cpu", dtype="bfloat16", learning_rate=1e-3, **kind)
    model = build_model(config, str(tiny_path), processor, CPU)
    trained = optimizer.build_optimizer(model, config)
    assert isinstance(trained, MixedAdamW)
    checkpoint.load_checkpoint(written, model, trained)
    assert {parameter.dtype for parameter in trained_parameters(model).values()} == {torch.bfloat16}
    saver = checkpoint.Saver(run / "again", Config(model=str(tiny_path), device="cpu", save_every=1), 2, print, {})
    saver.save(model, trained, {"step": 2}, is_last=True)
    expected, found = (tensors_of(folder) for folder in (written, run / "again" / "checkpoints" / "step_000002"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = checkpoint.TensorReader(folder)
    return dict(reader.read_in_parts(key for key in reader.read_metadata().state_dict_metadata if "random" not in key))


def test_a_run_in_bf16_goes_on_in_float32_and_back(train):
    """Each takes up what the other left: losses go on falling from where they were."""
    narrow = train("narrow")
    for dtype in ("float32", "bfloat16"):
        shutil.rmtree(narrow / "checkpoints" / "step_000004", ignore_errors=True)
        assert len(list((narrow / "checkpoints").glob("step_*"))) == 1
        train("narrow", resume="auto", dtype=dtype, resume_anyway=True)
        first, last = (runs.metrics(narrow)[number] for number in (0, -1))
        assert last < first


def test_a_save_beside_the_training_holds_the_weights_as_they_were(train, monkeypatch):
    """The copy is made while the next passes run, and the next update waits for it."""
    slow = checkpoint.Stager.put_together

    def slower(self, name, parameter):
        import time

        time.sleep(0.002)
        return slow(self, name, parameter)

    whole = train("whole", max_steps=3, save_every=2)
    monkeypatch.setattr(checkpoint.Stager, "put_together", slower)
    again = train("again", max_steps=3, save_every=2)
    for step in ("step_000002", "step_000003"):
        ours, theirs = (tensors_of(run / "checkpoints" / step) for run in (again, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), step


def test_who_asks_for_trained_tensors_gets_those_of_the_optimizer(tiny_path, processor):
    config = Config(device="cpu", dtype="bfloat16", lora_rank=4)
    model = build_model(config, str(tiny_path), processor, CPU)
    trained = optimizer.build_optimizer(model, config)
    own = {parameter for group in trained.param_groups for parameter in group["params"]}
    assert {p for p in run_parameters(model).values() if p.requires_grad} == own
    assert {p for listed in trained.together for p in listed} == own
