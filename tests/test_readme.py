"""What the README says is so, in both languages: its trees, walk, sizes, figures, links and pictures."""

import dataclasses
import json
import re
from fnmatch import fnmatch

import pytest
from PIL import Image

from tests.pages import LINK, READMES, ROOT, commands, pages, prose, read, tracked_files, tree
from util.config import Config

ENGLISH, CHINESE = READMES
CORE = ["dataset.py", "conversation.py", "vision.py", "collator.py", "loss.py"]
# What every project has, so that the trees need not say it.
UNLISTED = {"LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", *READMES}
FIGURES = "docs/figures.md"
MOST_LINES, LONGEST_LINE = 160, 120
MOST_FIGURES = 10
MOST_PICTURE_BYTES = 100_000
SOURCE = re.compile(r"`(benchmarks/results/[\w.-]+\.json)`")
NUMBER = re.compile(r"\d[\d,.]*\d|\d")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table in a page."""
    lines = [line for line in prose(text).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


def figures(page: str) -> list[tuple[str, str, str]]:
    """(what, figure, source) of each row of a table of figures."""
    found = []
    for cells in rows(read(page)):
        source = SOURCE.search(cells[-1])
        if source:
            found.append((cells[0], cells[1], source[1]))
    return found


# ---- size and trees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", READMES)
def test_a_readme_is_one_screen(page):
    """The Chinese one has a section more, about mirrors, which comes on top."""
    lines = read(page).splitlines()
    shared = re.sub(r"## 国内网络\n.*?(?=\n## )", "", read(page), flags=re.DOTALL).splitlines()
    assert len(shared) <= MOST_LINES, f"{page} has {len(shared)} lines"
    long = [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
    assert not long, f"{page} has lines above {LONGEST_LINE} characters: {long}"


def test_lines_of_the_other_pages_are_short_but_for_tables():
    for page in pages():
        if not page.startswith("docs/"):
            continue
        lines = enumerate(read(page).splitlines(), 1)
        long = [number for number, line in lines if len(line) > LONGEST_LINE and not line.startswith("|")]
        assert not long, f"{page} has lines above {LONGEST_LINE} characters: {long}"


def at_the_top(paths: list[str]) -> set[str]:
    """The files and folders at the top of the repository, but for hidden ones and those that need no word."""
    names = {path.split("/")[0] for path in paths}
    return {name for name in names if not name.startswith(".")} - UNLISTED


@pytest.mark.parametrize("page", READMES)
def test_the_short_tree_shows_the_top_and_every_room(page):
    listed, files = tree(read(page)), tracked_files()
    patterns = [path.rstrip("/") for path in listed if not path.startswith("util/") or path == "util/"]
    for name in at_the_top(files):
        assert any(fnmatch(name, pattern) for pattern in patterns), f"{page}: its tree does not show {name}"
    for pattern in patterns:
        assert any(fnmatch(name, pattern) for name in at_the_top(files)), f"{page}: there is no {pattern}"
    rooms = {path for path in listed if path.startswith("util/")} - {"util/"}
    real = {f"util/{path.split('/')[1]}/" for path in files if path.startswith("util/") and path.count("/") == 2}
    assert rooms == real, f"{page}: its rooms are not those of util/"


def test_the_whole_tree_is_the_tree():
    listed, files = tree(read("docs/house.md")), tracked_files()
    assert len(listed) == len(set(listed)), "a file stands twice in docs/house.md"
    below = {path for path in listed if path.startswith("util/") and not path.endswith("/")}
    real = {path for path in files if path.startswith("util/") and not path.endswith("__init__.py")}
    assert below == real, "docs/house.md does not show what is in util/"
    top = {path.rstrip("/") for path in listed if not path.startswith("util/") or path == "util/"}
    assert top == at_the_top(files), "docs/house.md does not show what is at the top"


# ---- the walk of a sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", READMES)
def test_the_walk_of_a_sample(page):
    """At most 5 files and 7 functions, each where the README says."""
    walked = re.findall(r"^\| `([\w.]+)` \| `(util/\w+\.py)` \|", read(page), re.MULTILINE)
    assert {file for _, file in walked} == {f"util/{name}" for name in CORE}
    assert 5 <= len(walked) <= 7
    for function, file in walked:
        owner, _, name = function.rpartition(".")
        source = read(file)
        assert f"def {name}(" in source, f"{page}: {function} is not in {file}"
        assert not owner or f"class {owner}" in source, f"{page}: {owner} is not in {file}"


def test_what_is_optional_owns_its_settings():
    assert len(Config.__annotations__) <= 42, "its own fields; those of what is optional stand in files of their own"


def test_the_core_knows_nothing_of_what_is_optional():
    for name in ("finetune.py", *(f"util/{name}" for name in CORE)):
        source = (ROOT / name).read_text()
        for optional in ("bitsandbytes", "flash_attn", "tiny_model", "demonstration", "wandb", "tensorboard"):
            assert optional not in source, f"{name} mentions {optional}"


# ---- figures --------------------------------------------------------------------------------------------------------


def test_every_figure_has_its_source():
    """Each row of the long table names a result file, and each result file stands in it."""
    named = {source for _, _, source in figures(FIGURES)}
    kept = {f"benchmarks/results/{path.name}" for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert kept == named, f"a result that {FIGURES} does not mention, or one that is not there"
    for file in named:
        result = json.loads((ROOT / file).read_text())
        assert {"command", "device", "commit"} <= result.keys(), f"{file} does not say how it was measured"
    unsourced = [cells for cells in rows(read(FIGURES))[2:] if not SOURCE.search(cells[-1])]
    assert not unsourced, f"{FIGURES}: rows without a source"


@pytest.mark.parametrize("page", READMES)
def test_a_readme_says_no_figure_that_the_long_table_does_not(page):
    assert 5 <= len(figures(page)) <= MOST_FIGURES
    for what, figure, source in figures(page):
        long = " ".join(f"{name} {value}" for name, value, file in figures(FIGURES) if file == source)
        strange = set(numbers(figure)) - set(numbers(long))
        assert not strange, f"{page}, {what!r}: {FIGURES} does not say {strange} with {source}"


def test_both_readmes_say_the_same_figures():
    english, chinese = ([(sorted(numbers(figure)), source) for _, figure, source in figures(page)] for page in READMES)
    assert english == chinese


# ---- links, pictures, languages -------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The names by which the headings of a page can be linked to, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere():
    files = set(tracked_files())
    for page in pages():
        folder = (ROOT / page).parent
        for link in LINK.findall(prose(read(page))):
            if link.startswith(("https://", "http://")):
                continue  # not of this project; no test asks the network
            name, _, anchor = link.partition("#")
            target = (folder / name).resolve().relative_to(ROOT).as_posix() if name else page
            is_folder = any(file.startswith(f"{target.rstrip('/')}/") for file in files)
            assert target in files or is_folder, f"{page}: the link {link} leads nowhere"
            assert not anchor or anchor in anchors(read(target)), f"{page}: {target} has no heading {anchor}"


def pictures(page: str) -> list[str]:
    return [link for link in LINK.findall(read(page)) if link.endswith(".png")]


def test_pictures_are_small_and_in_both_readmes():
    assert pictures(ENGLISH) == pictures(CHINESE)
    drawn = {f"docs/pictures/{path.name}" for path in (ROOT / "docs" / "pictures").iterdir()}
    assert drawn == set(pictures(ENGLISH)), "a picture that no README shows, or one that is not there"
    for picture in drawn:
        size = (ROOT / picture).stat().st_size
        assert size <= MOST_PICTURE_BYTES, f"{picture} has {size:,} bytes"
        with Image.open(ROOT / picture) as image:
            assert image.width >= 800, f"{picture} is too narrow to be read"
            assert sum(image.convert("RGB").getpixel((0, image.height - 1))) > 3 * 200, f"{picture} is dark"


def test_readmes_link_to_each_other_and_to_every_page():
    assert CHINESE in LINK.findall(read(ENGLISH))
    assert ENGLISH in LINK.findall(read(CHINESE))
    documents = {page for page in pages() if page.startswith("docs/")}
    for page in READMES:
        assert documents <= set(LINK.findall(read(page))), f"{page} does not link to every page of docs/"


def without_questions(words: list[str]) -> list[str]:
    """A command, what is asked of the model left out: that is in the reader's language."""
    return ["..." if before == "--question" else word for before, word in zip(["", *words], words, strict=False)]


