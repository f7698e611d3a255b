"""Conversations in the formats that users have -> this project's: one function per format; `detect` says which.

Each function takes one entry and gives `{"messages": [...]}` as util/dataset.py reads it, one message per turn. Media
stay as the entry holds them (a path, a URL, `{"bytes": ..., "path": ...}`, a PIL image); convert.py makes paths of
them. Rows of flat keys (rows.py) become entries with messages first. Keys that have no effect on training are counted
in `dropped`; what cannot be expressed raises DataError.

Only light modules are imported at the top, so that training can ask `detect` at any time.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain

from util.data import fetch, keys, tools, weights
from util.data.entries import MARKER, cut
from util.data.keys import MEDIA_KEYS, TOOL_KEYS, is_empty
from util.data.lines import DataError
from util.data.weights import LEARNING_KEYS
from util.formats import rows
from util.formats.rows import ALPACA, LLAMA_FACTORY, PICTURE_ROWS, PROMPT, SWIFT, Columns, has_filled

LLAVA = "ShareGPT / LLaVA"
QWEN_VL = "Qwen-VL"
HUGGING_FACE = "Hugging Face datasets"
OPENAI = "OpenAI chat"
OWN = "already in this project's format"

KINDS = ("image", "video")
# ShareGPT's own files name the assistant after the site a conversation was taken from; OpenAI renamed its system role.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant")
# The results of tools, and ShareGPT's turns that consist of calls alone (LLaMA-Factory, data/README.md).
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


def detect(entry: object, columns: Columns = Columns()) -> str | None:
    """The name of an entry's format, a key of IMPORTERS, or None. Looks at keys and types, never at a file."""
    if isinstance(entry, list):  # samples that Qwen's pack_data.py put together
        if not all(isinstance(part, dict) for part in entry):
            return None
        names = {detect(part, columns) for part in entry}
        return names.pop() if len(names) == 1 else None
    if not isinstance(entry, dict):
        return None
    if row := rows.detect_row(entry, columns):
        return row
    turns = entry.get("conversations") if "conversations" in entry else entry.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    if turns and not any(is_turn(turn) for turn in turns):
        return None
    if "conversations" in entry:
        return QWEN_VL if is_qwen_vl(entry, turns) else LLAVA
    return detect_messages(entry, turns)


def is_turn(turn: dict) -> bool:
    """Whether a turn has the keys of one of the two ways to write it."""
    return {"from", "value"} <= turn.keys() or {"role", "content"} <= turn.keys()


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
    items = items_of_all(turns)
    has_marker = any(has_marker_in_text(turn) for turn in turns)
    if any("from" in turn for turn in turns):
        return LLAVA
    if any(item.get("type") in OPENAI_TYPES for item in items):
        return OPENAI
    if any(has_medium_elsewhere(item) for item in items):
        return HUGGING_FACE
    if has_media(entry):
        return LLAVA if has_marker else HUGGING_FACE
    if any(holds_medium(item) for item in items):
        return OWN
    if any(has_filled(holder, TOOL_KEYS) for holder in (entry, *turns)):
        return OPENAI
    if any(has_openai_key(turn) for turn in turns):
        return OPENAI
    roles = {str(turn.get("role")) for turn in turns}
    if roles & {"developer", *TOOL_ROLES, *CALL_ROLES}:
        return OPENAI
    if not is_empty(entry.get("system")) or roles & (ROLES.keys() - {"system", "user", "assistant"}):
        return LLAVA
    # A marker without any media: the media were forgotten. from_llava says so.
    return LLAVA if has_marker and not items else OWN


def has_medium_elsewhere(item: dict) -> bool:
    """Whether an item of an image or a video holds neither a path nor frames itself."""
    kind = item.get("type")
    return kind in KINDS and not isinstance(item.get(kind), (str, list))


def has_marker_in_text(turn: dict) -> bool:
    """Whether a turn that is not an answer has `<image>` or `<video>` in its text."""
    text = turn.get("content")
    return isinstance(text, str) and turn.get("role") != "assistant" and MARKER.search(text) is not None


def has_openai_key(turn: dict) -> bool:
    return any(turn.get(key) is not None for key in OPENAI_KEYS)


