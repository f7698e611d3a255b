"""`--optimizer adamw_8bit`: moments in 8 bits over weights that stay exact.

bitsandbytes' class is for GPUs. `EightBit` behaves as it does, on the CPU: names, dtypes and shapes of its states are
those of bitsandbytes 0.50.2 (optim/optimizer.py, Optimizer2State), and so is what it refuses.
"""

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import finetune
from tests import runs
from tests.runs import metrics, same_run
from util import checkpoint, optimizer, small_adamw
from util.command_line import UserError
from util.config import Config
from util.mixed_adamw import exact_value
from util.model import build_model

BUILD = optimizer.build_optimizer
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
BLOCK, LEAST = 256, 4096  # elements that share a scale; a smaller tensor keeps its moments in float32
LEVELS = torch.linspace(-1, 1, 255)


class EightBit(torch.optim.Optimizer):
    """Adam with decoupled decay whose moments are kept in blocks of 8 bits, as bitsandbytes keeps them."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, place)
                    self.update_step(group, parameter, number, place)

    @torch.no_grad()
    def init_state(self, group: dict, parameter: torch.Tensor, number: int, place: int) -> None:
        state = self.state[parameter]
        small = parameter.numel() < LEAST
        state["step"] = 0
        for number in "12":
            state[f"state{number}"] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
            if not small:
                state[f"qmap{number}"] = LEVELS.clone()
                state[f"absmax{number}"] = torch.zeros(-(-parameter.numel() // BLOCK))

    @torch.no_grad()
    def update_step(self, group: dict, parameter: torch.Tensor, number: int, place: int) -> None:
        state = self.state[parameter]
        tensors = [parameter, parameter.grad, *(x for x in state.values() if isinstance(x, torch.Tensor))]
        for tensor in tensors:  # the kernel takes addresses
            assert type(tensor) in (torch.Tensor, torch.nn.Parameter), f"got mixed torch.Tensor and {type(tensor)}"
            assert tensor.is_contiguous()
        state["step"] += 1
        (beta1, beta2), step, grad = group["betas"], state["step"], parameter.grad
        first = self.read(state, "1").mul(beta1).add(grad, alpha=1 - beta1)
        second = self.read(state, "2").mul(beta2).addcmul(grad, grad, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        spread = (second / (1 - beta2**step)).sqrt() + group["eps"]
        parameter.addcdiv_(first, spread, value=-group["lr"] / (1 - beta1**step))
        self.write(state, "1", first)
        self.write(state, "2", second)

    def read(self, state: dict, number: str) -> torch.Tensor:
        kept = state[f"state{number}"]
        if kept.dtype == torch.float32:
            return kept
        scales = state[f"absmax{number}"].repeat_interleave(BLOCK)[: kept.numel()]
        return state[f"qmap{number}"][kept.long()] * scales.view_as(kept)

    def write(self, state: dict, number: str, values: torch.Tensor) -> None:
        kept = state[f"state{number}"]
        if kept.dtype == torch.float32:
            kept.copy_(values)
            return
        blocks = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        state[f"absmax{number}"].copy_(blocks.abs().amax(1))
        shares = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
        kept.copy_(((shares + 1) * 127).round().flatten()[: values.numel()].view_as(kept))


def real_class():
    """bitsandbytes' own, which has had kernels for the CPU since 0.50."""
    from bitsandbytes import optim

    weight = torch.nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones_like(weight)
    try:
        optim.AdamW8bit([weight]).step()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this bitsandbytes has no kernels for the CPU ({error})")
    return optim.AdamW8bit


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def eight_bit(request, monkeypatch):
    """The class that stands for bitsandbytes' in this test; every run trains with it."""
    pytest.importorskip("bitsandbytes")
    found = EightBit if request.param == "stand-in" else real_class()
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit", found)

    def build(model, config, micro_batches=1):  # without the refusal of a CPU
        if micro_batches > 1:
            optimizer.sum_gradients_in_fp32(model)
        return small_adamw.eight_bit_adamw(optimizer.parameter_groups(model, config))

    monkeypatch.setattr(optimizer, "build_optimizer", build)
    return found


@pytest.fixture
def train(tiny_path, tmp_path, monkeypatch):
    """Train tiny in bf16; return the run directory."""
    monkeypatch.chdir(ROOT)

    def run(name: str, **changes) -> Path:
        own = {"dtype": "bfloat16", "max_steps": 4, "global_batch_size": 4}
        return Path(finetune.train(Config(**runs.settings(tiny_path, tmp_path / name, **{**own, **changes}))))

    return run


