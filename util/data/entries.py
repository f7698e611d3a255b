"""One entry of a data file -> checked messages in one form, or one line that says what is wrong and how to mend it.

Training (util/dataset.py) and `python -m util convert` both check every sample here, so training takes what convert
writes. Only light modules are imported, so that convert starts at once.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from util.data import boxes, fetch, frames, keys, tools, weights
from util.data.lines import MOST_TEXT, DataError

ROLES = ("system", "user", "assistant")
KINDS = ("image", "video")
# LLaVA sets a marker apart by a newline. Qwen2-VL's chat template has none between a picture and its text, and Qwen's
# own fine-tuning code strips it: the newline beside a marker goes, so that training sees what inference sees.
MARKER = re.compile(r"\n?<(image|video)>\n?")
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{200}")


def check_messages(
    entry: object,
    forbidden: Collection[str],
    folder: Path | None,
    unused: set[str] | None = None,
    default_system: str = "",
) -> list[dict]:
    """The messages of one entry in one form (content a list of items, media paths resolved), or DataError.

    `forbidden`: tokens that no text may contain. `folder`: of the data file; None: media files are not looked for.
    `unused`: a set to which the names of keys that have no effect are added. `default_system`: what the model's
    template says before tools where the sample has no system message (conversation.default_system).
    """
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(": a sample is {'messages': [...]} with at least one message")
    unused = set() if unused is None else unused
    check_keys_of(entry, unused)
    checked = []
    kinds = set()  # of all content items
    length = 0  # characters of text
    sample_weight = weights.weight_of(entry, ("weight",), ": ")
    for where, message in tools.turns(entry, default_system):
        before = checked[-1]["role"] if checked else None
        check_turn(message, before, where)
        role = message["role"]
        items = check_content(message["content"], role, folder, where, unused)
        items = boxes.choose_images(items, checked, where)
        text = "\n".join([text_of(items), *boxes.labels_of(items)])
        check_text(text, forbidden, where)
        checked.append({"role": role, "content": items})
        if role == "assistant":
            check_answer(items, text, where)
            checked[-1] |= weights.of_answer(message, sample_weight, where)
        kinds.update(item["type"] for item in items)
        length += len(text_of(items))
    check_whole(checked, length)
    if len(entry) > 1 and kinds.isdisjoint(KINDS):
        keys.check_no_media_beside(entry)
    return checked


def check_whole(checked: list[dict], length: int) -> None:
    """DataError for a conversation of which nothing is learned, or with too many characters of text (`length`)."""
    if checked[-1]["role"] != "assistant":
        raise DataError(f": ends with a {checked[-1]['role']} message, so nothing is supervised; add the answer")
    weights.check_any_learned(checked)
    if length > MOST_TEXT:
        raise DataError(f": {length:,} characters of text, above {MOST_TEXT:,}; make several samples of it", "too long")


def check_keys_of(entry: dict, unused: set[str]) -> None:
    """DataError for a key of an entry or of its messages that would change what is trained."""
    if not entry.keys() <= keys.ENTRY_KEYS:
        unused.update(keys.check_entry(entry))
    for number, message in enumerate(entry["messages"]):
        if not isinstance(message, dict) or message.keys() <= keys.MESSAGE_KEYS:
            continue
        if message.get("role") in (*ROLES, "tool"):  # else it is refused for its role
            unused.update(keys.check_message(message, f", message {number}: "))


def check_turn(message: object, before: str | None, where: str) -> None:
    """DataError for a message without role or content, or whose role cannot follow the role `before`."""
    if not isinstance(message, dict) or message.get("role") not in ROLES or "content" not in message:
        raise DataError(f"{where}a message is {{'role': one of {', '.join(ROLES)}, 'content': ...}}")
    role = message["role"]
    if role == "system" and before is not None:
        raise DataError(f"{where}a system message can only be the first one")
    if role == "assistant" and before != "user":
        raise DataError(f"{where}an assistant message must follow a user message, follows {before or 'nothing'}")
    if role == "user" and before == "user":
        raise DataError(f"{where}two user messages in a row; join them or put the answer between them")


def text_of(content: str | list[dict]) -> str:
    """The text of a message's content, its text items joined."""
    return content if isinstance(content, str) else "".join(item.get("text", "") for item in content)


def check_content(content: object, role: str, folder: Path | None, where: str, unused: set[str]) -> list[dict]:
    """The content of a message as checked items, images and videos moved to the tags in the text."""
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"{where}content must be text or a list of items, is {type(content).__name__}")
    items = [check_item(item, role, folder, where, unused) for item in items]
    return items if role == "assistant" else place_at_tags(items, where)