def holds_medium(item: dict) -> bool:
    """Whether a content item has a key `image` or `video`."""
    return any(kind in item for kind in KINDS)


def items_of(turn: dict) -> list[dict]:
    """The content items of a turn; [] where its content is no list."""
    content = turn.get("content")
    if not isinstance(content, list):
        return []
    return [item for item in content if isinstance(item, dict)]


def items_of_all(turns: list[dict]) -> list[dict]:
    """The content items of all turns."""
    return list(chain.from_iterable(map(items_of, turns)))


def has_media(entry: dict) -> bool:
    """Whether an entry has media beside its turns."""
    return has_filled(entry, MEDIA_KEYS)


# Formats that are not read: the keys by which they are known, their names, and what to do.
WRITE = "write it as {'messages': [...]}"
NOT_READ = f"which python -m util convert does not read; {WRITE}"
UNREAD = {
    ("chosen", "rejected"): ("preferences", "which cannot be trained on; write the better answer as a message"),
    ("question", "answer"): ("questions and answers without a picture", NOT_READ),
    ("text",): ("plain text", NOT_READ),
}


def unread(entry: object) -> str | None:
    """What is in an entry that no importer reads, and what to do; None where nothing is known of it."""
    if not isinstance(entry, dict):
        return None
    turns = entry.get("messages")
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        return "'messages' as text, JSON inside of JSON; write the list itself"
    if isinstance(turns, list):
        return None
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
    Every marker is replaced by the next image or video; one newline on either side of a marker goes.
    """
    key = "conversations" if "conversations" in entry else "messages"
    note_dropped(entry, (key, "system", "kind", "data_path", "tools", *MEDIA_KEYS, *LEARNING_KEYS), dropped)
    folder = entry.get("data_path") or ""
    media = {}
    for kind in KINDS:
        media[kind] = [below(folder, medium) for medium in media_beside(entry, kind)]
    markers: Counter = Counter()  # so far, of each kind
    messages = []
    for where, turn in turns_of(entry, key):
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        note_dropped(turn, (role_key, text_key, *LEARNING_KEYS), dropped, f"{key}[].", where)
        role = read_role(turn, role_key, where)
        text = read_text(turn, text_key, where)
        items = []
        for part, kind in cut(MARKER, text):
            if kind is None:
                items.append({"type": "text", "text": part})
                continue
            place = markers[kind]
            markers[kind] += 1
            medium = media[kind][place] if place < len(media[kind]) else None  # None: refused below, by its count
            items.append({"type": kind, kind: medium})
        messages.append({"role": role, "content": simplest(items), **weight_of_turn(turn, role, where)})
        if turn[role_key] in CALL_ROLES:
            messages[-1] |= {"content": "", "tool_calls": calls_in(text, where)}
    for kind in KINDS:
        check_count(f"<{kind}> marker", markers[kind], kind, len(media[kind]))
    return {"messages": with_system(entry, messages), **tools_beside(entry)}


def from_qwen_vl(entry: dict, dropped: Counter) -> dict:
    """Qwen-VL: `{"conversations": [{"from": "user", "value": "Picture 1: <img>PATH</img>\\nWhat?"}, ...]}`.

    Source: Qwen-VL (README.md, "Data preparation"). Pictures are numbered in the text just as Qwen2-VL's chat template
    numbers them with `add_vision_id`, so the numbers stay, except where a conversation has only one picture. The marks
    `<ref>`, `<box>` and `<quad>` become Qwen2-VL's (arXiv 2409.12191, section 2); both models write coordinates in
    [0, 1000).
    """
    note_dropped(entry, ("conversations", "system", "kind", *LEARNING_KEYS), dropped)
    turns = list(turns_of(entry, "conversations"))
    pictures = sum(len(PICTURE.findall(str(turn.get("value")))) for _, turn in turns)
    messages = []
    for where, turn in turns:
        note_dropped(turn, ("from", "value", *LEARNING_KEYS), dropped, "conversations[].", where)
        role = read_role(turn, "from", where)
        text = read_text(turn, "value", where)
        items = []
        begin = 0  # of the text after the picture before
        for found in PICTURE.finditer(text):
            label = found[1] or ""
            if label and pictures == 1:
                dropped["the label 'Picture 1:' of the only picture"] += 1
                label = ""
            items += text_items(ground(text[begin : found.start()] + label, where))
            items.append({"type": "image", "image": found[2]})
            begin = found.end()
        items += text_items(ground(text[begin:], where))
        messages.append({"role": role, "content": simplest(items), **weight_of_turn(turn, role, where)})
    return {"messages": with_system(entry, messages)}


def from_hugging_face(entry: dict, dropped: Counter) -> dict:
    """Rows of Hugging Face datasets: `{"messages": [...], "images": [...]}` with `{"type": "image"}` in the messages.

    Source: TRL ("Dataset formats and types", vision; prepare_multimodal_messages in trl/data_utils.py). Each image item
    takes the next image, or the one its `index` names; where there are no such items, the images stand before the text
    of the first user message. An item may hold its image itself, as `image`, `url` or `path` (chat templates of
    transformers).
    """
    note_dropped(entry, ("messages", "kind", *MEDIA_KEYS, *LEARNING_KEYS), dropped)
    media = {kind: media_beside(entry, kind) for kind in KINDS}
    used = {kind: [] for kind in KINDS}  # places in `media` that items took
    messages = []
    for where, turn in turns_of(entry, "messages"):
        note_dropped(turn, ("role", "content", *LEARNING_KEYS), dropped, "messages[].", where)
        role = read_role(turn, "role", where)
        content = turn.get("content")
        if not isinstance(content, str):
            items = [filled(item, media, used, where) for item in read_items(content, where, dropped)]
            content = simplest(items)
        messages.append({"role": role, "content": content, **weight_of_turn(turn, role, where)})
    first_user = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first_user is not None and not any(used.values()):
        content = entry["messages"][first_user]["content"]
        if isinstance(content, str):
            items = []
            for kind in KINDS:
                items += [{"type": kind, kind: medium} for medium in media[kind]]
                used[kind] = list(range(len(media[kind])))
            messages[first_user]["content"] = simplest(items + text_items(content))
    for kind in KINDS:
        # the highest index counts, too: another one may be left out
        places = max(len(set(used[kind])), max(used[kind], default=-1) + 1)
        check_count(f"{{'type': '{kind}'}} item", places, kind, len(media[kind]))
    return {"messages": messages}


def from_openai(entry: dict, dropped: Counter) -> dict:
    """OpenAI's chat fine-tuning: content items `{"type": "image_url", "image_url": {"url": ...}}`.

    Source: OpenAI, "Vision fine-tuning" and the chat completions reference; vLLM adds `video_url`. URLs and `data:`
    URIs stay as they are, as this project reads both. `name` and `detail` have no effect; an assistant's `weight` of 0
    says that its message is not learned. Tools and their calls stay; the older `functions` and `function_call` get
    their present names.
    """
    note_dropped(entry, ("messages", "kind", "tools", "functions", *LEARNING_KEYS), dropped)
    messages = []
    for where, turn in turns_of(entry, "messages"):
        note_dropped(turn, ("role", "content", *CALL_KEYS, *LEARNING_KEYS), dropped, "messages[].", where)
        role = read_role(turn, "role", where)
        content = turn.get("content")
        calls = calls_beside(turn)
        if content is None and "tool_calls" in calls:
            content = ""
        if not isinstance(content, str):
            items = [from_openai_item(item, where, dropped) for item in read_items(content, where, Counter())]
            content = simplest(items)
        messages.append({"role": role, "content": content, **calls, **weight_of_turn(turn, role, where)})
    return {"messages": messages, **tools_beside(entry)}


def from_openai_item(item: dict, where: str, dropped: Counter) -> dict:
    """A content item of OpenAI's, text or `image_url` or `video_url`, as one of this project's."""
    kind = item.get("type")
    if kind == "text" and isinstance(item.get("text"), str):
        note_dropped(item, ("type", "text"), dropped, "content[].", where)
        return {"type": "text", "text": item["text"]}
    if kind not in ("image_url", "video_url"):
        raise DataError(f"{where}an item is text or image_url, is {kind!r}; leave the sample out")
    holder = item.get(kind)
    if not isinstance(holder, dict):
        holder = {"url": holder}
    note_dropped(item, ("type", kind), dropped, "content[].", where)
    note_dropped(holder, ("url",), dropped, f"{kind}.", where)
    if not isinstance(holder.get("url"), str) or not holder["url"]:
        raise DataError(f"{where}{kind} holds no url; it is {{'url': 'https://...' or 'data:...'}}")
    own_kind = kind.removesuffix("_url")
    return {"type": own_kind, own_kind: holder["url"]}


def from_own(entry: dict, dropped: Counter) -> dict:
    """This project's format (docs/data.md), unchanged but for keys that have no effect."""
    dropped.update(keys.check_entry(without_weight(entry)))
    messages = []
    for where, turn in turns_of(entry, "messages"):
        role = read_role(turn, "role", where)
        content = turn.get("content")
        calls = calls_beside(turn)
        dropped.update(keys.check_message(without_weight(turn), where))
        if content is None and "tool_calls" in calls:
            content = ""
        if not isinstance(content, str):
            content = read_items(content, where, dropped)
            if bare := [item for item in content if not item.keys() & {"text", *KINDS, "bbox", "label"}]:
                raise DataError(
                    f"{where}an item has a key text, image or video, or is a box; has {sorted(bare[0])}; write one"
                )
        messages.append({"role": role, "content": content, **calls, **weight_of_turn(turn, role, where)})
    return {"messages": messages, **tools_beside(entry)}


