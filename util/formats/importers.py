"""Conversations in the formats users arrive with, to this project's: one function per format, `detect` says which.

Each function takes one entry and gives `{"messages": [...]}` as util/dataset.py reads it, one message per turn. Media
stay what the entry holds (a path, a URL, `{"bytes": ..., "path": ...}`, a PIL image); convert.py makes paths of them.
Keys without a meaning for training are counted in `dropped`; what cannot be expressed raises DataError.

At module level only what reading data needs is imported, so that util/dataset.py can ask `detect` at any time.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator

from util.data import fetch, keys, tools
from util.data.entries import MARKER, cut
from util.data.keys import MEDIA_KEYS, TOOL_KEYS, is_empty
from util.data.lines import DataError

LLAVA = "ShareGPT / LLaVA"
QWEN_VL = "Qwen-VL"
HUGGING_FACE = "Hugging Face datasets"
OPENAI = "OpenAI chat"
OWN = "already in this project's format"

KINDS = ("image", "video")
# ShareGPT's own files name the assistant after the site a conversation was taken from; OpenAI renamed its system role.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant")
# What a tool gave, and ShareGPT's own turns that are nothing but calls (LLaMA-Factory, data/README.md).
TOOL_ROLES = ("tool", "function", "observation", "function_response", "tool_response")
CALL_ROLES = ("function_call", "tool_call")
ROLES |= dict.fromkeys(TOOL_ROLES, "tool") | dict.fromkeys(CALL_ROLES, "assistant")
OPENAI_TYPES = ("image_url", "video_url", "input_audio", "file", "refusal")
CALL_KEYS = ("tool_calls", "tool_call_id", "function_call")
OPENAI_KEYS = ("name", "weight", "refusal")

PICTURE = re.compile(r"\n?(Picture \d+: ?)?<img>(.*?)</img>\n?", re.DOTALL)
POINT = r"\(\s*\d{1,3}\s*,\s*\d{1,3}\s*\)"  # coordinates in [0, 1000)
GROUNDING = {
    "ref": (re.compile(r"<ref>(.*?)</ref>", re.DOTALL), "object_ref"),
    "box": (re.compile(rf"<box>({POINT},\s*{POINT})</box>"), "box"),
    "quad": (re.compile(rf"<quad>({POINT}(?:,\s*{POINT}){{3}})</quad>"), "quad"),
}


# ---- which format ---------------------------------------------------------------------------------------------------


def detect(entry: object) -> str | None:
    """The name of an entry's format, a key of IMPORTERS, or None. Looks at keys and types, never at a file."""
    if isinstance(entry, list):  # samples that Qwen's pack_data.py put together
        names = {detect(part) for part in entry if isinstance(part, dict)}
        return names.pop() if len(names) == 1 and all(isinstance(part, dict) for part in entry) else None
    if not isinstance(entry, dict):
        return None
    turns = entry.get("conversations") if "conversations" in entry else entry.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    if turns and not any({"from", "value"} <= turn.keys() or {"role", "content"} <= turn.keys() for turn in turns):
        return None
    if any("value" in item for turn in turns for item in items_of(turn)):
        return None
    if "conversations" in entry:
        return QWEN_VL if is_qwen_vl(entry, turns) else LLAVA
    return detect_messages(entry, turns)


def is_qwen_vl(entry: dict, turns: list[dict]) -> bool:
    """Qwen-VL's turns are from `user` and `assistant`, and its pictures stand in the text."""
    roles = {str(turn.get("from")) for turn in turns}
    text = "".join(str(turn.get("value")) for turn in turns)
    return (
        bool(turns)
        and roles <= {"system", "user", "assistant"}
        and not has_media(entry)
        and ("<img>" in text or not MARKER.search(text))
    )


