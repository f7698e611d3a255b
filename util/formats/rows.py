"""Rows of flat keys, as tables hold them and other trainers write them -> entries with messages.

A row has no list of turns: its question, its answer and its media each have a key (a column) of their own. Each
function here writes one kind of row as an entry with `messages`, which an importer of importers.py then reads; so tags,
media beside the messages and keys without effect are treated in one place.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from util.data import keys
from util.data.frames import is_image_file
from util.data.keys import MEDIA_KEYS, is_empty
from util.data.lines import DataError

ALPACA = "Alpaca's instruction and output"
SWIFT = "ms-swift's query and response"
PROMPT = "TRL's prompt and completion"
LLAMA_FACTORY = "LLaMA-Factory v1"
PICTURE_ROWS = "rows of a picture and its text"

# The usual names of columns, the likeliest first, in the form that `plain_name` gives.
IMAGE_COLUMNS = (
    "image", "images", "image_path", "image_file", "image_file_name", "image_filename", "image_name", "image_url",
    "img", "img_path", "file_name", "filename", "file_path", "filepath", "photo", "picture", "file", "path",
)  # fmt: skip
VIDEO_COLUMNS = (
    "video",
    "videos",
    "video_path",
    "video_file",
    "video_file_name",
    "video_filename",
    "video_url",
    "clip",
)
TEXT_COLUMNS = (
    "answer", "response", "caption", "text", "description", "output", "completion", "transcription", "alt_text",
    "title",
)  # fmt: skip
CLASS_COLUMNS = ("label", "class", "class_name", "category")
QUESTION_COLUMNS = ("question", "prompt", "query", "instruction")
# What is asked where a row has no question of its own: of a text, and of a class.
DESCRIBE = "Describe the {kind}."
CLASSIFY = "What does the {kind} show? Answer with the name of its class."
TURN_KEYS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Columns:
    """What the user says about rows: names of their columns, and what is asked where a row has no question."""

    image: str | None = None
    text: str | None = None
    question: str | None = None
    asked: str | None = None

    @property
    def are_named(self) -> bool:
        return bool(self.image or self.text or self.question)


class Found(NamedTuple):
    """The columns of a kind of rows; the question's may be missing."""

    image: str
    text: str
    question: str | None


# ---- which kind -----------------------------------------------------------------------------------------------------


def detect_row(entry: dict, columns: Columns = Columns()) -> str | None:
    """The name of a row's kind, a key of ROWS; None for another entry. Looks at keys and types, never at a file."""
    turns = entry.get("messages")
    if isinstance(turns, list) and has_values(turns):
        return LLAMA_FACTORY
    if is_swift_conversation(entry):
        return SWIFT
    if any(key in entry for key in TURN_KEYS) or has_filled(entry, ("chosen", "rejected")):
        return None
    if columns.are_named:
        return PICTURE_ROWS
    if entry.keys() >= {"prompt", "completion"}:
        return PROMPT
    if entry.keys() >= {"query", "response"}:
        return SWIFT
    if entry.keys() >= {"instruction", "output"}:
        return ALPACA
    return PICTURE_ROWS if usual_columns(tuple(entry)) else None


def has_values(turns: list) -> bool:
    """Whether an item of the turns has its content in `value`, and a role beside its turn, as LLaMA-Factory v1 does."""
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list) and any(isinstance(item, dict) and "value" in item for item in content):
            return True
    return False


def is_swift_conversation(entry: dict) -> bool:
    """ms-swift's `{"conversation": [{"human": ..., "assistant": ...}]}`, a list of rounds."""
    rounds = entry.get("conversation")
    if not isinstance(rounds, list) or not rounds:
        return False
    return all(isinstance(each, dict) and each.keys() >= {"human", "assistant"} for each in rounds)


def has_filled(holder: dict, names: tuple[str, ...]) -> bool:
    """Whether one of these keys is there with a value that is not empty."""
    return any(not is_empty(holder.get(name)) for name in names)


# ---- columns --------------------------------------------------------------------------------------------------------


def plain_name(name: object) -> str:
    """`File Name` and `file-name` as `file_name`."""
    return re.sub(r"[\s\-_.]+", "_", str(name).strip().casefold())


@lru_cache(maxsize=1024)
def usual_columns(header: tuple) -> Found | None:
    """The columns that go by usual names; None unless there is one of a medium and one of a text."""
    image = first_named(header, (*IMAGE_COLUMNS, *VIDEO_COLUMNS))
    text = first_named(header, (*TEXT_COLUMNS, *CLASS_COLUMNS))
    if image is None or text is None:
        return None
    return Found(image, text, first_named(header, QUESTION_COLUMNS))


def first_named(header: tuple, names: tuple[str, ...]) -> str | None:
    """The column of a header that the first of the names stands for that is there."""
    plain = {plain_name(column): column for column in reversed(header)}
    return next((plain[name] for name in names if name in plain), None)