def from_row(entry: dict, dropped: Counter) -> dict:
    """A row of Alpaca, ms-swift, TRL or LLaMA-Factory v1 (rows.py), read as the format that it is with messages."""
    name = rows.detect_row(entry)
    turned = rows.ROWS[name](entry)
    inner = OWN if name == LLAMA_FACTORY else detect_messages(turned, turned["messages"])
    return IMPORTERS[inner](turned, dropped)


def from_picture_row(entry: dict, dropped: Counter, columns: Columns = Columns()) -> dict:
    """A row of a picture and its text (rows.py); columns that are not used are counted, whatever their names."""
    sample, rest = rows.from_pictures(entry, columns)
    # `labels` or `weight` mean something beside messages; in a table they are columns that the user did not choose: of
    # products, say, whose weight is in grams.
    with_meaning = keys.REFUSED.keys() | LEARNING_KEYS
    other = [key for key in rest if key in with_meaning and not is_empty(rest[key])]
    dropped.update([keys.printable(key) for key in other])
    note_dropped({key: value for key, value in rest.items() if key not in other}, ("kind",), dropped)
    return sample


IMPORTERS = {
    LLAVA: from_llava,
    QWEN_VL: from_qwen_vl,
    HUGGING_FACE: from_hugging_face,
    OPENAI: from_openai,
    ALPACA: from_row,
    SWIFT: from_row,
    PROMPT: from_row,
    LLAMA_FACTORY: from_row,
    PICTURE_ROWS: from_picture_row,
    OWN: from_own,
}


