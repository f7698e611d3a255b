"""How readable is the house? Files, circles, density of lines, functions, types: the figures of any checkout.

    python benchmarks/house.py                     this one
    python benchmarks/house.py ../before           another one, such as a commit before a redesign (git worktree add)

It reads the sources of FOLDER and runs none of them; only types are counted by mypy, where it is installed, with the
settings of this checkout's pyproject.toml. What is counted:

- Code lines hold at least one token that is neither a comment nor part of a docstring. Tokens per code line counts
  names, numbers, strings and operators; an f-string is one token, as it was before Python 3.12.
- Comprehensions (of lists, sets, dicts, and generator expressions), conditional expressions (`a if b else c`) and
  comments beside code are given per 100 code lines, lines that are nothing but a comment per 100 lines of any kind.
- A function's lines run from its `def` to its last line, docstring included.
- A circle is a set of modules each of which imports the others, over others or directly. Imports inside of functions
  count; those under `if TYPE_CHECKING:` do not, as they never run.
- A room is a folder of util/ with Python files. The walk of a sample is the files named in WALK. Starting there, and
  following imports from room to room but through no file at the top of util/, `rooms_entered` are those that a reader
  of the walk is led into, and `climbs_back` the imports with which these rooms lead back to a file at the top of util/
  that is not of the ground floor (GROUND_FLOOR). `walk_imports` are all files of util/ that the walk's own files
  import, themselves left out: it can be compared with a checkout that has no rooms.
"""

# ruff: noqa: E402

import argparse
import ast
import importlib.util
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import origin, write_result

WALK = ("util.dataset", "util.conversation", "util.vision", "util.collator", "util.loss")
GROUND_FLOOR = ("util.command_line", "util.config", "util.run_folder", "util.signals")
LONG = 40  # lines of a function
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Import = ast.Import | ast.ImportFrom
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WITH_DOCSTRING = (ast.Module, ast.ClassDef, *FUNCTIONS)
NOT_MEASURED = "not measured"


@dataclass
class Source:
    """One Python file of a checkout."""

    path: Path
    module: str  # util.data.lines; of a package's __init__.py the package's name
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def read_sources(folder: Path) -> list[Source]:
    """The scripts at the top of a checkout, and all of its util/."""
    paths = [*sorted(folder.glob("*.py")), *sorted((folder / "util").rglob("*.py"))]
    sources = []
    for path in paths:
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        text = path.read_text(encoding="utf-8")
        sources.append(Source(path, ".".join(parts), text, ast.parse(text)))
    return sources


# ---- lines ----------------------------------------------------------------------------------------------------------


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            lines.update(range(statement.lineno, statement.end_lineno + 1))
    return lines


def whole_tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of a source, each f-string as one: its first token stands for it, and lasts to its last line."""
    started: list[tokenize.TokenInfo] = []  # f-strings that are open: one may stand within another
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("FSTRING_START", "TSTRING_START"):
            started.append(token)
        elif kind in ("FSTRING_END", "TSTRING_END"):
            first = started.pop()
            if not started:
                yield first._replace(type=tokenize.STRING, end=token.end)
        elif not started:
            yield token


@dataclass
class Lines:
    """What the lines of one or more files hold."""

    lines: int = 0
    code: int = 0
    tokens: int = 0
    comments_alone: int = 0
    comments_beside: int = 0
    comprehensions: int = 0
    conditionals: int = 0

    def figures(self) -> dict:
        """The counts, and their shares."""
        code = max(1, self.code)
        return {
            "lines": self.lines,
            "code_lines": self.code,
            "tokens_per_code_line": round(self.tokens / code, 2),
            "comprehensions_per_100": round(100 * self.comprehensions / code, 2),
            "conditional_expressions_per_100": round(100 * self.conditionals / code, 2),
            "comments_beside_code_per_100": round(100 * self.comments_beside / code, 2),
            "comment_lines_per_100_lines": round(100 * self.comments_alone / max(1, self.lines), 2),
        }


def count_lines(sources: Iterable[Source]) -> Lines:
    """Lines, tokens, comments, comprehensions and conditional expressions of all `sources` together."""
    total = Lines()
    for source in sources:
        no_code = docstring_lines(source.tree)
        code: set[int] = set()
        comments: set[int] = set()
        for token in whole_tokens(source.text):
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            is_docstring = token.type == tokenize.STRING and token.start[0] in no_code
            if token.type not in NO_CODE and not is_docstring:
                total.tokens += 1
                code.update(range(token.start[0], token.end[0] + 1))
        total.lines += len(source.text.splitlines())
        total.code += len(code)
        total.comments_alone += len(comments - code)
        total.comments_beside += len(comments & code)
        for node in ast.walk(source.tree):
            total.comprehensions += isinstance(node, COMPREHENSIONS)
            total.conditionals += isinstance(node, ast.IfExp)
    return total


def functions_by_length(sources: Iterable[Source]) -> list[tuple[int, str]]:
    """(lines, module.function) of every function, the longest first."""
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTIONS):
                found.append((node.end_lineno - node.lineno + 1, f"{source.module}.{node.name}"))
    return sorted(found, reverse=True)


# ---- imports --------------------------------------------------------------------------------------------------------


def import_statements(node: ast.AST, inside_function: bool = False) -> Iterator[tuple[Import, bool]]:
    """Every import below `node`, and whether it is inside of a function; none that is for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, inside_function
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from import_statements(statement, inside_function)
        else:
            yield from import_statements(child, inside_function or isinstance(child, FUNCTIONS))


