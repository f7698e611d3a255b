"""Reading this project's pages (README, docs and the others): their code blocks, commands, links and trees."""

import re
import shlex
import subprocess
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh.md")
# What was true once, and forms that people fill in: their commands are not those of today.
NOT_PAGES = ("CHANGELOG.md", ".github/")

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def tracked_files() -> list[str]:
    """Every file that git knows, as paths below the root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def pages() -> list[str]:
    """Every page of this project, as paths below the root."""
    return [path for path in tracked_files() if path.endswith(".md") and not path.startswith(NOT_PAGES)]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page in one language ("" for those without a name), also those within a list."""
    return [textwrap.dedent(code) for _, name, code in FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text)


# ---- commands -------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks of a page, without comments."""
    return [words for block in blocks(text, "bash") for words in command_lines(block)]


def command_lines(script: str) -> list[list[str]]:
    """The words of each command of a shell script, which may go on over lines: after a backslash, or within quotes."""
    found, line = [], ""
    for part in script.splitlines():
        line += part
        if line.endswith("\\"):
            line = line[:-1]
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation that is still open
            line += "\n"
            continue
        if words:
            found.append(words)
        line = ""
    assert not line, f"a command without an end: {line}"
    return found


def commands_in_prose(text: str) -> list[list[str]]:
    """Commands that stand in a sentence as `code`, and those of blocks that are only indented."""
    text = prose(text)
    # of those, what they do comes after three spaces or more
    indented = re.findall(r"^    ((?:python|\./)\S* .*?)(?: {3,}.*)?$", text, re.MULTILINE)
    spans = [" ".join(span.split()) for span in CODE_SPAN.findall(text)]
    spans = [span for span in spans if re.match(r"(python|pip install|vllm|modelscope) |\./\w", span)]
    return [words for line in indented + spans for words in command_lines(line)]


# ---- trees ----------------------------------------------------------------------------------------------------------


def tree(text: str) -> list[str]:
    """The paths of the tree in a page, its first block without a language: two spaces are one folder deeper.

    Several names may stand in a line, each followed by two spaces or less; what they are comes after three or more.
    """
    paths, folders = [], []
    for line in blocks(text, "")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {3,}", line.strip())[0].split()
        folders = folders[:depth]
        paths += ["".join([*folders, name]) for name in names]
        folders.append(names[0])
    return paths