def import_entry(
    entry: object, dropped: Counter, join_turns: bool = False, columns: Columns = Columns()
) -> tuple[str, dict]:
    """The format of one entry and its sample in this project's format; `join_turns` joins turns of the same role.

    `columns`: what the user says about rows of a picture and its text. Raises DataError that says which message breaks
    which rule; the caller puts file and sample before it.
    """
    name = detect(entry, columns)
    if name is None:
        content = unread(entry)
        if content:
            problem = f"holds {content}"
        elif isinstance(entry, dict):
            problem = f"is a dictionary with {sorted(map(str, entry))}; {WRITE}"
            if not entry.keys() & set(rows.TURN_KEYS):
                problem += ", or name the columns of a picture and its text (--image_column, --text_column)"
        else:
            problem = f"is {type(entry).__name__}; {WRITE}"
        raise DataError(f": in none of the known formats (python -m util convert --help lists them), {problem}")
    counted: Counter = Counter()  # apart from `dropped`, as nothing of a refused sample is written
    imported = from_picture_row(entry, counted, columns) if name == PICTURE_ROWS else IMPORTERS[name](entry, counted)
    messages = imported["messages"]
    if not any(holds_medium(item) for item in items_of_all(messages)):
        keys.check_no_media_beside(entry)
    # A system message that stood beside the messages is before the first one: errors count from the file's own first.
    added = 1 if name in (LLAVA, QWEN_VL) and not is_empty(entry.get("system")) else 0
    check_order(messages, -added, join_turns)
    for _ in tools.turns({**imported, "messages": messages[added:]}):  # raises where tools or calls are wrong
        pass
    dropped.update(counted)
    sample = {**imported, "messages": joined(messages) if join_turns else messages}
    if name != PICTURE_ROWS:
        sample |= weights.plain_sample_weight(entry)
    if isinstance(entry.get("kind"), str):
        sample["kind"] = entry["kind"]
    return name, sample