def imported_modules(source: Source, statement: Import, known: set[str]) -> set[str]:
    """Those of the `known` modules that an import statement of `source` names."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names} & known
    package = statement.module or ""
    if statement.level:  # from . import lines: one dot is the package that the file stands in
        above = source.module.split(".")
        above = above[: len(above) - statement.level + source.is_package]
        package = ".".join([*above, package]).rstrip(".")
    found = set()
    for alias in statement.names:
        name = f"{package}.{alias.name}"
        found.add(name if name in known else package)
    return found & known


def import_graph(sources: list[Source], lazy: bool = True) -> dict[str, set[str]]:
    """Module -> the modules of this checkout that it imports; with or without imports inside of functions."""
    known = {source.module for source in sources}
    graph: dict[str, set[str]] = {module: set() for module in known}
    for source in sources:
        for statement, inside_function in import_statements(source.tree):
            if lazy or not inside_function:
                graph[source.module] |= imported_modules(source, statement, known)
    return graph


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All modules that `start` imports, over others or directly."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    return seen


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The circles of imports, each as the sorted names of its modules."""
    below = {module: reached(graph, module) for module in graph}
    found = set()
    for module, others in below.items():
        if module in others:
            found.add(tuple(sorted(other for other in others if module in below[other])))
    return [list(circle) for circle in sorted(found)]


def walk_figures(graph: dict[str, set[str]], packages: set[str]) -> dict:
    """What the walk of a sample imports, the rooms it leads into, and the climbs back from these; see the top."""
    rooms = {package for package in packages if package.startswith("util.")}

    def room_of(module: str) -> str | None:
        package = module if module in packages else module.rpartition(".")[0]
        return package if package in rooms else None

    walk = [module for module in WALK if module in graph]
    direct: set[str] = set().union(*(graph[module] for module in walk)) - set(walk)
    entered: set[str] = set()
    climbs: set[str] = set()
    waiting = [module for module in direct if room_of(module)]
    while waiting:
        module = waiting.pop()
        if module in entered:
            continue
        entered.add(module)
        for imported in graph[module]:
            if room_of(imported):
                waiting.append(imported)
            elif imported.startswith("util.") and imported not in GROUND_FLOOR:
                climbs.add(f"{module} -> {imported}")
    return {
        "rooms": len(rooms),
        "walk_imports": sorted(module for module in direct if module.startswith("util.")),
        "rooms_entered": sorted({str(room_of(module)) for module in entered}),
        "climbs_back": sorted(climbs),
    }


# ---- types and pages ------------------------------------------------------------------------------------------------


def type_errors(folder: Path, sources: list[Source]) -> dict | str:
    """mypy's errors in the scripts and the top of util/, and in the rooms; or that there is no mypy here."""
    if importlib.util.find_spec("mypy") is None:
        return NOT_MEASURED
    paths = [str(source.path.relative_to(folder)) for source in sources]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", cache]
        done = subprocess.run([*command, *paths], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 2: mypy itself could not run
        sys.exit(f"mypy failed on {folder}:\n{done.stdout}{done.stderr}")
    wrong = re.findall(r"^([^:\n]+):\d+: error: ", done.stdout, re.MULTILINE)
    in_rooms = [path for path in wrong if path.count("/") > 1]
    return {"scripts_and_top_of_util": len(wrong) - len(in_rooms), "rooms": len(in_rooms)}


def readme_figures(folder: Path) -> dict:
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    return {"readme_lines": len(lines), "readme_longest_line": max(map(len, lines), default=0)}


def measured(folder: Path, with_mypy: bool) -> dict:
    """Every figure of the checkout in `folder`."""
    sources = read_sources(folder)
    walk = [source for source in sources if source.module in (*WALK, "finetune")]
    packages = {source.module for source in sources if source.is_package}
    graph = import_graph(sources)
    functions = functions_by_length(sources)
    long = [f"{name} ({lines})" for lines, name in functions if lines > LONG]
    return {
        "files_at_the_top_of_util": len(list((folder / "util").glob("*.py"))) - (folder / "util/__init__.py").exists(),
        "circles": circles(graph),
        "circles_at_module_level": circles(import_graph(sources, lazy=False)),
        "scripts_and_util": count_lines(sources).figures(),
        "walk_and_finetune": count_lines(walk).figures(),
        "longest_function": long[0] if long else f"{functions[0][1]} ({functions[0][0]})",
        f"functions_above_{LONG}_lines": long,
        **readme_figures(folder),
        "type_errors": type_errors(folder, sources) if with_mypy else NOT_MEASURED,
        "walk": walk_figures(graph, packages),
    }


def print_table(figures: dict, indent: str = "") -> None:
    for name, value in figures.items():
        shown = name.replace("_", " ")
        if isinstance(value, dict):
            print(f"{indent}{shown}:")
            print_table(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{shown:<{38 - len(indent)}} {len(value)}")
            for item in value:
                print(f"{indent}    {' <-> '.join(item) if isinstance(item, list) else item}")
        else:
            print(f"{indent}{shown:<{38 - len(indent)}} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT, help="the checkout; default: this one")
    parser.add_argument("--mypy", action=argparse.BooleanOptionalAction, default=True, help="count errors of types")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not (folder / "util").is_dir():
        parser.exit(2, f"house.py: {arguments.folder} is no checkout of this project: it has no folder util\n")
    figures = measured(folder, arguments.mypy)
    print_table(figures)
    result = {**origin("house.py", sys.argv[1:], private=[arguments.folder], checkout=folder), **figures}
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