@lru_cache(maxsize=1024)
def find_columns(header: tuple, columns: Columns) -> Found:
    """The columns of a header, those that the user names first. DataError, which lists all, where one is missing."""
    known = ", ".join([keys.printable(column) for column in header])
    image = named_column(header, columns.image, "--image_column", known)
    text = named_column(header, columns.text, "--text_column", known)
    question = named_column(header, columns.question, "--question_column", known)
    free = tuple(column for column in header if column not in (image, text, question))
    image = image or first_named(free, (*IMAGE_COLUMNS, *VIDEO_COLUMNS))
    text = text or first_named(free, (*TEXT_COLUMNS, *CLASS_COLUMNS))
    missing = []
    if image is None:
        missing.append("no column of pictures is known by its name (--image_column names it)")
    if text is None:
        missing.append("no column of texts is known by its name (--text_column names it)")
    if missing:
        raise DataError(f": {', and '.join(missing)}; the columns are {known}")
    return Found(image, text, question or first_named(free, QUESTION_COLUMNS))


def named_column(header: tuple, name: str | None, flag: str, known: str) -> str | None:
    """The column that a flag names, in whatever case. DataError where there is none."""
    if name is None or name in header:
        return name
    alike = [column for column in header if plain_name(column) == plain_name(name)]
    if len(alike) != 1:
        raise DataError(f": no column {name!r:.80} ({flag}); the columns are {known}")
    return alike[0]


# ---- one function per kind ------------------------------------------------------------------------------------------