# ---- rules that all formats share -----------------------------------------------------------------------------------


def check_order(messages: list[dict], first: int = 0, same_role: bool = False) -> None:
    """DataError for what util/dataset.py would refuse, and for an empty answer. Messages are counted from `first`.

    `same_role`: turns of the same role in a row are allowed, as they will be joined.
    """
    before = None  # the role of the message before
    before_calls = False  # whether that one calls tools
    for number, message in enumerate(messages, first):
        role = message["role"]
        where = f", message {number}: "
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
        for kind in KINDS:
            if role not in ("user", "tool") and any(kind in item for item in items):
                raise DataError(f"{where}only a user message can hold an image or a video; move the {kind} into one")
        said = "".join(map(said_by, items))
        if role == "assistant" and not said.strip() and not message.get("tool_calls"):
            raise DataError(f"{where}an empty assistant message, so nothing to learn; write the answer or take it out")
        before = role
        before_calls = bool(message.get("tool_calls"))
    if before != "assistant":
        found = f"ends with a {before} message" if before else "has no messages"
        raise DataError(f": {found}, so nothing is supervised; add the answer")


def said_by(item: dict) -> str:
    """What an item adds to an answer: its text, or the label or corners of a box."""
    for key in ("text", "label", "bbox"):
        if key in item:
            return str(item[key])
    return ""


def joined(messages: list[dict]) -> list[dict]:
    """Messages, those of the same role in a row as one, with a newline between two texts."""
    result: list[dict] = []
    for message in messages:
        if not result or result[-1]["role"] != message["role"] or message["role"] == "tool":
            result.append(message)
            continue
        if weights.plain_weight(result[-1], ": ") != weights.plain_weight(message, ": "):
            raise DataError(": turns in a row of which not each is learned as much cannot be joined; join them by hand")
        left = result[-1]["content"]
        right = message["content"]
        if isinstance(left, str) and isinstance(right, str):
            content: str | list = f"{left}\n{right}"
        else:
            left = text_items(left) if isinstance(left, str) else left
            right = text_items(right) if isinstance(right, str) else right
            are_texts = left and right and "text" in left[-1] and "text" in right[0]
            content = [*left, *(text_items("\n") if are_texts else []), *right]
        result[-1] = {**message, "content": content}
    return result


def turns_of(entry: dict, key: str) -> Iterator[tuple[str, dict]]:
    """Each turn with the words that name it in an error: (`, message 3: `, turn)."""
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
    """The keys of a message that hold its calls, or name the call that it answers; old keys under their new names."""
    kept = {key: turn[key] for key in ("tool_calls", "tool_call_id") if not is_empty(turn.get(key))}
    if not is_empty(turn.get("function_call")):
        kept["tool_calls"] = [{"type": "function", "function": turn["function_call"]}]
    return kept


def calls_in(text: str, where: str) -> list[dict]:
    """The calls of a turn whose text is the JSON of one call or of a list of them."""
    calls = tools.loads(text, f"{where}a turn of calls is JSON {{'name': ..., 'arguments': ...}}; repair it")
    if not isinstance(calls, list):
        calls = [calls]
    return [{"type": "function", "function": call} for call in calls]


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
    """A list of content items without keys that have no effect or are empty (Arrow gives all items the same keys)."""
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