def detect_messages(entry: dict, turns: list[dict]) -> str:
    """The format of an entry whose turns stand in `messages`."""
    items = [item for turn in turns for item in items_of(turn)]
    marked = any(
        isinstance(turn.get("content"), str) and turn.get("role") != "assistant" and MARKER.search(turn["content"])
        for turn in turns
    )
    if any("from" in turn for turn in turns):
        return LLAVA
    if any(item.get("type") in OPENAI_TYPES for item in items):
        return OPENAI
    if any(item.get("type") in KINDS and not isinstance(item.get(item["type"]), (str, list)) for item in items):
        return HUGGING_FACE
    if has_media(entry):
        return LLAVA if marked else HUGGING_FACE
    if any(kind in item for item in items for kind in KINDS):
        return OWN
    if any(not is_empty(holder.get(key)) for holder in (entry, *turns) for key in TOOL_KEYS):
        return OPENAI
    if any(turn.get(key) is not None for turn in turns for key in OPENAI_KEYS):
        return OPENAI
    roles = {str(turn.get("role")) for turn in turns}
    if roles & {"developer", *TOOL_ROLES, *CALL_ROLES}:
        return OPENAI
    if not is_empty(entry.get("system")) or roles & (ROLES.keys() - {"system", "user", "assistant"}):
        return LLAVA
    # A marker without any media: the media were forgotten. from_llava says so.
    return LLAVA if marked and not items else OWN


def items_of(turn: dict) -> list[dict]:
    """The content items of a turn, if it has a list of such."""
    content = turn.get("content")
    return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []


def has_media(entry: dict) -> bool:
    """Whether an entry has media beside its turns."""
    return any(not is_empty(entry.get(key)) for key in MEDIA_KEYS)


# What comes in none of the formats that are read: the keys that tell it, its name, and what to do.
WRITE = "write it as {'messages': [...]}"
NOT_READ = f"which util.formats.convert does not read; {WRITE}"
UNREAD = {
    ("chosen", "rejected"): ("preferences", "which cannot be trained on; write the better answer as a message"),
    ("prompt", "completion"): ("TRL's prompt and completion", NOT_READ),
    ("query", "response"): ("ms-swift's query and response", NOT_READ),
    ("instruction", "output"): ("Alpaca's instruction and output", NOT_READ),
    ("question", "answer"): ("questions and answers", NOT_READ),
    ("text",): ("plain text", NOT_READ),
}


def unread(entry: object) -> str | None:
    """What an entry that no importer reads holds, and what to do; None where nothing is known of it."""
    if not isinstance(entry, dict):
        return None
    turns = entry.get("messages")
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        return "'messages' as text, JSON inside of JSON; write the list itself"
    if isinstance(turns, list):
        items = [item for turn in turns if isinstance(turn, dict) for item in items_of(turn)]
        return f"items with a 'value' (LLaMA-Factory), {NOT_READ}" if any("value" in item for item in items) else None
    for names, (what, fix) in UNREAD.items():
        if entry.keys() >= set(names):
            return f"{what}, {fix}"
    return None


# ---- one function per format ----------------------------------------------------------------------------------------


def from_llava(entry: dict, dropped: Counter) -> dict:
    """ShareGPT and LLaVA: `{"image": ..., "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}`.

    Sources: LLaVA (docs/Finetune_Custom_Data.md), LLaMA-Factory (data/README.md: `images`, `videos`, `system`, turns in
    `messages` too, turns from `function_call` and `observation`, `tools`) and Qwen's qwen-vl-finetune (README.md,
    data_processor.py: the same without tools, with the folder `data_path`).
    Every marker is replaced by the next image or video, where it stands; one newline on either side of it goes.
    """
    key = "conversations" if "conversations" in entry else "messages"
    note_dropped(entry, (key, "system", "kind", "data_path", "tools", *MEDIA_KEYS), dropped)
    folder = entry.get("data_path") or ""
    media = {kind: [below(folder, medium) for medium in media_beside(entry, kind)] for kind in KINDS}
    markers: Counter = Counter()
    messages = []
    for where, turn in turns_of(entry, key):
        names = ("from", "value") if "from" in turn else ("role", "content")
        note_dropped(turn, names, dropped, f"{key}[].", where)
        role, text = read_role(turn, names[0], where), read_text(turn, names[1], where)
        items = []
        for part, kind in cut(MARKER, text):
            if kind is None:
                items.append({"type": "text", "text": part})
                continue
            place = markers[kind]
            markers[kind] += 1
            items.append({"type": kind, kind: media[kind][place] if place < len(media[kind]) else None})
        messages.append({"role": role, "content": simplest(items)})
        if turn[names[0]] in CALL_ROLES:
            messages[-1] |= {"content": "", "tool_calls": calls_in(text, where)}
    for kind in KINDS:
        check_count(f"<{kind}> marker", markers[kind], kind, len(media[kind]))
    return {"messages": with_system(entry, messages), **tools_beside(entry)}


