"""benchmarks/house.py: its figures of a small planted project, against counts made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.house import circles, count_lines, functions_by_length, import_graph, read_sources, walk_figures

ROOT = Path(__file__).resolve().parent.parent

PLANTED = {
    "README.md": "# A house\n\nOf two rooms.\n",
    "finetune.py": "from util import dataset\n",
    "util/__init__.py": "",
    "util/config.py": "SEED = 1\n",
    "util/model.py": "from util.parallel import ranks\n",
    "util/dataset.py": '''\
"""A docstring,
of two lines."""

# a comment alone
from util.config import SEED  # and one beside code
from util.data import lines


def rows(path):
    """Every row."""
    return [f"{path}: {row + SEED}" if row else "" for row in lines.read(path)]
''',
    "util/data/__init__.py": '"""Where bytes come from."""\n\nfrom .lines import read\n',
    "util/data/lines.py": "from util.config import SEED\nfrom . import fetch\n\nread = fetch.read\n",
    "util/data/fetch.py": """\
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from util import dataset


def read(path):
    from util import model
    from util.data import lines

    return model, lines
""",
    "util/parallel/__init__.py": "",
    "util/parallel/ranks.py": "",
}


@pytest.fixture
def house(tmp_path):
    for name, text in PLANTED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_lines_and_tokens(house):
    """dataset.py by hand: 4 code lines. Their tokens: from util.config import SEED is 6, from util.data import lines 6,
    def rows(path): 6, and the return line: return [ f"" if row else "" for row in lines . read ( path ) ] 17."""
    sources = [source for source in read_sources(house) if source.module == "util.dataset"]
    counted = count_lines(sources)
    assert (counted.lines, counted.code) == (11, 4)
    assert counted.tokens == 6 + 6 + 6 + 17
    assert (counted.comments_alone, counted.comments_beside) == (1, 1)
    assert (counted.comprehensions, counted.conditionals) == (1, 1)
    figures = counted.figures()
    assert figures["tokens_per_code_line"] == 8.75
    assert figures["comprehensions_per_100"] == 25
    assert figures["comment_lines_per_100_lines"] == 9.09


def test_imports_are_found_however_they_are_written(house):
    graph = import_graph(read_sources(house))
    assert graph["finetune"] == {"util.dataset"}
    assert graph["util.dataset"] == {"util.config", "util.data.lines"}
    assert graph["util.data"] == {"util.data.lines"}
    assert graph["util.data.lines"] == {"util.config", "util.data.fetch"}


def test_a_circle_of_lazy_imports_is_found(house):
    sources = read_sources(house)
    assert circles(import_graph(sources)) == [["util.data.fetch", "util.data.lines"]]
    assert circles(import_graph(sources, lazy=False)) == []


def test_the_walk(house):
    """dataset -> data.lines -> data.fetch -> model, which is back at the top; config is of the ground floor."""
    sources = read_sources(house)
    packages = {source.module for source in sources if source.is_package}
    assert walk_figures(import_graph(sources), packages) == {
        "rooms": 2,
        "walk_imports": ["util.config", "util.data.lines"],
        "rooms_entered": ["util.data"],
        "climbs_back": ["util.data.fetch -> util.model"],
    }


def test_functions(house):
    assert functions_by_length(read_sources(house)) == [(5, "util.data.fetch.read"), (3, "util.dataset.rows")]


def test_the_command(house):
    command = [sys.executable, ROOT / "benchmarks" / "house.py", str(house), "--no-mypy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["files_at_the_top_of_util"] == 3
    assert (result["readme_lines"], result["readme_longest_line"]) == (3, 13)
    assert result["longest_function"] == "util.data.fetch.read (5)"
    assert result["type_errors"] == "not measured"
    assert str(house) not in json.dumps(result), "a machine's own paths have no place in a result"


def test_a_folder_that_is_no_checkout_is_a_clear_error(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "house.py", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"house.py: {tmp_path} is no checkout of this project: it has no folder util\n"
