"""benchmarks/gpu_session.sh is rehearsed before a GPU is there: every command of its five calls is one that its script takes,
rows are written as they are measured, and one that fails keeps no other from being measured.

What it prints of a CPU, or of a GPU that is not there, means nothing, and nothing is asserted on it.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import device_time, drawn, mfu, real_run, rows, train_step
from tests.test_phantom import phantom  # noqa: F401  # the fixture
from util.config import Config
from util.cost import flops
from util.model import load_config

ROOT = Path(__file__).resolve().parent.parent
CALLS = ("tests", "mfu", "memory", "7b", "peers")
KEYS = {"row", "command", "commit", "device", "versions", "settings", "size"}
MEASURED = {"seconds", "tokens_per_second", "samples_per_second", "tflops", "parts", "forecast_gib", "losses"}


def session(call: str, out: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", "benchmarks/gpu_session.sh", call, str(out), *flags]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[list[str]]]:
    """Of each call, the words of every command that it would run."""
    folder = tmp_path_factory.mktemp("commands")
    runner = folder / "runner"
    runner.write_text('#!/bin/sh\nprintf "%s\\n" "$@" END >>"$COMMANDS"\n')
    runner.chmod(0o755)
    found = {}
    for call in CALLS:
        file = folder / call
        done = session(call, folder / "out", RUNNER=str(runner), COMMANDS=str(file))
        assert done.returncode == 0, done.stdout + done.stderr
        found[call] = [part.split("\n")[:-1] for part in file.read_text().split("END\n")[:-1]]
    return found


def test_each_command_is_one_that_its_script_takes(commands, monkeypatch):
    parsers = {"mfu.py": mfu.parse, "real_run.py": real_run.parse, "train_step.py": train_step.parse}
    # a flag for a GPU is refused by nobody but the device itself, so no GPU is needed to parse it
    for words in itertools.chain.from_iterable(commands.values()):
        if words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).is_file() for word in words if word.startswith("tests/")), words
            continue
        assert (ROOT / words[0]).is_file(), f"{words[0]} is not there"
        if parse := parsers.get(Path(words[0]).name):
            parse(words[1:])


def test_the_mfu_call_has_each_kind_compiled_and_eager_with_four_micro_batches_and_one(commands):
    asked = set()
    for words in commands["mfu"]:
        own, _ = mfu.parse(words[1:])
        asked |= {(own.compiled, case.kind, case.micro_batches) for case in own.cases}
    wanted = {(compiled, kind, n) for compiled in ("yes", "no") for kind, n in WANTED}
    assert wanted <= asked, f"not asked: {wanted - asked}"


WANTED = [(kind, n) for n in (1, 4) for kind in ("text", "images_448", "images_896", "mixed")]


def test_a_part_that_dies_is_a_row_and_the_next_part_runs(tmp_path):
    runner = tmp_path / "runner"
    runner.write_text("#!/bin/sh\necho it died >&2\nexit 139\n")
    runner.chmod(0o755)
    done = session("7b", tmp_path / "out", RUNNER=str(runner))
    found = read(tmp_path / "out")
    assert done.returncode == 1
    assert "it died" in done.stdout
    assert len(found) >= 4, found
    assert all(row["error"] == "exit code 139" for row in found), found


def test_no_part_begins_when_no_time_is_left(tmp_path):
    done = session("mfu", tmp_path / "out", RUNNER="false", LIMIT="10")
    assert done.returncode == 0, done.stderr
    assert {row["error"] for row in read(tmp_path / "out")} == {"not begun: no time was left"}


def test_an_unknown_call_is_named(tmp_path):
    done = session("speed", tmp_path)
    assert done.returncode == 2
    assert "speed: one of tests, mfu" in done.stderr


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_written_one_by_one_and_a_failure_is_one_of_them(tmp_path):
    """The second case cannot be: its patches leave no room for text. The third is measured all the same."""
    command = [sys.executable, "benchmarks/mfu.py", "--size", "tiny", "--device", "cpu", "--compiled", "no"]
    command += ["--steps", "1", "--warmup", "1", "--cases", "text:2", "load_64_256:1", "mixed:1:256"]
    command += ["--rows", str(tmp_path / "rows.jsonl"), "--profile", str(tmp_path / "profile.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path)
    assert [row["kind"] for row in found] == ["text", "load_64_256", "mixed"]
    for row in found:
        assert row.keys() >= KEYS, row
    assert "leave no room for text" in found[1]["error"]
    for row in (found[0], found[2]):
        assert "error" not in row, row.get("traceback")
        assert row.keys() >= MEASURED, row
        assert row["parts"].keys() == {"tower", "language_model", "head", "optimizer"}
        assert sum(part["seconds"] for part in row["parts"].values()) <= row["seconds"] * 1.01 + 0.001
        tokens = sum(load[0] for load in row["data"]["loads"])
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(tokens, rel=0.02)
    assert len(found[0]["data"]["loads"]) == 2
    profiles = json.loads((tmp_path / "profile.json").read_text())["profiles"]
    assert profiles.keys() == {found[0]["row"], found[2]["row"]}
    assert len(profiles[found[0]["row"]]["costliest"]) == device_time.MOST_TOLD


def test_rows_of_a_session_that_was_cut_are_read(tmp_path, capsys):
    rows.write_row(tmp_path / "rows.jsonl", {"row": "one", "seconds": 1.5})
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"row": "tw')
    assert [row["row"] for row in rows.read_rows(tmp_path / "rows.jsonl")] == ["one"]
    assert "one: 1.500 s/step" in capsys.readouterr().out


def test_what_pytest_found_is_a_row(tmp_path):
    (tmp_path / "tests.xml").write_text(
        "<testsuites><testsuite><testcase classname='tests.test_loss' name='a'/>"
        "<testcase classname='tests.test_loss' name='b'><failure message='assert 1 == 2'>...</failure></testcase>"
        "<testcase classname='tests.test_loss' name='c'><skipped message='no GPU'/></testcase></testsuite></testsuites>"
    )
    found = rows.row_of_tests(tmp_path / "tests.xml")["found"]
    assert found == {"passed": 1, "skipped": 1, "failed": {"tests.test_loss::b": "assert 1 == 2"}}
    assert "error" in rows.row_of_tests(tmp_path / "never_written.xml")


# ---- what is drawn, and what it is worth -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "patches", "tokens", "supervised"), [("images_448", 1024, 256, 100), ("images_896", 4096, 1024, 100)]
)
def test_an_image_has_the_patches_of_its_side(kind, patches, tokens, supervised):
    (batch,) = drawn.Drawer(kind, 0, 1000).step(1, 4000, pinned=False).batches
    samples = int(batch.counts["samples"])
    assert samples == 4000 // (tokens + 150)
    assert len(batch.vision_position_ids) == samples * patches
    assert batch.counts["tokens"] == samples * (tokens + 150)
    assert batch.counts["supervised_tokens"] == samples * supervised


@pytest.mark.parametrize("kind", ["text", "mixed", "load_4096_4096", "load_20480_40960"])
def test_a_step_costs_what_it_says(kind):
    step = drawn.Drawer(kind, 0, 1000).step(2, 6000, pinned=False)
    for batch, (tokens, patches, supervised) in zip(step.batches, step.loads, strict=True):
        assert (tokens, patches, supervised) == (
            len(batch.input_ids),
            len(batch.vision_position_ids),
            len(batch.target_ids),
        )
    if kind.startswith("load"):
        assert step.loads[0][:2] == tuple(int(number) for number in kind.split("_")[1:])
    assert sum(load[0] for load in step.loads) == sum(size.tokens for size in step.sizes)


def test_the_parts_add_up_to_the_whole(tiny_path):
    model_config = load_config(str(tiny_path))
    sizes = drawn.Drawer("mixed", 0, 500, shrink=16).step(2, 512, pinned=False).sizes
    parts = mfu.flops_of_parts(model_config, sizes, Config())
    assert all(value > 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(flops.training_flops(model_config, sizes, Config()), rel=1e-12)


KERNELS = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matrix products",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>": "attention forward",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<80>>": "attention backward",
    "void pytorch_flash::flash_bwd_dot_do_o_kernel<true>": "attention backward",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7": "attention backward",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention forward",
    "triton_red_fused__to_copy_mean_mul_pow_rsqrt_3": "norms",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<BFloat16, float>": "norms",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>": "cross-entropy",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": "optimizer",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "void at::native::elementwise_kernel<128, 4, gpu_kernel_impl<direct_copy_kernel_cuda>>": "copies",
    "triton_poi_fused_mul_silu_silu_backward_1": "pointwise",
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<BFloat16>>": "pointwise",
    "void at::native::indexFuncLargeIndex<BFloat16, long>": "gather and scatter",
    "ncclDevKernel_AllReduce": "other",
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_counts_to_its_kind(name):
    assert device_time.group_of(name) == KERNELS[name]


# ---- the rehearsal ---------------------------------------------------------------------------------------------------

SMALL = ("--size", "tiny", "--device", "cpu", "--steps", "1", "--warmup", "1")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["tests", "mfu"])
def test_a_call_runs_to_its_end_on_the_cpu(call, tmp_path):
    done = session(call, tmp_path, *SMALL, LIMIT="3000")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = read(tmp_path)
    failed = [row for row in found if "error" in row]
    assert not failed, failed[0]
    assert len(found) == {"tests": 1, "mfu": 18}[call]


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on_to_the_same_losses(tmp_path):
    command = [sys.executable, "benchmarks/real_run.py", "--size", "tiny", "--device", "cpu", "--steps", "12"]
    done = subprocess.run([*command, "--rows", str(tmp_path / "rows.jsonl")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    _made, whole, gone_on, compared = read(tmp_path)
    assert len(whole["losses"]) == len(gone_on["losses"]) == 12
    assert real_run.STOP_AFTER <= gone_on["stopped_after"] < 12
    assert compared["found"]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["mfu", "memory", "7b"])
def test_a_call_runs_to_its_end_on_a_gpu_that_is_not_there(call, phantom, request, tmp_path):  # noqa: F811
    request.getfixturevalue("official_processor")  # its folder holds the published config
    folder = Path(os.environ.get("PHANTOM_GPU", ROOT.parent / "shared" / "phantom_gpu"))
    flags = ["--layers", "2", "--steps", "16" if call == "memory" else "1"]  # enough for a signal to come in between
    environment = {"RUNNER": str(folder / "run"), "PHANTOM_GIB": "139", "UNREAL": "yes", "LIMIT": "3000"}
    done = session(call, tmp_path, *flags, PYTHONPATH=str(ROOT), **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    failed = [row for row in read(tmp_path) if "error" in row]
    assert not failed, failed[0]