def check_text(text: str, forbidden: Collection[str], where: str) -> None:
    """DataError for a message's text that contains a control token, or characters that are none."""
    try:
        text.encode()  # fails only for halves of surrogate pairs, and is many times faster than looking for them
    except UnicodeEncodeError:
        raise DataError(f"{where}text holds half of a surrogate pair, which is no character; repair the file") from None
    if found := [token for token in forbidden if token in text]:
        raise DataError(f"{where}text contains the control token {found[0]!r}; take it out")


def check_answer(items: list[dict], text: str, where: str) -> None:
    """DataError for an assistant message that says nothing."""
    if not text.strip() and not any(item["type"] == "box" for item in items):
        raise DataError(
            f"{where}an empty assistant message, so nothing to learn; write the answer, or take it out with "
            "its question"
        )


# ---- items ----------------------------------------------------------------------------------------------------------


def check_item(item: dict, role: str, folder: Path | None, where: str, unused: set[str]) -> dict:
    """One content item in its plain form, its media path resolved, or DataError."""
    item, silent = keys.plain_item(item)
    unused.update(silent)
    kind = item.get("type", next((k for k in ("image", "video", "text") if k in item), None))
    if kind == "box":
        return boxes.check_item(item, where)
    if kind not in ("image", "video", "text") or kind not in item:
        raise DataError(f"{where}an item has a type image, video or text and its key, or type box; has {sorted(item)}")
    item["type"] = kind
    if kind == "text":
        if not isinstance(item["text"], str):
            raise DataError(f"{where}text must be a string, is {type(item['text']).__name__}")
        if unknown := sorted(set(item) - {"type", "text"}):
            raise DataError(f"{where}an item of type text has no key {unknown[0]!r}; give it an item of its own")
        return item
    if role != "user":
        raise DataError(f"{where}only a user message can hold an image or a video; move the {kind} into one")
    refused_with(where, check_keys, item)
    if folder is None:
        return item
    paths = item[kind] if isinstance(item[kind], list) else [item[kind]]
    is_found = os.path.exists if kind == "video" and len(paths) == 1 else os.path.isfile
    resolved = [resolve_path(path, folder, where, is_found) for path in paths]
    if len(paths) == 1 and not fetch.is_remote(resolved[0]) and os.path.isdir(resolved[0]):
        return with_frames(item, resolved[0], where, unused)
    if not isinstance(item[kind], list):
        refused_with(where, check_clock, item)
    return {**item, kind: resolved if isinstance(item[kind], list) else resolved[0]}


def with_frames(item: dict, folder: str, where: str, unused: set[str]) -> dict:
    """A video item that names a folder, as that of the list of its images. DataError where it has none."""
    paths = frames.images_in(folder)
    if not paths:
        raise DataError(
            f"{where}no image in the folder {folder!r:.200}, which stands for a video; put its frames there, or name a "
            "video file",
            "no such file",
        )
    item, silent = keys.plain_item(
        {**item, "video": paths}
    )  # beside frames other keys have no effect than beside a file
    unused.update(silent)
    refused_with(where, check_keys, item)
    return item


def refused_with(where: str, check: Callable[[dict], None], item: dict) -> None:
    """Call `check`; its ValueError becomes a DataError that says where the item stands."""
    try:
        check(item)
    except ValueError as error:
        raise DataError(f"{where}{error}") from None


def check_keys(item: dict) -> None:
    """Refuse keys of an image or video item that are unknown or not numbers above 0."""
    kind = item["type"]
    numbers = keys.NUMBER_KEYS + (keys.VIDEO_KEYS + keys.CLOCK_KEYS if kind == "video" else ())
    known = {"type", kind, *numbers}
    if unknown := sorted(set(item) - known):
        raise ValueError(f"unknown key {unknown[0]!r} in an item of type {kind}; known are {', '.join(sorted(known))}")
    for key in set(item) & set(numbers):
        value = item[key]
        zero_is_fine = key in ("video_start", "video_end")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e15 < value < 1e15:
            raise ValueError(f"{key} must be a number, is {value!r:.40}")
        if value < (0 if zero_is_fine else 1e-9):  # the product of two smaller ones could become 0
            raise ValueError(f"{key} must be {'at least' if zero_is_fine else 'above'} 0, is {value!r}")
    if ("resized_height" in item) != ("resized_width" in item):
        raise ValueError("resized_height and resized_width come together")
    if kind == "image" and isinstance(item["image"], list):
        raise ValueError("an image item holds one path; use several items for several images")
    if kind == "video" and isinstance(item["video"], list):
        if not item["video"]:
            raise ValueError("a video given as a list of frames needs at least one frame")
        if chosen := sorted(set(item) & set(keys.SAMPLING_KEYS)):
            raise ValueError(f"{chosen[0]} has no use with a list of frames: every frame given is taken")
    elif keys.is_video_file(item[kind]):
        check_clock(item)