def from_qwen_vl(entry: dict, dropped: Counter) -> dict:
    """Qwen-VL: `{"conversations": [{"from": "user", "value": "Picture 1: <img>PATH</img>\\nWhat?"}, ...]}`.

    Source: Qwen-VL (README.md, "Data preparation"). Pictures are numbered in the text just as Qwen2-VL's chat template
    numbers them with `add_vision_id`, so the numbers stay, except where a conversation has one picture and its number
    says nothing. The marks `<ref>`, `<box>` and `<quad>` become Qwen2-VL's (arXiv 2409.12191, section 2); both models
    write coordinates in [0, 1000).
    """
    note_dropped(entry, ("conversations", "system", "kind"), dropped)
    pictures = sum(len(PICTURE.findall(str(turn.get("value")))) for _, turn in turns_of(entry, "conversations"))
    messages = []
    for where, turn in turns_of(entry, "conversations"):
        note_dropped(turn, ("from", "value"), dropped, "conversations[].", where)
        role, text = read_role(turn, "from", where), read_text(turn, "value", where)
        items, begin = [], 0
        for found in PICTURE.finditer(text):
            label = found[1] or ""
            if label and pictures == 1:
                dropped["the label 'Picture 1:' of the only picture"] += 1
                label = ""
            items += text_items(ground(text[begin : found.start()] + label, where))
            items.append({"type": "image", "image": found[2]})
            begin = found.end()
        items += text_items(ground(text[begin:], where))
        messages.append({"role": role, "content": simplest(items)})
    return {"messages": with_system(entry, messages)}


