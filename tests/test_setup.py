"""util/setup.sh and finetune.sh on machines that lack something: one message that names it and the remedy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def machine(tmp_path):
    """A copy of the scripts without .venv, and a folder that comes first in PATH."""
    home, programs = tmp_path / "project", tmp_path / "programs"
    (home / "util").mkdir(parents=True)
    programs.mkdir()
    for name in ("finetune.sh", "run_tests.sh", "requirements.txt", "requirements-dev.txt", "util/setup.sh"):
        shutil.copy(ROOT / name, home / name)

    def run(*words: str, programs_only: bool = False, **environment: str) -> tuple[int, str]:
        path = str(programs) if programs_only else f"{programs}:/usr/bin:/bin"
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VIRTUAL_ENV", "PYTHONPATH")}
        done = subprocess.run(["/bin/bash", *words], cwd=home, env={**clean, "PATH": path, **environment},
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    run.program = lambda name, text: write_program(programs / name, text)
    run.home = home
    return run


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_missing_venv_module_is_named_with_the_command_that_adds_it(machine):
    machine.program("python3", f'case "$*" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"')
    code, printed = machine("finetune.sh")
    assert code == 1
    assert f"sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in printed
    assert not (machine.home / ".venv").exists()


def test_an_old_python_is_named(machine):
    machine.program("python3", 'case "$*" in --version) echo Python 3.9.2;; *) exit 1;; esac')
    code, printed = machine("finetune.sh")
    assert code == 1
    assert "Python 3.9.2 is too old: Python 3.11 or newer is needed" in printed


def test_an_environment_that_lacks_packages_is_not_installed_into(machine, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True)
    for environment in ({"PYTHON": str(tmp_path / "empty/bin/python")}, {"VIRTUAL_ENV": str(tmp_path / "empty")}):
        code, printed = machine("finetune.sh", **environment)
        assert code == 1
        assert "lacks: torch torchvision transformers qwen-vl-utils av pillow" in printed
        assert "-m pip install -r requirements.txt" in printed


def test_a_python_that_is_not_there_is_named(machine):
    code, printed = machine("finetune.sh", PYTHON="/no/such/python")
    assert code == 1
    assert "PYTHON=/no/such/python: no such program" in printed


def test_a_gpu_that_torch_cannot_use_stops_the_run(machine):
    """nvidia-smi lists a GPU, torch sees none: an old driver. It must not train on the CPU without a word."""
    machine.program("nvidia-smi", 'case "$*" in -L) echo "GPU 0: NVIDIA H100";; *) echo 470.57.02;; esac')
    code, printed = machine("finetune.sh", PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert code == 1
    assert "nvidia-smi sees a GPU, but torch cannot use it" in printed
    assert "the driver is 470.57.02" in printed


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", ["finetune", "finetune_distributed"])
def test_help_is_that_of_the_python_script_and_needs_nothing(script, flag, machine):
    """On a machine with no environment and a GPU that torch cannot use: no install, no training, no demonstration."""
    machine.program("nvidia-smi", 'case "$*" in -L) echo "GPU 0: NVIDIA H100";; *) echo 470.57.02;; esac')
    machine.program("python3", f'echo "ran: $*" >>"$0.log"; exec {sys.executable} -S "$@"')  # -S: without packages
    shutil.copy(ROOT / "finetune_distributed.sh", machine.home)
    for name in ("finetune.py", "finetune_distributed.py"):
        shutil.copy(ROOT / name, machine.home)
    shutil.copytree(ROOT / "util", machine.home / "util", dirs_exist_ok=True, ignore=shutil.ignore_patterns("tiny*"))
    code, printed = machine(f"{script}.sh", "--data", "a.json", flag)
    assert code == 0, printed
    wanted = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert printed == wanted.stdout
    assert "--learning_rate" in printed
    assert not (machine.home / ".venv").exists()
    ran = (machine.home.parent / "programs" / "python3.log").read_text()
    assert ran == f"ran: {script}.py --help\n", "one process"


FAKE_PYTHON = """
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;
    *"pip install"*) echo "asked: $*"; exit {code};;
    -) echo;;
    *) exit 0;;
esac"""


def test_an_install_that_fails_names_the_versions_that_were_tested(machine):
    """The newest are tried: what was tested last may have vanished from the registry since."""
    machine.program("python3", FAKE_PYTHON.format(code=1))
    code, printed = machine("finetune.sh")
    assert code == 1
    (asked,) = [line for line in printed.splitlines() if line.startswith("asked: ")]
    assert asked.endswith("/requirements.txt")
    assert "constraints" not in asked
    assert printed.splitlines()[-1] == ".venv/bin/python -m pip install -r requirements.txt -c constraints.txt"
    assert (ROOT / "constraints.txt").exists()
    assert not list((machine.home / ".venv").glob("installed-*")), "the next start must try again"


def test_an_install_that_succeeds_is_not_repeated(machine):
    machine.program("python3", FAKE_PYTHON.format(code=0))
    first, second = machine("finetune.sh"), machine("finetune.sh")
    assert [code for code, _ in (first, second)] == [0, 0]
    assert "asked: " in first[1]
    assert "asked: " not in second[1]
    assert "constraints.txt" not in first[1]


@pytest.fixture
def demonstration(machine):
    """What ./finetune.sh without arguments hands to finetune.py where there is no GPU."""
    machine.program("nvidia-smi", "exit 1")
    machine.program("any_python", '[ "$1" = - ] || echo "ran: $*"')

    def command() -> str:
        code, printed = machine("finetune.sh", PYTHON="any_python")
        assert code == 0, printed
        (ran,) = [line for line in printed.splitlines() if line.startswith("ran: finetune.py")]
        return ran.removeprefix("ran: finetune.py ")

    command.runs = machine.home / "train_output"
    return command


def make_run(run: Path, *files: str) -> None:
    for file in files:
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).touch()


SAVED = "checkpoints/step_000300/state.json"
MODEL = "config.json"


def test_a_stopped_demonstration_goes_on(demonstration):
    assert "--model tiny" in demonstration()
    make_run(demonstration.runs / "demonstration_2026-01-01_00-00-00", SAVED, MODEL)
    make_run(demonstration.runs / "demonstration_2026-01-02_00-00-00", SAVED)
    assert demonstration() == "--resume train_output/demonstration_2026-01-02_00-00-00"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("demonstration_2026-01-01_00-00-00", [SAVED, MODEL]),  # it is complete
        ("demonstration_2026-01-01_00-00-00", ["metrics.jsonl"]),  # nothing of it is saved
        ("2026-01-01_00-00-00", [SAVED]),  # it is no demonstration
        ("demonstration", [SAVED]),  # it is the base of recipes/chartqa.sh
    ],
)
def test_no_other_run_is_taken_for_a_stopped_demonstration(name, files, demonstration):
    make_run(demonstration.runs / name, *files)
    words = demonstration().split()
    assert "--resume" not in words
    assert words[words.index("--output_dir") + 1].startswith("train_output/demonstration_20")