def from_pictures(entry: dict, columns: Columns) -> tuple[dict, dict]:
    """A row of a picture and its text: its messages, and what is left of the row.

    A column of videos, or a file that is one by its name, is a video. A number as text is that number's text.
    """
    found = find_columns(tuple(entry), columns)
    items = media_items(entry[found.image], found.image)
    question = own_question(entry, found) or default_question(found, items, columns)
    answer = cell_text(entry[found.text], found.text)
    if not answer:
        raise DataError(f": no text in the column {found.text!r}; write it, or leave the row out")
    turns = [
        {"role": "user", "content": [*items, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns}, {key: value for key, value in entry.items() if key not in found}


def question_asked(entry: dict, columns: Columns) -> str | None:
    """What a row is asked that has no question of its own; None where it has one."""
    found = find_columns(tuple(entry), columns)
    if own_question(entry, found):
        return None
    return default_question(found, media_items(entry[found.image], found.image), columns)


def own_question(entry: dict, found: Found) -> str:
    """The question in a row; "" where it has none."""
    return cell_text(entry[found.question], found.question) if found.question else ""


def default_question(found: Found, items: list[dict], columns: Columns) -> str:
    """The question of a row that has none: the user's, or one that suits the column of the texts."""
    of_class = plain_name(found.text) in CLASS_COLUMNS
    return columns.asked or (CLASSIFY if of_class else DESCRIBE).format(kind=items[0]["type"])


def media_items(value: object, column: str) -> list[dict]:
    """The items of a cell: of a path, of an image's bytes, or of a list of these."""
    of_videos = plain_name(column) in VIDEO_COLUMNS
    if of_videos and isinstance(value, list) and value and all(isinstance(v, str) and is_image_file(v) for v in value):
        return [{"type": "video", "video": value}]  # the frames of one
    items = []
    for medium in value if isinstance(value, list) else [value]:
        medium = medium.strip() if isinstance(medium, str) else medium
        if not is_empty(medium):
            kind = "video" if of_videos or keys.is_video_file(medium) else "image"
            items.append({"type": kind, kind: medium})
    if not items:
        raise DataError(f": no file in the column {column!r}; name it, or leave the row out")
    return items


def cell_text(value: object, column: str) -> str:
    """The text of a cell, a list of one text unwrapped, without white space around it; "" of an empty one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        raise DataError(f": the column {column!r} holds {len(value)} texts; write a row for each")
    if not isinstance(value, str):
        raise DataError(f": the column {column!r} must hold text, holds {type(value).__name__}; write the text")
    return value.strip()


def from_alpaca(entry: dict) -> dict:
    """Alpaca: `{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[question, answer], ...]}`.

    Source: LLaMA-Factory (data/README.md), which also joins instruction and input by a newline.
    """
    parts = [read_text(entry, key) for key in ("instruction", "input")]
    question = "\n".join([part for part in parts if part])
    return with_turns(
        entry, ("instruction", "input", "output"), [*history(entry), (question, read_text(entry, "output"))]
    )


def from_swift(entry: dict) -> dict:
    """ms-swift: `{"query": ..., "response": ..., "history": [[query, response], ...]}`, or rounds in `conversation`.

    Source: ms-swift (docs, "Custom dataset").
    """
    if is_swift_conversation(entry):
        rounds = [(read_text(each, "human"), read_text(each, "assistant")) for each in entry["conversation"]]
        return with_turns(entry, ("conversation",), rounds)
    last = (read_text(entry, "query"), read_text(entry, "response"))
    return with_turns(entry, ("query", "response"), [*history(entry), last])


def from_prompt(entry: dict) -> dict:
    """TRL: `{"prompt": ..., "completion": ...}`, two texts or two lists of messages; only the completion is learned.

    Source: TRL ("Dataset formats and types"). Refused where there is nothing to see.
    """
    prompt = entry["prompt"]
    completion = entry["completion"]
    rest = {key: value for key, value in entry.items() if key not in ("prompt", "completion")}
    if isinstance(prompt, str) and isinstance(completion, str):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    elif are_messages(prompt) and are_messages(completion):
        # Answers within the prompt are shown and not learned.
        shown = [{**turn, "train": False} if turn.get("role") == "assistant" else turn for turn in prompt]
        messages = [*shown, *completion]
    else:
        raise DataError(": prompt and completion are two texts, or two lists of messages; repair the sample")
    if not has_filled(entry, MEDIA_KEYS) and not any(shows_medium(turn) for turn in messages):
        raise DataError(
            ": a prompt and its completion with neither image nor video, so there is nothing to see; add its 'images', "
            "or write text alone as {'messages': [...]}"
        )
    return {**rest, "messages": messages}


def are_messages(value: object) -> bool:
    """Whether a value is a list of at least one message."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def shows_medium(turn: dict) -> bool:
    """Whether a message has an item of an image or a video."""
    content = turn.get("content")
    items = content if isinstance(content, list) else []
    return any(isinstance(item, dict) and str(item.get("type")).startswith(("image", "video")) for item in items)


def from_llama_factory(entry: dict) -> dict:
    """LLaMA-Factory v1: items `{"type": "text" or "image_url" or "video_url" or "tool_call", "value": ...}`.

    Source: LLaMA-Factory (v1 data preparation, standard format). Only the items are rewritten here.
    """
    messages = []
    for number, turn in enumerate(entry["messages"]):
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, list):
            messages.append(turn)
            continue
        where = f", message {number}: "
        calls = [call_of(item, where) for item in content if is_call(item)]
        items = [item_of(item, where) for item in content if not is_call(item)]
        messages.append({**turn, "content": items, **({"tool_calls": calls} if calls else {})})
    return {**entry, "messages": messages}


def is_call(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") == "tool_call"


def call_of(item: dict, where: str) -> dict:
    """The tool call in an item, whose value is the JSON of its name and arguments."""
    from util.data import tools

    call = tools.loads(item.get("value"), f"{where}a tool_call holds JSON {{'name': ..., 'arguments': ...}}; repair it")
    return {"type": "function", "function": call}


def item_of(item: object, where: str) -> object:
    """An item with its content under the key of its type."""
    if not isinstance(item, dict) or "value" not in item:
        return item
    kind = item.get("type")
    rest = {key: value for key, value in item.items() if key not in ("type", "value")}
    if kind in ("text", "image_url", "video_url", "image", "video"):
        own = kind.removesuffix("_url")
        return {"type": own, own: item["value"], **rest}
    if kind == "reasoning":
        raise DataError(f"{where}has 'reasoning': {keys.REFUSED['reasoning']}")
    if kind in ("audio_url", "audio"):
        raise DataError(f"{where}has {kind!r}: {keys.REFUSED['audio']}")
    raise DataError(
        f"{where}an item with a 'value' has a type text, image_url, video_url or tool_call, has {kind!r:.40}; rename it"
    )


# ---- turns from pairs -----------------------------------------------------------------------------------------------


def read_text(entry: dict, key: str) -> str:
    """The text under a key; "" where it is missing or null."""
    value = entry.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f": {key!r} must be text, is {type(value).__name__}; write the text")
    return value


def history(entry: dict) -> list[tuple[str, str]]:
    """Earlier questions and their answers."""
    earlier = entry.get("history")
    if is_empty(earlier) or earlier == "[]":  # a table writes an empty list as text
        return []
    rounds = []
    for pair in earlier if isinstance(earlier, list) else [None]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(": 'history' is a list of [question, answer], two texts each; repair it")
        rounds.append((pair[0], pair[1]))
    return rounds


def with_turns(entry: dict, used: tuple[str, ...], rounds: list[tuple[str, str]]) -> dict:
    """An entry with its rounds as messages, after the system message if it has one; other keys stay."""
    messages = []
    if system := read_text(entry, "system"):
        messages.append({"role": "system", "content": system})
    for question, answer in rounds:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rest = {key: value for key, value in entry.items() if key not in (*used, "system", "history")}
    return {**rest, "messages": messages}


ROWS = {
    ALPACA: from_alpaca,
    SWIFT: from_swift,
    PROMPT: from_prompt,
    LLAMA_FACTORY: from_llama_factory,
}