def from_hugging_face(entry: dict, dropped: Counter) -> dict:
    """Rows of Hugging Face datasets: `{"messages": [...], "images": [...]}` with `{"type": "image"}` in the messages.

    Source: TRL ("Dataset formats and types", vision; prepare_multimodal_messages in trl/data_utils.py). Each image item
    takes the next image, or the one its `index` names; where there are no such items, the images stand before the text
    of the first user message. An item may hold its image itself, as `image`, `url` or `path` (chat templates of
    transformers).
    """
    note_dropped(entry, ("messages", "kind", *MEDIA_KEYS), dropped)
    media = {kind: media_beside(entry, kind) for kind in KINDS}
    used = {kind: [] for kind in KINDS}
    messages = []
    for where, turn in turns_of(entry, "messages"):
        note_dropped(turn, ("role", "content"), dropped, "messages[].", where)
        role, content = read_role(turn, "role", where), turn.get("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
            continue
        items = []
        for item in read_items(content, where, dropped):
            kind = item.get("type", "text" if "text" in item else None)
            if kind not in ("text", *KINDS):
                raise DataError(f"{where}an item has a type text, image or video, has {kind!r}; leave the sample out")
            if kind in KINDS:
                item = filled(item, kind, media[kind], used[kind], where)
            elif not isinstance(item.get("text"), str):
                raise DataError(f"{where}an item of type text has a 'text' that is text; write one or leave it out")
            items.append({**item, "type": kind})
        messages.append({"role": role, "content": simplest(items)})
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
    content = entry["messages"][first]["content"]
    if isinstance(content, str) and messages[first]["role"] == "user" and not any(used.values()):
        items = [{"type": kind, kind: medium} for kind in KINDS for medium in media[kind]]
        used = {kind: list(range(len(media[kind]))) for kind in KINDS}
        messages[first]["content"] = simplest(items + text_items(content))
    for kind in KINDS:
        places = max(len(set(used[kind])), max(used[kind], default=-1) + 1)  # the second: an index left out
        check_count(f"{{'type': '{kind}'}} item", places, kind, len(media[kind]))
    return {"messages": messages}


def from_openai(entry: dict, dropped: Counter) -> dict:
    """OpenAI's chat fine-tuning: content items `{"type": "image_url", "image_url": {"url": ...}}`.

    Source: OpenAI, "Vision fine-tuning" and the chat completions reference; `video_url` is what vLLM adds to it. URLs
    and `data:` URIs stay as they are: both are read by this project. `name`, `detail` and a `weight` of 1 say nothing
    to this model; a `weight` of 0 is refused, since every assistant message is supervised here. Tools and their calls
    stay, the older `functions` and `function_call` under their present names.
    """
    note_dropped(entry, ("messages", "kind", "tools", "functions"), dropped)
    messages = []
    for where, turn in turns_of(entry, "messages"):
        note_dropped(turn, ("role", "content", *CALL_KEYS), dropped, "messages[].", where)
        role, content = read_role(turn, "role", where), turn.get("content")
        calls = calls_beside(turn)
        if isinstance(content, str) or (content is None and "tool_calls" in calls):
            messages.append({"role": role, "content": content or "", **calls})
            continue
        items = []
        for item in read_items(content, where, Counter()):
            kind = item.get("type")
            if kind == "text" and isinstance(item.get("text"), str):
                note_dropped(item, ("type", "text"), dropped, "content[].", where)
                items.append({"type": "text", "text": item["text"]})
                continue
            if kind not in ("image_url", "video_url"):
                raise DataError(f"{where}an item is text or image_url, is {kind!r}; leave the sample out")
            holder = item.get(kind) if isinstance(item.get(kind), dict) else {"url": item.get(kind)}
            note_dropped(item, ("type", kind), dropped, "content[].", where)
            note_dropped(holder, ("url",), dropped, f"{kind}.", where)
            if not isinstance(holder.get("url"), str) or not holder["url"]:
                raise DataError(f"{where}{kind} holds no url; it is {{'url': 'https://...' or 'data:...'}}")
            items.append({"type": kind.removesuffix("_url"), kind.removesuffix("_url"): holder["url"]})
        messages.append({"role": role, "content": simplest(items), **calls})
    return {"messages": messages, **tools_beside(entry)}


def from_own(entry: dict, dropped: Counter) -> dict:
    """This project's format (docs/data.md), unchanged but for keys that say nothing."""
    dropped.update(keys.check_entry(entry))
    messages = []
    for where, turn in turns_of(entry, "messages"):
        role, content, calls = read_role(turn, "role", where), turn.get("content"), calls_beside(turn)
        dropped.update(keys.check_message(turn, where))
        if content is None and "tool_calls" in calls:
            content = ""
        if not isinstance(content, str):
            content = read_items(content, where, dropped)
            if bare := [item for item in content if not item.keys() & {"text", *KINDS, "bbox", "label"}]:
                raise DataError(
                    f"{where}an item has a key text, image or video, or is a box; has {sorted(bare[0])}; write one"
                )
        messages.append({"role": role, "content": content, **calls})
    return {"messages": messages, **tools_beside(entry)}


IMPORTERS = {
    LLAVA: from_llava,
    QWEN_VL: from_qwen_vl,
    HUGGING_FACE: from_hugging_face,
    OPENAI: from_openai,
    OWN: from_own,
}


def import_entry(entry: object, dropped: Counter, join_turns: bool = False) -> tuple[str, dict]:
    """The format of one entry and its sample in this project's format; `join_turns` joins turns of the same role.

    Raises DataError that says which message breaks which rule; the caller puts file and sample before it.
    """
    name = detect(entry)
    if name is None:
        what = f"a dictionary with {sorted(map(str, entry))}" if isinstance(entry, dict) else type(entry).__name__
        held = unread(entry)
        raise DataError(f": in none of the known formats ({', '.join(list(IMPORTERS)[:-1])}, this project's own), "
                        + (f"holds {held}" if held else f"is {what}; {WRITE}"))  # fmt: skip
    counted: Counter = Counter()  # what a refused sample drops is not said: nothing of it is written
    imported = IMPORTERS[name](entry, counted)
    messages = imported["messages"]
    if not any(kind in item for message in messages for item in items_of(message) for kind in KINDS):
        keys.check_no_media_beside(entry)
    added = name in (LLAVA, QWEN_VL) and not is_empty(entry.get("system"))
    check_order(messages, -1 if added else 0, join_turns)
    for _ in tools.turns({**imported, "messages": messages[added:]}):  # says what is wrong with tools
        pass
    dropped.update(counted)
    sample = {**imported, "messages": joined(messages) if join_turns else messages}
    if isinstance(entry.get("kind"), str):
        sample["kind"] = entry["kind"]
    return name, sample


# ---- rules that all formats share -----------------------------------------------------------------------------------


def check_order(messages: list[dict], first: int = 0, same_role: bool = False) -> None:
    """DataError for what util/dataset.py would refuse, and for an empty answer. Messages are counted from `first`."""
    before, before_calls = None, False
    for number, message in enumerate(messages, first):
        role, where = message["role"], f", message {number}: "
        if role == "system" and before is not None:
            raise DataError(f"{where}a system message can only be the first one; move it there or take it out")
        if role == before != "tool" and not (same_role and not message.get("tool_calls") and not before_calls):
            raise DataError(
                f"{where}two {role} messages in a row; join them (--join_turns does) or add what is missing"
            )
        if role == "assistant" and before not in ("user", "assistant", "tool"):
            raise DataError(f"{where}an assistant message must follow a user message, follows {before or 'nothing'}; "
                            "add the question or take the answer out")  # fmt: skip
        content = message["content"]
        items = [{"text": content}] if isinstance(content, str) else content
        if role not in ("user", "tool") and (held := [kind for kind in KINDS for item in items if kind in item]):
            raise DataError(f"{where}only a user message can hold an image or a video; move the {held[0]} into one")
        said = "".join(str(item.get("text", item.get("label", item.get("bbox", "")))) for item in items)
        if role == "assistant" and not said.strip() and not message.get("tool_calls"):
            raise DataError(f"{where}an empty assistant message, so nothing to learn; write the answer or take it out")
        before, before_calls = role, bool(message.get("tool_calls"))
    if before != "assistant":
        found = f"ends with a {before} message" if before else "has no messages"
        raise DataError(f": {found}, so nothing is supervised; add the answer")


def joined(messages: list[dict]) -> list[dict]:
    """Messages with those of the same role in a row made one, a newline between two texts."""
    result: list[dict] = []
    for message in messages:
        if not result or result[-1]["role"] != message["role"] or message["role"] == "tool":
            result.append(message)
            continue
        parts = [result[-1]["content"], message["content"]]
        if all(isinstance(part, str) for part in parts):
            content: str | list = "\n".join(parts)
        else:
            left, right = (text_items(part) if isinstance(part, str) else part for part in parts)
            newline = text_items("\n") if left and right and "text" in left[-1] and "text" in right[0] else []
            content = [*left, *newline, *right]
        result[-1] = {**message, "content": content}
    return result


def turns_of(entry: dict, key: str) -> Iterator[tuple[str, dict]]:
    """Each turn with the words that name it in a message."""
    turns = entry.get(key)
    if not isinstance(turns, list) or not turns:
        raise DataError(f": {key!r} must be a list of at least one turn; write it or leave the sample out")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f", message {number}: a turn is a dictionary, is {type(turn).__name__}; repair the file")
        yield f", message {number}: ", turn


