"""The episodes of an agent as one page that needs no network and runs no script: pictures, text, calls and the end."""

import base64
import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from util.agent.log import Log
from util.results.report import MOST_BYTES, draw_all
from util.run_folder import written_whole
from util.vision import Budget

TEMPLATE = Path(__file__).with_name("page.html")
OPEN = 3  # episodes that are unfolded at first


def write_page(output: Path, facts: list[tuple[str, str]], samples: list[dict], log: Log) -> Path:
    """Write the page, complete or absent. `facts`: what stands above the episodes; `samples`: of `Episode.sample`."""
    drawn = draw_pictures(samples, log)
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("<!-- episodes -->")
    with written_whole(output, errors="replace") as file:
        file.write(head)
        file.write("<table>\n")
        for name, value in facts:
            file.write(f"<tr><td>{escaped(name)}</td><td>{escaped(value)}</td></tr>\n")
        file.write("</table>\n")
        for number, sample in enumerate(samples):
            file.writelines(episode_in_html(sample, drawn, is_open=number < OPEN))
        file.write(tail)
    return output


def escaped(value: object) -> str:
    """Text that is text in HTML too, in elements and in attributes."""
    return html.escape(str(value))


def draw_pictures(samples: list[dict], log: Log) -> dict[str, str]:
    """For the path of each picture an <img> element; the more pictures there are, the smaller each is stored."""
    paths: dict[str, None] = {}
    places = 0
    for sample in samples:
        for item in items_of_sample(sample):
            if item["type"] == "image":
                paths[item["image"]] = None
                places += 1
    items = [{"type": "image", "image": str(log.folder / path)} for path in paths]
    most_bytes = max(1000, MOST_BYTES * 3 // 4 // max(1, places))  # base64 writes 3 bytes as 4 characters
    elements = {}
    for path, picture in zip(paths, draw_all(items, Budget(), most_bytes), strict=True):
        if "problem" in picture:
            elements[path] = f'<p class="quiet">{escaped(path)}: {escaped(picture["problem"])}</p>'
            continue
        pixels = base64.b64encode(picture["pixels"]).decode()
        size = f'width="{picture["width"]}" height="{picture["height"]}"'
        elements[path] = f'<img alt="{escaped(picture["caption"])}" {size} src="data:image/webp;base64,{pixels}">'
    return elements


def items_of(content: str | list[dict]) -> list[dict]:
    """The content of a message as items."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def items_of_sample(sample: dict) -> Iterator[dict]:
    """All content items of an episode, what was seen last included."""
    for content in [*(message["content"] for message in sample["messages"]), *sample["episode"]["seen_last"]]:
        yield from items_of(content)


def episode_in_html(sample: dict, drawn: dict[str, str], is_open: bool) -> Iterator[str]:
    """One episode, as an element that can be folded."""
    facts = sample["episode"]
    goal = next(message for message in sample["messages"] if message["role"] == "user")
    words = " ".join(item["text"] for item in items_of(goal["content"]) if item["type"] == "text")
    look = {True: "good", False: "bad", None: "quiet"}[facts["goal_reached"]]
    failures = "".join(f", {count} × {kind}" for kind, count in facts["failures"].items())
    end = f"{facts['end']} after {facts['steps']} step{'s' * (facts['steps'] != 1)}{failures}"
    yield f"<details{' open' if is_open else ''}>\n<summary>episode {facts['number']}: {escaped(words)} "
    yield f'<span class="{look}">{escaped(end)}</span></summary>\n'
    for number, message in enumerate(sample["messages"]):
        yield from message_in_html(message, drawn, failed=number in facts["failed_messages"])
    for content in facts["seen_last"]:
        yield from message_in_html({"role": "tool", "content": content}, drawn, failed=False)
    yield f'<p class="{look}">{escaped(end)}</p>\n</details>\n'


def message_in_html(message: dict, drawn: dict[str, str], failed: bool) -> Iterator[str]:
    """One message: who, the items of its content, its calls."""
    who = {"user": "goal", "tool": "observation"}.get(message["role"], message["role"])
    yield f'<div class="step {message["role"]}{" failed" * failed}"><div class="who">{escaped(who)}</div>\n'
    yield from contents_in_html(items_of(message["content"]), drawn)
    for call in message.get("tool_calls", []):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        yield f"<pre>{escaped(function['name'])} {escaped(arguments)}</pre>\n"
    yield "</div>\n"


def contents_in_html(items: Iterable[dict], drawn: dict[str, str]) -> Iterator[str]:
    for item in items:
        if item["type"] == "image":
            yield drawn[item["image"]] + "\n"
        elif item["text"]:
            yield f'<p class="text">{escaped(item["text"])}</p>\n'
