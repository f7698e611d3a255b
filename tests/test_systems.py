"""Windows, where data is looked at and converted but not trained; terminals and locales that are not UTF-8; Pythons.

Windows is simulated by tests/windows/sitecustomize.py: this project's modules lack what Python lacks there.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from util.results.answer_files import Answer, write_answers

ROOT = Path(__file__).resolve().parent.parent
# Files are ASCII where nothing is said, as in LC_ALL=C; what is printed is in the code page of western Windows.
WINDOWS = {
    "PYTHONPATH": str(ROOT / "tests/windows"),
    "PYTHONWARNDEFAULTENCODING": "1",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "LC_ALL": "C",
    "PYTHONIOENCODING": "cp1252",
}


def on_windows(*words: str | Path) -> subprocess.CompletedProcess:
    """A command in a process of its own; what it printed, as text."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **WINDOWS}, capture_output=True, encoding="cp1252", timeout=300
    )


def test_the_simulation_lacks_what_windows_lacks():
    """In a module of this project; libraries keep all."""
    lines = [
        "import os, signal, subprocess",
        "print(os.name, hasattr(os, 'fork'), hasattr(os, 'path'), hasattr(signal, 'SIGHUP'), hasattr(signal, 'SIGTERM'))",
        "print(subprocess.os.name)",
        "import fcntl",
    ]
    module = {"__name__": "made", "__file__": str(ROOT / "made.py")}
    done = on_windows("-c", f"exec({chr(10).join(lines)!r}, {module!r})")
    assert done.stdout.splitlines() == ["nt False True False True", "posix"]
    assert "No module named 'fcntl'" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("finetune.py", "--help"),
        ("finetune_distributed.py", "--help"),
        ("-m", "util", "--help"),
        ("-m", "util", "check", "--help"),
    ],
    ids=" ".join,
)
def test_help_is_there_on_windows(words):
    done = on_windows(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("finetune.py", "--model", "tiny"), "finetune.py"),
        (("finetune_distributed.py",), "finetune_distributed.py"),
        (("-m", "util.parallel.launch", "--nproc_per_node", "2", "finetune_distributed.py"), "finetune_distributed.py"),
    ],
    ids=["one process", "a rank", "torchrun"],
)
def test_training_on_windows_is_one_line_that_names_wsl(words, name):
    done = on_windows(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == f"{name}: does not train on Windows itself, but in its Linux: run `wsl --install`, then this there\n"
    )


def test_a_wrong_flag_is_told_before_that():
    done = on_windows("finetune.py", "--lr", "1")
    assert done.returncode == 2
    assert "did you mean --learning_rate?" in done.stderr
    assert "wsl" not in done.stderr