def read_role(turn: dict, key: str, where: str) -> str:
    """A turn's role in this project's words."""
    role = turn.get(key)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}unknown role {role!r}; known are {', '.join(ROLES)}. Rename it")
    return ROLES[role]


def calls_beside(turn: dict) -> dict:
    """The keys of a message that say what it calls or answers, under their present names."""
    kept = {key: turn[key] for key in ("tool_calls", "tool_call_id") if not is_empty(turn.get(key))}
    if not is_empty(turn.get("function_call")):
        kept["tool_calls"] = [{"type": "function", "function": turn["function_call"]}]
    return kept


def calls_in(text: str, where: str) -> list[dict]:
    """The calls that are the whole text of a turn: JSON of one, or of a list of them."""
    calls = tools.loads(text, f"{where}a turn of calls is JSON {{'name': ..., 'arguments': ...}}; repair it")
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def tools_beside(entry: dict) -> dict:
    """The tools of a sample, if it has any, as its key `tools`."""
    if not is_empty(entry.get("tools")) and not is_empty(entry.get("functions")):
        raise DataError(": has both 'tools' and 'functions'; keep one of them")
    found = entry["tools"] if not is_empty(entry.get("tools")) else entry.get("functions")
    found = tools.read_tools(found)
    return {"tools": found} if found else {}


def read_text(turn: dict, key: str, where: str) -> str:
    """The text of a turn that must be text."""
    if not isinstance(turn.get(key), str):
        raise DataError(f"{where}{key!r} must be text, is {type(turn.get(key)).__name__}; write the text")
    return turn[key]


def read_items(content: object, where: str, dropped: Counter) -> list[dict]:
    """A list of content items, each without its empty keys (Arrow gives every item the keys of all) and silent ones."""
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise DataError(f"{where}content must be text or a list of items, is {type(content).__name__}; repair the file")
    items = []
    for item in content:
        plain, silent = keys.plain_item(item)
        dropped.update(silent)
        items.append(plain)
    return items