def test_both_readmes_hold_the_same_commands():
    """The Chinese one has a section more, about mirrors."""
    text = read(CHINESE)
    mirrors = text.index("## 国内网络")
    following = text.index("\n## ", mirrors)
    others = text[:mirrors] + text[following:]
    assert list(map(without_questions, commands(others))) == list(map(without_questions, commands(read(ENGLISH))))
    beside = text[mirrors:following]
    for name in ("PIP_INDEX_URL", "modelscope download", "HF_ENDPOINT"):
        assert name in beside
    assert others.count("\n## ") == read(ENGLISH).count("\n## "), "a section that only one of them has"


# ---- sources --------------------------------------------------------------------------------------------------------


def test_no_token_id_and_no_foreign_path_in_the_sources():
    for path in [*ROOT.glob("*.py"), *(ROOT / "util").rglob("*.py")]:
        assert not re.search(r"\b15[12]\d{3}\b", path.read_text()), f"{path.name} holds a token id or vocabulary size"
    for name in [*pages(), "finetune.sh", "run_tests.sh"]:
        assert "/work/" not in read(name), f"{name} names a folder of one machine"


def test_dependencies_are_direct_and_named_with_their_reason():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = {re.split(r"[<>=]", line)[0] for line in lines}
    assert {"torch", "torchvision", "transformers", "qwen-vl-utils", "av", "pillow"} <= names
    for line in lines:
        assert "#" in line, f"{line}: say why it is needed"


def test_settings_of_the_page_are_those_of_the_program():
    """Defaults and limits that a page states in words."""
    defaults = {item.name: item.default for item in dataclasses.fields(Config)}
    assert defaults["on_bad_sample"] == defaults["on_long_sample"] == "stop"
    assert defaults["hub_private"] is True
