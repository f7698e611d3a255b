"""Which GPU a run uses and what it can do, where CUDA itself is a stand-in."""

import itertools

import pytest
import torch

from util.attention import Segments
from util.command_line import UserError
from util.config import Config
from util.cost import flops
from util.model import choose_attention, choose_device
from util.parallel import distributed
from util.plan import device_in_words

# Names as nvidia-smi prints them; dense bf16 TFLOP/s of NVIDIA's datasheets (their figures with sparsity, halved).
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA H800": 989,
    "NVIDIA H800 PCIe": 756,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA L40S": 362,
    # not known, though each holds the name of one that is, or is held by it
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": None,
    "NVIDIA H20": None,
    "NVIDIA L40": None,
    "NVIDIA A10": None,
    "NVIDIA H800 NVL": None,
    "NVIDIA GeForce RTX 4090": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_each_card_has_its_own_peak(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = flops.peak_flops(torch.device("cuda"))
    assert peak == (PEAKS[name] and PEAKS[name] * 1e12)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs by all that choose_device asks; the list of those that were made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return chosen


def test_the_chosen_gpu_is_the_current_one(two_gpus):
    second = torch.device("cuda", 1)
    assert choose_device("cuda:1") == second
    assert distributed.join_group(Config(device="cuda:1"), 60).device == second
    assert two_gpus == [second, second]
    for name in ("auto", "cuda", "cuda:0"):
        assert choose_device(name) == torch.device("cuda", 0)
        assert two_gpus.pop() == torch.device("cuda", 0)


def test_each_process_of_a_machine_takes_its_own_gpu(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.join_group(Config(), 60).device == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 1)]
    with pytest.raises(UserError, match="--device cuda:1 names one GPU for the 2 processes"):
        distributed.join_group(Config(device="cuda:1"), 60)


def test_lengths_are_known_without_the_device():
    """A tensor on `meta` has no values that could be read back."""
    for lengths in ([], [5], [7, 7, 3], [1, 2, 2, 1, 1]):
        segments = Segments.of(lengths)
        assert segments.lengths == segments.cu_seqlens.diff().tolist()
        assert segments.to(torch.device("meta")).lengths == lengths
        assert all(one != other for (_, one), (_, other) in itertools.pairwise(segments.runs))


# ---- what is no NVIDIA GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_apple_s_gpu_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match=rf"--device {name}: Apple's GPU has no float64.*; use --device cpu"):
        choose_device(name)


def test_the_plan_of_a_mac_says_that_its_gpu_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert device_in_words(torch.device("cpu")) == "CPU, 8 threads"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_in_words(choose_device("auto")) == "CPU, 8 threads (Apple's GPU is not used)"


def test_a_gpu_under_rocm_is_named_as_untested_and_attends_exactly(two_gpus, monkeypatch):
    """torch calls AMD's GPUs "cuda". The kernels for 16 bits were never compared there, sdpa is exact anywhere."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    device = choose_device("auto")
    assert device_in_words(device) == "AMD Instinct MI300X"
    assert choose_attention("auto", device, torch.bfloat16) == "auto"  # a kernel for each call
    monkeypatch.setattr(torch.version, "hip", "7.2.1")
    assert device_in_words(device) == "AMD Instinct MI300X by ROCm 7.2.1, which is not tested"
    assert choose_attention("auto", device, torch.bfloat16) == "sdpa"
    assert choose_attention("varlen", device, torch.bfloat16) == "varlen"
    assert flops.peak_flops(device) is None


def test_a_gpu_that_is_not_there_is_told_with_the_tool_of_its_maker(monkeypatch):
    for version, tool in ((None, "nvidia-smi"), ("7.2.1", "rocm-smi")):
        monkeypatch.setattr(torch.version, "hip", version)
        with pytest.raises(UserError, match=f"sees no GPU .`{tool}` shows the driver"):
            choose_device("cuda")
