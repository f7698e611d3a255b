"""What the README says is so: its tree, flags, walk, sizes and sources of figures."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from util.config import Config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FOREIGN = ("srun ", "vllm ", "  --mm-processor-kwargs")  # lines that begin with another program's words
CORE = ["dataset.py", "conversation.py", "vision.py", "collator.py", "loss.py"]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_tree_is_the_tree():
    lines = section("The tree").split("```")[1].strip("\n").splitlines()
    top, below = set(), set()
    for line in lines:
        name = line.split()[0]
        (below if line.startswith("  ") else top).add(name.rstrip("/"))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    real = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    unlisted = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "constraints.txt", "pyproject.toml"}
    assert top == real - unlisted
    assert below == {path.removeprefix("util/") for path in tracked if path.startswith("util/")} - {"__init__.py"}


def test_every_flag_exists():
    known = {f"--{item.name}" for item in dataclasses.fields(Config)} | {
        "--no-check_memory",
        "--no-check_disk",
        "--no-hub_private",
        "--help",
    }
    scripts = ("test_on_trained_model.py", "train_data/make_data.py", "benchmarks/train_step.py")
    for module in (
        ["-m", "util.show"],
        ["-m", "util.convert"],
        ["-m", "util.check_data"],
        ["-m", "util.chartqa"],
        ["-m", "util.compare"],
        ["-m", "util.merge_lora"],
        ["-m", "util.report"],
        *([script] for script in scripts),
    ):
        printed = subprocess.run(
            [sys.executable, *module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        known |= set(re.findall(r"--[a-z_]+", printed.stdout))
    ours = "\n".join(line for line in README.splitlines() if not line.startswith(FOREIGN))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", ours))
    assert used
    assert not used - known - {"--slow"}


def test_the_walk_of_a_sample():
    """At most 5 files and 7 functions, each where the README says."""
    rows = re.findall(r"^\| `([\w.]+)` \| `(util/\w+\.py)` \|", section("Read it in 10 minutes"), re.MULTILINE)
    assert {file for _, file in rows} == {f"util/{name}" for name in CORE}
    assert 5 <= len(rows) <= 7
    for function, file in rows:
        owner, _, name = function.rpartition(".")
        source = (ROOT / file).read_text()
        assert f"def {name}(" in source, f"{function} is not in {file}"
        assert not owner or f"class {owner}" in source


def test_what_is_optional_owns_its_settings():
    assert len(Config.__annotations__) <= 42, "its own fields; those of what is optional stand in files of their own"


def test_the_core_knows_nothing_of_what_is_optional():
    for name in ("finetune.py", *(f"util/{name}" for name in CORE)):
        source = (ROOT / name).read_text()
        for optional in ("bitsandbytes", "flash_attn", "tiny_model", "demonstration", "wandb", "tensorboard"):
            assert optional not in source, f"{name} mentions {optional}"


def test_every_figure_has_its_source():
    """Each row of the table of figures names a result file that holds its command, machine and commit."""
    files = re.findall(r"`(benchmarks/results/[\w.-]+\.json)`", section("Measured"))
    assert files
    for file in files:
        result = json.loads((ROOT / file).read_text())
        assert {"command", "device", "commit"} <= result.keys(), file
    kept = {f"benchmarks/results/{path.name}" for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert kept == set(files), "a result that the README does not mention, or one that is not there"


def test_no_token_id_and_no_foreign_path_in_the_sources():
    for path in [*ROOT.glob("*.py"), *(ROOT / "util").glob("*.py")]:
        assert not re.search(r"\b15[12]\d{3}\b", path.read_text()), f"{path.name} holds a token id or vocabulary size"
    for path in [README, *((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "finetune.sh", "run_tests.sh"))]:
        assert "/work/" not in path


def test_dependencies_are_direct_and_named_with_their_reason():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = {re.split(r"[<>=]", line)[0] for line in lines}
    assert {"torch", "torchvision", "transformers", "qwen-vl-utils", "av", "pillow"} <= names
    for line in lines:
        assert "#" in line, f"{line}: say why it is needed"
