"""What the project says of itself in its own files: dependencies, extras, tested versions, the tests by name."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

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