def filled(item: dict, media: dict[str, list], used: dict[str, list[int]], where: str) -> dict:
    """A Hugging Face item of text, or with its medium: its own, the one its index names, or the next.

    `media`: of the sample, by kind; `used`: takes the place there of a medium that is not the item's own.
    """
    kind = item.get("type", "text" if "text" in item else None)
    if kind not in ("text", *KINDS):
        raise DataError(f"{where}an item has a type text, image or video, has {kind!r}; leave the sample out")
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise DataError(f"{where}an item of type text has a 'text' that is text; write one or leave it out")
        return {**item, "type": kind}
    rest = {key: value for key, value in item.items() if key not in (kind, "url", "path", "index")}
    rest["type"] = kind
    for key in (kind, "url", "path"):
        if key in item:
            return {**rest, kind: item[key]}
    index = item.get("index")
    count = len(media[kind])
    if index is not None and not (isinstance(index, int) and 0 <= index < count):
        raise DataError(f"{where}index {index!r}, but the sample has {count} {kind}s; correct it")
    place = len(used[kind]) if index is None else index
    used[kind].append(place)
    return {**rest, kind: media[kind][place] if place < count else None}


def check_count(what: str, count: int, kind: str, media: int) -> None:
    """DataError unless there is one place for each medium."""
    if count != media:
        raise DataError(f": {count} {what}{'s' * (count != 1)} for {media} {kind}{'s' * (media != 1)}; "
                        f"each {kind} needs its place in a user's text, in order")  # fmt: skip


def with_system(entry: dict, messages: list[dict]) -> list[dict]:
    """The messages, and before them the system message that stands beside them, if one does (LLaMA-Factory)."""
    system = entry.get("system")
    if is_empty(system):
        return messages
    if not isinstance(system, str):
        raise DataError(f": 'system' must be text, is {type(system).__name__}; write the text")
    if messages[0]["role"] == "system":
        raise DataError(": has a key 'system' and a system message; keep one of them")
    return [{"role": "system", "content": system}, *messages]


def note_dropped(holder: dict, used: tuple, dropped: Counter, path: str = "", where: str = ": ") -> None:
    """Count the keys of `holder` that are not in `used`; DataError for those that would change what is trained."""
    for key, value in holder.items():
        if key in used or is_empty(value) or (isinstance(value, str) and value == "[]"):
            continue
        if key in keys.REFUSED:
            raise DataError(f"{where}has {key!r}: {keys.REFUSED[key]}")
        if key in LEARNING_KEYS:
            raise DataError(f"{where}{key} of a content item, but an answer is learned as a whole; move it to the turn")
        dropped[f"{path}{keys.printable(key)}"] += 1


def weight_of_turn(turn: dict, role: str, where: str) -> dict:
    """The keys that say how much a turn is learned; {} of one that is not an answer. DataError where it cannot be."""
    if role == "assistant":
        return weights.plain_weight(turn, where)
    for key in LEARNING_KEYS & turn.keys():
        if turn[key] is not None:
            weights.check_learning(key, turn[key], role, where)
    return {}


def without_weight(holder: dict) -> dict:
    """A sample or a turn without the keys that say how much it is learned."""
    return {key: value for key, value in holder.items() if key not in LEARNING_KEYS}


def ground(text: str, where: str) -> str:
    """A text with Qwen-VL's grounding marks as Qwen2-VL's; DataError for a mark that is not complete."""
    for mark, (pattern, name) in GROUNDING.items():
        text = pattern.sub(rf"<|{name}_start|>\1<|{name}_end|>", text)
        if f"<{mark}>" in text or f"</{mark}>" in text:
            shape = {"ref": "<ref>text</ref>", "box": "<box>(x1,y1),(x2,y2)</box>", "quad": "<quad>4 points</quad>"}
            raise DataError(f"{where}a <{mark}> that is not {shape[mark]} with coordinates in [0, 1000); repair it")
    return text


def text_items(text: str) -> list[dict]:
    """An item of the text; [] where the text is empty."""
    return [{"type": "text", "text": text}] if text else []


def simplest(items: list[dict]) -> str | list[dict]:
    """Content as people write it: plain text where there is nothing else."""
    if not items:
        return ""
    if len(items) == 1 and items[0].keys() == {"type", "text"}:
        return items[0]["text"]
    return items