def test_resumed_it_is_the_run_that_was_not_stopped(train, eight_bit):
    whole = train("whole")
    halted = train("halted", save_every=2)
    shutil.rmtree(halted / "checkpoints" / "step_000004")
    same_run(train("halted", save_every=2, resume="auto"), whole)
    assert len(set(metrics(whole))) == 4, "nothing was trained"


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 2, "lora_vision": True}])
def test_a_step_left_out_leaves_no_gradient_behind(train, eight_bit, adapters, monkeypatch):
    """What the next step computes is what it computes where the left-out one never was."""
    from util.loss import PackedLoss

    forward, calls = PackedLoss.forward, []

    def broken(self, batch, *args, **kwargs):
        calls.append(1)
        return forward(self, batch, *args, **kwargs) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(PackedLoss, "forward", broken)
    run = train("run", max_steps=3, **adapters)
    norms = metrics(run, "grad_norm")
    assert [norm is None for norm in norms] == [False, True, False]
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(run).values())


def test_bf16_weights_are_updated_as_fp32_ones_are(tiny_path, processor, eight_bit):
    """Bit for bit, from gradients in bf16 that are clipped on the way; no fp32 copy is held afterwards."""
    config = Config(device="cpu", dtype="bfloat16", freeze=["merger"])
    model = build_model(config, str(tiny_path), processor, CPU)
    groups = optimizer.parameter_groups(model, config)
    plain = [{**group, "params": [plain_copy(p) for p in group["params"]]} for group in groups]
    ours, alone = optimizer.build_optimizer(model, config), eight_bit(plain, betas=(0.9, 0.999))
    pairs = []
    for group, copies in zip(ours.param_groups, plain, strict=True):
        pairs += zip(group["params"], copies["params"], strict=True)
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter, twin in pairs:
            parameter.grad = torch.randn(twin.shape, dtype=torch.bfloat16)
            twin.grad = parameter.grad.float()
        norm = optimizer.clip_gradient(model, ours, 1.0)
        twins = [twin for _, twin in pairs]
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm([twin.grad for twin in twins]))
        torch.nn.utils.clip_grads_with_norm_(twins, 1.0, norm)
        ours.step()
        alone.step()
        ours.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert {*ours.state} == {parameter for parameter, _ in pairs}
    assert all(torch.equal(exact_value(parameter), twin) for parameter, twin in pairs)


def plain_copy(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(exact_value(parameter).clone())


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_states_are_loaded_as_the_optimizer_made_them(kind, dtype, tiny_path, processor, tmp_path, eight_bit):
    """Kind of tensor, dtype, device, shape and value of every state, by the name of the model's parameter."""
    config = Config(device="cpu", dtype=dtype, save_every="1")

    def build():
        model = build_model(config, str(tiny_path), processor, CPU)
        if kind == "adamw_8bit":
            return model, optimizer.build_optimizer(model, config)
        return model, BUILD(model, config)

    model, before = build()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before.step()
    before.zero_grad()
    saver = checkpoint.Saver(tmp_path, config, 1, print, {})
    saver.save(model, before, {"step": 1})
    saver.wait()
    expected = states_by_name(model, before)
    model, after = build()
    checkpoint.load_checkpoint(tmp_path / "checkpoints" / "step_000001", model, after)
    found = states_by_name(model, after)
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        assert found[name].keys() == state.keys(), name
        for key, value in state.items():
            told = f"{name} {key}"
            other = found[name][key]
            assert type(other) is type(value), told
            if isinstance(value, torch.Tensor):
                assert (other.dtype, other.device, other.shape) == (value.dtype, value.device, value.shape), told
                assert not other.requires_grad, told
                value, other = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (value, other))
                assert torch.equal(other, value), told
            else:
                assert other == value, told


@pytest.mark.parametrize(("name", "package"), [("adamw_8bit", "bitsandbytes"), ("adamw_flash", "flashoptim")])
def test_a_small_optimizer_says_what_it_needs(name, package, tiny_path, processor, monkeypatch):
    with pytest.raises(UserError, match=f"--optimizer {name} needs a GPU; use --optimizer adamw"):
        Config(device="cpu", optimizer=name)
    model = build_model(Config(device="cpu", dtype="bfloat16"), str(tiny_path), processor, CPU)
    with pytest.raises(UserError, match=f"--optimizer {name} needs a GPU; use --optimizer adamw"):
        optimizer.build_optimizer(model, Config(optimizer=name))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"--optimizer {name} needs {package}: pip install {package}"):
        small_adamw.BUILD[name]([])


def test_moments_of_another_optimizer_are_refused(tiny_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = runs.settings(tiny_path, tmp_path / "run", max_steps=1, save_every=1, global_batch_size=1)
    finetune.train(Config(**first))
    later = {**first, "device": "auto", "optimizer": "adamw_8bit", "resume": "auto", "resume_anyway": True}
    with pytest.raises(UserError, match="holds the moments of --optimizer adamw, which"):
        finetune.train(Config(**later))


def states_by_name(model, trained) -> dict[str, dict]:
    names = checkpoint.optimized(model, trained)
    return {name: copy.copy(trained.state[parameter]) for name, parameter in names.items()}