def media_beside(entry: dict, kind: str) -> list:
    """The media of one kind that stand beside the turns, under the key `image` or `images`."""
    values = {key: entry[key] for key in (kind, f"{kind}s") if not is_empty(entry.get(key))}
    if len(values) == 2:
        raise DataError(f": has both {kind!r} and '{kind}s'; keep the one whose order the text follows")
    media = next(iter(values.values()), [])
    return media if isinstance(media, list) else [media]


def below(folder: str, medium: object) -> object:
    """A path, or each of a list of frames, under a folder, which may be remote."""
    if isinstance(medium, list):
        return [below(folder, frame) for frame in medium]
    if not folder or not isinstance(medium, str) or fetch.scheme_of(medium) or os.path.isabs(medium):
        return medium
    return f"{folder.rstrip('/')}/{medium}" if fetch.is_remote(folder) else os.path.join(folder, medium)


def filled(item: dict, kind: str, media: list, used: list[int], where: str) -> dict:
    """A Hugging Face item with its medium: its own, the one its index names, or the next."""
    own = [key for key in (kind, "url", "path") if key in item]
    index = item.get("index")
    rest = {key: value for key, value in item.items() if key not in (kind, "url", "path", "index")}
    if own:
        return {**rest, kind: item[own[0]]}
    if index is not None and not (isinstance(index, int) and 0 <= index < len(media)):
        raise DataError(f"{where}index {index!r}, but the sample has {len(media)} {kind}s; correct it")
    place = len(used) if index is None else index
    used.append(place)
    return {**rest, kind: media[place] if place < len(media) else None}


def check_count(what: str, count: int, kind: str, media: int) -> None:
    """DataError unless there is one place for each medium."""
    if count != media:
        raise DataError(f": {count} {what}{'s' * (count != 1)} for {media} {kind}{'s' * (media != 1)}; "
                        f"each {kind} needs its place in a user's text, in order")  # fmt: skip


def with_system(entry: dict, messages: list[dict]) -> list[dict]:
    """The messages after the system message that stands beside them, if one does (LLaMA-Factory)."""
    system = entry.get("system")
    if is_empty(system):
        return messages
    if not isinstance(system, str):
        raise DataError(f": 'system' must be text, is {type(system).__name__}; write the text")
    if messages[0]["role"] == "system":
        raise DataError(": has a key 'system' and a system message; keep one of them")
    return [{"role": "system", "content": system}, *messages]


def note_dropped(holder: dict, used: tuple, dropped: Counter, path: str = "", where: str = ": ") -> None:
    """Count the keys that are not used; DataError for those that change what is trained."""
    for key, value in holder.items():
        if key in used or is_empty(value) or (isinstance(value, str) and value == "[]"):
            continue
        if key in keys.REFUSED:
            raise DataError(f"{where}has {key!r}: {keys.REFUSED[key]}")
        if key in keys.LEARNING_KEYS:
            keys.check_learning(key, value, learner(holder), where)
        dropped[f"{path}{keys.printable(key)}"] += 1


def learner(holder: dict) -> object:
    """The role of a turn; a sample as a whole is learned as its answers are."""
    role = holder.get("role", holder.get("from", "assistant"))
    return ROLES.get(role) if isinstance(role, str) else role


def ground(text: str, where: str) -> str:
    """Qwen-VL's grounding marks as Qwen2-VL's, or DataError for one that is not whole."""
    for mark, (pattern, name) in GROUNDING.items():
        text = pattern.sub(rf"<|{name}_start|>\1<|{name}_end|>", text)
        if f"<{mark}>" in text or f"</{mark}>" in text:
            shape = {"ref": "<ref>text</ref>", "box": "<box>(x1,y1),(x2,y2)</box>", "quad": "<quad>4 points</quad>"}
            raise DataError(f"{where}a <{mark}> that is not {shape[mark]} with coordinates in [0, 1000); repair it")
    return text


def text_items(text: str) -> list[dict]:
    """No item for no text, else one."""
    return [{"type": "text", "text": text}] if text else []


def simplest(items: list[dict]) -> str | list[dict]:
    """Content as people write it: plain text where there is nothing else."""
    if not items:
        return ""
    return items[0]["text"] if len(items) == 1 and items[0].keys() == {"type", "text"} else items