@pytest.fixture(scope="module")
def chinese(tmp_path_factory, picture):
    """A file in LLaVA's format whose texts no western code page holds, with a picture."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("chinese")
    Image.fromarray(picture(56, 84)).save(folder / "1.png")
    turns = [
        {"from": "human", "value": "<image>\n这是什么？"},
        {"from": "gpt", "value": "一只翠鸟 \N{EM DASH} “kingfisher”"},
    ]
    rows = [{"id": "1", "image": "1.png", "conversations": turns}]
    (folder / "llava.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def converted(chinese):
    done = on_windows("-m", "util", "convert", chinese / "llava.json", chinese / "data.jsonl")
    assert done.returncode == 0, done.stderr
    return chinese / "data.jsonl"


def test_data_is_converted_on_windows(converted):
    (sample,) = map(json.loads, converted.read_text(encoding="utf-8").splitlines())
    assert sample["messages"][1]["content"] == "一只翠鸟 \N{EM DASH} “kingfisher”"
    assert {"type": "text", "text": "这是什么？"} in sample["messages"][0]["content"]


def test_data_is_checked_on_windows(converted, tiny_path):
    """With every picture decoded, in processes, which are spawned there."""
    done = on_windows("-m", "util", "check", converted, "train_data/data.json", "--model", tiny_path, "--device", "cpu",
                      "--decode", "--num_workers", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 cannot be decoded whole" in done.stdout
    assert "DOES NOT FIT" not in done.stdout


def test_a_sample_is_shown_on_windows(converted, tiny_path):
    """What the code page lacks is escaped; what it holds is printed as it is."""
    done = on_windows("-m", "util", "show", converted, "--model", tiny_path, "--sample", "0")
    assert done.returncode == 0, done.stderr
    assert "\\u7fe0\\u9e1f \N{EM DASH} “kingfisher”" in done.stdout


def test_answers_are_compared_and_reported_on_windows(tmp_path):
    made_from = {"model": "m", "weights": None, "data": "d", "budget": {}, "max_new_tokens": 8}
    files = []
    for name, answer in (("before", "一只鸟"), ("after", "一只翠鸟 \N{EM DASH} “kingfisher”")):
        files.append(tmp_path / f"{name}.jsonl")
        answers = [Answer("data.json: sample 0", "kind", "这是什么？", [], "一只翠鸟", answer, 0.5, [])]
        write_answers(files[-1], made_from, answers)
    done = on_windows("-m", "util", "compare", *files, "--out", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["files"]
    done = on_windows("-m", "util", "report", *files, "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert "一只翠鸟 \N{EM DASH} “kingfisher”" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_cache_of_frames_on_windows_is_refused_by_name(converted, tiny_path, tmp_path):
    done = on_windows("-m", "util", "check", converted, "--model", tiny_path, "--cache_dir", tmp_path / "cache")
    assert done.returncode == 2
    assert "needs locks on files that Windows lacks; leave it out there" in done.stderr
    assert "Traceback" not in done.stderr


# ---- every system ---------------------------------------------------------------------------------------------------


SOURCES = [
    path for folder in ("", "util/**/", "train_data/", "docs/", "benchmarks/") for path in ROOT.glob(f"{folder}*.py")
]


def without_encoding(tree: ast.AST) -> list[int]:
    """The lines in which text is read or written in whatever encoding the machine prefers."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if opens_text(call) and "encoding" not in given(call)]


def given(call: ast.Call) -> list[str | None]:
    return [keyword.arg for keyword in call.keywords]


def opens_text(call: ast.Call) -> bool:
    """`open(...)`, `os.fdopen(...)` and a path's `read_text` and `write_text`; not av.open, nor a mode with a "b"."""
    called = ast.unparse(call.func)
    if called.rpartition(".")[2] in ("read_text", "write_text"):
        return "." in called
    if called not in ("open", "os.fdopen") or None in given(call):  # None: **options
        return False
    values = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    return not any("b" in ast.unparse(value) for value in values)


def test_a_file_without_an_encoding_is_found():
    text = "open('a')\nopen('a', 'rb')\np.read_text()\np.write_text('x', encoding='utf-8')\nav.open('a')\nopen('a', mode='w')"
    assert without_encoding(ast.parse(text)) == [1, 3, 6]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_are_utf_8_on_every_machine(path):
    assert not without_encoding(ast.parse(path.read_text(encoding="utf-8")))


def test_what_a_terminal_cannot_show_ends_nothing():
    """A file whose name is no UTF-8, and letters that an ASCII terminal lacks."""
    code = (
        "from util.command_line import run_command\n"
        "def main(): print('caf\\xe9 \\udce9 \\u7fe0')\n"
        "run_command(main)"
    )  # fmt: skip
    for encoding, told in (("utf-8", "café \\udce9 翠\n"), ("ascii", "caf\\xe9 \\udce9 \\u7fe0\n")):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout.decode("utf-8")) == (0, told), done.stderr.decode()


def runs(program: str) -> bool:
    """A manager of Pythons may put names on PATH for which it has none."""
    return subprocess.run([program, "-c", ""], capture_output=True).returncode == 0


def test_the_command_line_works_in_every_python_here():
    """It needs the standard library alone. In Python 3.14 a class has no `__annotations__` until it is asked for them."""
    others = [f"python3.{minor}" for minor in range(11, 16) if minor != sys.version_info[1]]
    pythons = [program for program in filter(None, map(shutil.which, others)) if runs(program)]
    if not pythons:
        pytest.skip("no other Python is here")
    for python in pythons:
        command = [python, "finetune.py", "--lr", "1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stderr == "finetune.py: unknown flag --lr; did you mean --learning_rate?\n", python