def check_clock(item: dict) -> None:
    """Refuse keys that say when frames of a list were taken beside a file, which says so by itself."""
    if chosen := sorted(item.keys() & set(keys.CLOCK_KEYS)):
        raise ValueError(f"{chosen[0]} is of a list or a folder of frames; take it out, as a video file says its rate")


def cut(pattern: re.Pattern, text: str) -> Iterator[tuple[str, str | None]]:
    """A text in pieces: each stretch between matches with None, and each match with its first group."""
    begin = 0
    for found in pattern.finditer(text):
        if found.start() > begin:
            yield text[begin : found.start()], None
        yield found[0], found[1]
        begin = found.end()
    if begin < len(text):
        yield text[begin:], None


def place_at_tags(items: list[dict], where: str) -> list[dict]:
    """The items of a message, its images and videos moved, in order, to the tags `<image>` and `<video>` of its text.

    Other formats write such tags. Here they would be text, and the model would learn to read them. DataError where the
    number of tags of a kind is not the number of the message's media.
    """
    text = text_of(items)
    if "<image>" not in text and "<video>" not in text:
        return items
    waiting = {}
    for kind in KINDS:
        tags = sum(item.get("text", "").count(f"<{kind}>") for item in items)
        media = [item for item in items if item["type"] == kind]
        if tags and tags != len(media):
            raise DataError(
                f"{where}{tags} <{kind}> marker{'s' * (tags != 1)} for {len(media)} {kind}{'s' * (len(media) != 1)} of "
                f"the message; put {{'type': '{kind}', '{kind}': PATH}} in place of each, or take it out"
            )
        if tags:
            waiting[kind] = media
    placed = []
    for item in items:
        if item["type"] == "text":
            for part, kind in cut(MARKER, item["text"]):
                placed.append(waiting[kind].pop(0) if kind in waiting else {"type": "text", "text": part})
        elif item["type"] not in waiting:
            placed.append(item)
    return placed


# ---- media ----------------------------------------------------------------------------------------------------------


def resolve_path(
    path: object, folder: Path, where: str, is_found: Callable[[str | Path], bool] = os.path.isfile
) -> str:
    """A media path as it is written if absolute or remote, else below the data file's folder or the current one.

    `is_found`: whether a path will do; os.path.exists where it may be a folder, too.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"{where}a media path must be a non-empty string, is {path!r}")
    if fetch.is_remote(path):
        return path
    path = fetch.local_path(path)
    tried: list[Path] = []
    for spelling in spellings(path):
        tried += [Path(spelling)] if os.path.isabs(path) else [folder / spelling, Path.cwd() / spelling]
    for candidate in tried:
        if is_found(candidate):  # os.path's: False, not an error as of Path.is_file, where a path is too long
            return str(candidate)
    refuse_base64(path, where)
    told = dict.fromkeys(map(str, tried[:2]))  # the other spellings look the same
    raise DataError(f"{where}no such file {path!r} (tried {', '.join(told)}){mistaken(path, tried)}", "no such file")


def spellings(path: str) -> list[str]:
    """A path as it is written, and in the other forms of Unicode that look the same.

    macOS hands out file names with accents as letters of their own (NFD), and nearly everything else writes one letter
    (NFC); on Linux these are two names.
    """
    if path.isascii():
        return [path]
    return list(dict.fromkeys([path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)]))


def refuse_base64(path: str, where: str) -> None:
    """DataError where a file's content in base64 stands in place of its path."""
    if BASE64.match(path):
        raise DataError(
            f"{where}{len(path):,} characters of base64 ({path[:16]!r}...) where a path should be; write "
            "'data:image/png;base64,' before them (jpeg, webp ... as it is)"
        )


def mistaken(path: str, tried: Collection) -> str:
    """The end of a message: what a path that names no file may be, and what to write; "" where nothing is known."""
    if any(os.path.isdir(candidate) for candidate in tried):
        return (
            "; it is a folder: name a file in it, or write {'type': 'video', 'video': FOLDER} for a video of its images"
        )
    if "\\" in path:
        return f"; '\\' is the separator of Windows: write {path.replace(chr(92), '/')!r:.200}"
    return ""
