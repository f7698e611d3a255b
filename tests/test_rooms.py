"""The rooms of util/ import what they say, nothing in a circle; the lines of the walk and the scripts are plain."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import util

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(path.parent.name for path in (ROOT / "util").glob("*/__init__.py"))
TOP = sorted(path.stem for path in (ROOT / "util").glob("*.py") if not path.stem.startswith("__"))
PLAIN = ["finetune.py", "finetune_distributed.py", "test_on_official_model.py", "test_on_trained_model.py",
         *(f"util/{name}.py" for name in TOP), *(str(p.relative_to(ROOT)) for p in (ROOT / "util").glob("*/*.py"))]  # fmt: skip
MOST_LINES = 40
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def floors() -> dict[str, list[str]]:
    """The groups of files at the top of util/, as its docstring names them, in one line or several."""
    found = {}
    for line in util.__doc__.splitlines():
        name, colon, rest = line.partition(": ")
        if colon and name in ("ground", "walk", "loop"):
            found.setdefault(name, []).extend(word.strip() for word in rest.split(":")[0].split(","))
    return found


def imports(path: Path) -> Iterator[str]:
    """The modules of this project that a file imports anywhere in it, lazily too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "util":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else node.module


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_every_file_at_the_top_stands_in_a_group():
    named = [name for names in floors().values() for name in names]
    assert sorted(named) == TOP


def test_no_import_is_circular():
    graph = {}
    for path in (ROOT / "util").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(imports(path)) - {name}
    assert len(graph) > 60
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_no_two_rooms_need_each_other():
    assert ROOMS == ["adapters", "agent", "cost", "data", "formats", "kernels", "parallel", "publish", "results"]
    graph = {room: {name for name in used_by(room) if name in ROOMS} for room in ROOMS}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of rooms: {' -> '.join(error.args[1])}")


def used_by(room: str) -> set[str]:
    """Files at the top of util/, and other rooms, that a room imports from."""
    found = set()
    for path in (ROOT / "util" / room).glob("*.py"):
        found |= {module.split(".")[1] for module in imports(path)}
    return found - {room}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_says(room):
    text = (ROOT / "util" / room / "__init__.py").read_text()
    said = text.split("May import: ")[1].split(".\n")[0].split(", ")
    allowed = set()
    for word in said:
        allowed |= set(floors().get(word, [word]))
    used = used_by(room)
    assert used <= allowed, f"util/{room} says nothing of importing {sorted(used - allowed)}"
    for word in said:
        assert used & set(floors().get(word, [word])), f"util/{room} says it imports {word}, and does not"


@pytest.mark.parametrize("file", PLAIN)
def test_lines_are_plain(file):
    """One `for` in a comprehension, no nested conditional expression, functions of at most 40 lines but the loop."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        inside = [other for other in ast.walk(node) if other is not node]
        if isinstance(node, COMPREHENSIONS):
            if len(node.generators) > 1 or any(isinstance(other, COMPREHENSIONS) for other in inside):
                found.append(f"line {node.lineno}: two `for` in a comprehension")
        elif isinstance(node, ast.IfExp) and any(isinstance(other, ast.IfExp) for other in inside):
            found.append(f"line {node.lineno}: a conditional expression in another")
        elif isinstance(node, ast.FunctionDef) and node.name != "train":
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES:
                found.append(f"line {node.lineno}: {node.name} has {lines} lines, {MOST_LINES} are read at a glance")
    assert not found, f"{file}: " + "; ".join(found)
