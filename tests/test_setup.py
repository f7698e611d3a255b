"""util/setup.sh and finetune.sh on machines that lack something: one message that names it and the remedy."""

import os
import re
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
    for name in ("finetune.sh", "finetune_distributed.sh", "run_tests.sh", "requirements.txt", "requirements-dev.txt",
                 "util/help.sh", "util/setup.sh", "util/gpu.sh"):  # fmt: skip
        shutil.copy(ROOT / name, home / name)

    def run(*words: str, programs_only: bool = False, **environment: str) -> tuple[int, str]:
        path = str(programs) if programs_only else f"{programs}:/usr/bin:/bin"
        ours = ("PYTHON", "VIRTUAL_ENV", "PYTHONPATH", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "STARTED_IN",
                "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # fmt: skip
        clean = {k: v for k, v in os.environ.items() if k not in ours}
        done = subprocess.run(["/bin/bash", *words], cwd=home, env={**clean, "PATH": path, **environment},
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    run.program = lambda name, text: write_program(programs / name, text)
    run.programs = programs
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


def has_only_an_old_python(machine, version: str) -> None:
    machine.program("python3", f'case "$*" in --version) echo Python {version};; *) exit 1;; esac')
    for minor in range(11, 15):  # as a manager of Pythons puts them on PATH: names for which it has none
        machine.program(f"python3.{minor}", "exit 127")


def test_an_old_python_is_named(machine):
    has_only_an_old_python(machine, "3.9.2")
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


# ---- the environments of uv and conda -------------------------------------------------------------------------------

WHICH = ("-c", "set -euo pipefail; source util/setup.sh requirements.txt; echo took $python")
MADE_BY_UV = "implementation = CPython\nuv = 0.13.9\n"  # in the pyvenv.cfg that uv 0.13.9 writes


def make_environment(folder: Path, complete: bool, cfg: str = "") -> Path:
    """A virtual environment without pip; if it is complete, with empty modules by the names of all packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    with open(folder / "pyvenv.cfg", "a", encoding="utf-8") as file:
        file.write(cfg)
    (site,) = folder.glob("lib/python*/site-packages")
    packages = ("torch", "torchvision", "transformers", "qwen_vl_utils", "av", "PIL", "matplotlib", "tqdm")
    for package in packages if complete else ():
        (site / f"{package}.py").touch()
    return folder


def make_conda(folder: Path, python: Path | None) -> Path:
    """A folder as conda makes it, with the Python of another environment, or with none."""
    (folder / "conda-meta").mkdir(parents=True)
    (folder / "bin").mkdir()
    if python:
        write_program(folder / "bin/python", f'exec {python}/bin/python "$@"')
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("complete") / "environment", complete=True)


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("empty") / "environment", complete=False)


def test_an_environment_of_uv_is_used_as_it_is(machine, tmp_path):
    """There is no pip in it. The one in the project's folder need not be active."""
    make_environment(machine.home / ".venv", complete=True, cfg=MADE_BY_UV)
    assert machine(*WHICH) == (0, "took .venv/bin/python\n")
    other = make_environment(tmp_path / "other", complete=True, cfg=MADE_BY_UV)
    assert machine(*WHICH, VIRTUAL_ENV=str(other)) == (0, f"took {other}/bin/python\n")


def test_what_an_environment_of_uv_lacks_is_installed_by_uv(machine, tmp_path):
    make_environment(machine.home / ".venv", complete=False, cfg=MADE_BY_UV)
    code, printed = machine("finetune.sh")
    assert code == 1
    assert "install them: uv pip install --python .venv/bin/python -r requirements.txt" in printed
    assert "or remove .venv" in printed
    other = make_environment(tmp_path / "my envs/other", complete=False, cfg=MADE_BY_UV)
    for environment in ({"VIRTUAL_ENV": str(other)}, {"PYTHON": f"{other}/bin/python"}):
        code, printed = machine("finetune.sh", **environment)
        assert code == 1
        quoted = str(other).replace(" ", "\\ ")
        assert f"install them: uv pip install --python {quoted}/bin/python -r requirements.txt" in printed
    # from another folder, as it can be pasted there
    done = subprocess.run(["/bin/bash", f"{machine.home}/finetune.sh"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": str(other)}, timeout=120)  # fmt: skip
    assert f"cd {machine.home} && uv pip install" in done.stderr


def test_an_active_conda_environment_is_used_as_it_is(machine, tmp_path, complete):
    prefix = make_conda(tmp_path / "conda/envs/lab", complete)
    active = {"CONDA_PREFIX": str(prefix), "CONDA_DEFAULT_ENV": "lab"}
    assert machine(*WHICH, **active) == (0, f"took {prefix}/bin/python\n")
    assert not (machine.home / ".venv").exists()


def test_what_a_conda_environment_lacks_is_named_with_its_own_command(machine, tmp_path, empty):
    prefix = make_conda(tmp_path / "conda/envs/lab", empty)
    active = {"CONDA_PREFIX": str(prefix), "CONDA_DEFAULT_ENV": "lab"}
    pip = f"{prefix}/bin/python -m pip install -r requirements.txt"
    code, printed = machine("finetune.sh", **active)  # it has no pip either
    assert code == 1
    assert f"install them: conda install --prefix {prefix} 'python>=3.11' pip && {pip}" in printed
    assert "or deactivate that environment" in printed
    write_program(prefix / "bin/python", f'[ "$*" = "-m pip --version" ] || exec {empty}/bin/python "$@"')
    code, printed = machine("finetune.sh", **active)
    assert code == 1
    assert f"install them: {pip}\n" in printed
    (prefix / "bin/python").unlink()  # `conda create --name lab` puts none there
    code, printed = machine("finetune.sh", **active)
    assert code == 1
    assert f"the conda environment {prefix} has no Python" in printed
    assert f"conda install --prefix {prefix} 'python>=3.11' pip && {pip}" in printed
    assert not (machine.home / ".venv").exists()


def test_conda_s_base_environment_is_never_installed_into(machine, tmp_path, complete, empty):
    """It is active in every shell of many people. Where it has all packages, someone has put them there."""
    base = make_conda(tmp_path / "conda", empty)
    active = {"CONDA_PREFIX": str(base), "CONDA_DEFAULT_ENV": "base"}
    machine.program("python3", FAKE_PYTHON.format(code=0))
    code, printed = machine(*WHICH, **active)
    assert code == 0
    assert "conda's base environment is left as it is" in printed
    assert "first use: making .venv" in printed
    assert printed.endswith("took .venv/bin/python\n")
    shutil.rmtree(machine.home / ".venv")
    write_program(base / "bin/python", f'exec {complete}/bin/python "$@"')
    assert machine(*WHICH, **active) == (
        0, f"conda's base environment has all packages: it is used\ntook {base}/bin/python\n"
    )  # fmt: skip


def test_of_two_active_environments_the_last_one_counts(machine, tmp_path, complete):
    """PATH tells: each puts itself before the other."""
    conda = make_conda(tmp_path / "conda/envs/lab", complete)
    both = {"VIRTUAL_ENV": str(complete), "CONDA_PREFIX": str(conda), "CONDA_DEFAULT_ENV": "lab"}
    for last in (complete, conda):
        (machine.programs / "python").unlink(missing_ok=True)
        path = f'export PATH="{last}/bin:$PATH"; '
        assert machine("-c", path + WHICH[1], **both) == (0, f"took {last}/bin/python\n")
    base = {**both, "CONDA_DEFAULT_ENV": "base"}
    assert machine("-c", path + WHICH[1], **base) == (0, f"took {complete}/bin/python\n")


def test_an_environment_that_is_too_old_is_named(machine, tmp_path, empty):
    old = "import sys; sys.version_info = (3, 9, 2); exec(sys.stdin.read())"
    (tmp_path / "old/bin").mkdir(parents=True)
    write_program(tmp_path / "old/bin/python", f"exec {empty}/bin/python -c '{old}'")
    code, printed = machine("finetune.sh", VIRTUAL_ENV=str(tmp_path / "old"))
    assert code == 1
    assert "bin/python is too old: Python 3.11 or newer (it is 3.9) is needed" in printed


def test_an_environment_that_was_removed_is_named(machine, tmp_path):
    code, printed = machine("finetune.sh", VIRTUAL_ENV=str(tmp_path / "gone"))
    assert code == 1
    assert f"the environment {tmp_path}/gone has no Python" in printed


def test_a_newer_python_beside_an_old_python3_is_taken(machine):
    """As on Ubuntu 22.04 and Red Hat 9."""
    has_only_an_old_python(machine, "3.9.2")
    machine.program("python3.12", FAKE_PYTHON.format(code=0))
    code, printed = machine(*WHICH)
    assert code == 0, printed
    assert "asked: -m pip install" in printed


# ---- other systems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["finetune.sh", "finetune_distributed.sh"])
def test_git_bash_on_windows_is_told_of_wsl(script, machine):
    machine.program("uname", "echo MINGW64_NT-10.0-22631")
    code, printed = machine(script)
    assert code == 2
    assert (
        printed == f"{script}: does not run on Windows itself, but in its Linux: run `wsl --install`, then this there\n"
    )


def test_a_mac_is_told_how_it_gets_python(machine):
    machine.program("uname", "echo Darwin")
    has_only_an_old_python(machine, "3.9.6")  # Apple's own
    code, printed = machine("finetune.sh")
    assert code == 1
    assert "Python 3.9.6 is too old" in printed
    assert "brew install python" in printed
    assert "apt" not in printed


NEITHER_IN_BASH_3_NOR_IN_MACOS = {
    "readlink -f, or realpath": r"readlink -f|\brealpath\b",
    "sed -i, whose BSD form differs": r"\bsed (-\w+ )*-i",
    "a program of Linux alone": r"\b(nproc|timeout|tac|numfmt|shuf|md5sum|sha256sum|free|ldconfig)\b(?=\s|\))(?!\s*=)",
    "date -d": r"\bdate (-\w+ )*(-d|--date)",
    "grep -P": r"\bgrep -\w*P",
    "an associative array, a name reference": r"\b(declare|local|typeset) -\w*[An]",
    "mapfile": r"\b(mapfile|readarray)\b",
    "another case": r"\$\{\w+(,,?|\^\^?)\}",
    "&>> and |&": r"&>>|\|&",
    "an array from its end": r"\[-\d+\]\}",
    "printf of the time": r"printf '?%\(",
}


@pytest.mark.parametrize(
    "script",
    sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.glob("**/*.sh")
        # gpu_session.sh is for machines with an NVIDIA GPU alone, which run Linux
        if ".venv" not in path.parts and path.name != "gpu_session.sh"
    ),
)
def test_shell_scripts_keep_to_bash_3_2_and_the_tools_of_macos(script):
    lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found = {what: re.findall(pattern, code) for what, pattern in NEITHER_IN_BASH_3_NOR_IN_MACOS.items()}
    assert not {what: where for what, where in found.items() if where}
    subprocess.run(["/bin/bash", "--posix", "-n", ROOT / script], check=True)


# ---- GPUs -----------------------------------------------------------------------------------------------------------


def test_a_gpu_that_torch_cannot_use_stops_the_run(machine):
    """nvidia-smi lists a GPU, torch sees none: an old driver. It must not train on the CPU without a word."""
    machine.program("nvidia-smi", 'case "$*" in -L) echo "GPU 0: NVIDIA H100";; *) echo 470.57.02;; esac')
    code, printed = machine("finetune.sh", PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert code == 1
    assert "nvidia-smi sees a GPU, but torch cannot use it" in printed
    assert "the driver is 470.57.02" in printed


def test_so_it_does_on_many_gpus(machine, environment_with_torch):
    machine.program("nvidia-smi", 'case "$*" in -L) echo "GPU 0: NVIDIA H100";; *) echo 470.57.02;; esac')
    code, printed = machine("finetune_distributed.sh", PYTHON=environment_with_torch("13.0", None, gpus=0))
    assert code == 1
    assert "nvidia-smi sees a GPU, but torch cannot use it: torch 2.14.1 is built for CUDA 13.0" in printed


# What these two print of one GPU, by AMD's own pages.
AMD_TOOLS = {
    "rocm-smi": """
============================ ROCm System Management Interface ============================
=========================================== ID ===========================================
GPU[0]		: Device Name: 		AMD Instinct MI300X
GPU[0]		: Device ID: 		0x74a1
==========================================================================================
================================== End of ROCm SMI Log ===================================""",
    "amd-smi": """
GPU: 0
    BDF: 0000:0c:00.0
    UUID: 00ff74a1-0000-1000-8000-000000000000""",
}


TORCH = """
__version__ = "2.14.1"
class version:
    cuda, hip = {cuda!r}, {hip!r}
class cuda:
    is_available = lambda: {gpus} > 0
    device_count = lambda: {gpus}
"""


@pytest.fixture
def environment_with_torch(tmp_path):
    """A function that makes an environment whose torch says of itself what is given; its Python."""

    def make(cuda: str | None, hip: str | None, gpus: int) -> str:
        environment = make_environment(tmp_path / "with torch", complete=True)
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "torch.py").write_text(TORCH.format(cuda=cuda, hip=hip, gpus=gpus), encoding="utf-8")
        return str(environment / "bin/python")

    return make


@pytest.mark.parametrize("script", ["finetune.sh", "finetune_distributed.sh"])
@pytest.mark.parametrize("tool", AMD_TOOLS)
def test_an_amd_gpu_that_torch_cannot_use_stops_the_run(tool, script, machine, environment_with_torch):
    """A torch from the usual index is built for CUDA. It must not train on the CPU without a word."""
    machine.program(tool, f"cat <<'END'\n{AMD_TOOLS[tool]}\nEND")
    code, printed = machine(script, PYTHON=environment_with_torch("13.0", None, gpus=0))
    assert code == 1
    assert f"{tool} sees a GPU, but torch cannot use it: torch 2.14.1 is built for CUDA 13.0, ROCm None." in printed
    install = "--force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/rocm"
    assert install in printed
    assert "on the CPU all the same" in printed


def test_amd_s_tools_without_a_gpu_stop_nothing(demonstration, machine):
    machine.program("rocm-smi", "echo 'ERROR:root:ROCm SMI returned 8 (the expected value is 0)'; exit 2")
    machine.program("amd-smi", "echo 'AMD-SMI-ERROR: no device'; exit 255")
    assert "--model tiny" in demonstration()


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_torch_for_rocm_trains_or_says_what_it_lacks(gpus, machine, environment_with_torch):
    python = environment_with_torch(None, "7.2.1", gpus)
    machine.program("rocm-smi", f"cat <<'END'\n{AMD_TOOLS['rocm-smi']}\nEND")
    _, printed = machine("finetune.sh", PYTHON=python)
    if gpus:
        assert f"$ {python} finetune.py\n" in printed
    else:
        assert (
            "rocm-smi sees a GPU, but torch cannot use it: torch 2.14.1 is built for CUDA None, ROCm 7.2.1." in printed
        )
        assert "sudo usermod -aG render,video $USER" in printed
        assert "index-url" not in printed


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
    """What ./finetune.sh hands to finetune.py where there is no GPU: without arguments, or with those that are given."""
    machine.program("nvidia-smi", "exit 1")
    machine.program("any_python", '[ "$1" = - ] || echo "ran: $*"')

    def command(*words: str) -> str:
        code, printed = machine("finetune.sh", *words, PYTHON="any_python")
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


@pytest.mark.parametrize("model", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_each_family_has_a_demonstration_of_its_own(model, demonstration):
    """One of another family that was stopped is not taken for it, and the other way round."""
    make_run(demonstration.runs / "demonstration_2026-01-01_00-00-00", SAVED)
    words = demonstration("--model", model).split()
    assert words[words.index("--model") + 1] == model
    assert words[words.index("--data") + 1] == "train_data/demonstration/data.jsonl"
    assert words[words.index("--output_dir") + 1].startswith(f"train_output/demonstration_of_{model}_20")
    make_run(demonstration.runs / f"demonstration_of_{model}_2026-01-02_00-00-00", SAVED)
    assert demonstration("--model", model) == f"--resume train_output/demonstration_of_{model}_2026-01-02_00-00-00"
    assert demonstration() == "--resume train_output/demonstration_2026-01-01_00-00-00"
    assert demonstration("--model", model, "--max_steps", "2") == f"--model {model} --max_steps 2", "not it alone"


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
