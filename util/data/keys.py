"""Which keys of a data file are known, which have no effect on training, and which would change it and are refused.

No key is ignored silently, neither by training nor by `python -m util convert`:

- of a sample, those that change what is trained are refused (media, weights, preferences ... beside the messages);
  any other, such as `id`, is counted and said;
- of a message or of a content item, only the few that are known to have no effect (`name`, `detail` ...) are counted
  and said; any other is refused, as a misspelt or a new one may be meant to change what is trained.

Keys whose value is empty (null, "", [], {}) count as absent, because tables give every row the keys of all rows.
"""

import re

from util.data.lines import DataError
from util.data.weights import LEARNING_KEYS, OWN_KEYS, check_learning

MEDIA_KEYS = ("image", "images", "video", "videos")
ENTRY_KEYS = frozenset(("messages", "tools", "kind"))
MESSAGE_KEYS = frozenset(("role", "content", "tool_calls", "tool_call_id"))  # data/weights.py reads two more

# These have no effect on training: they are counted, and the user is told.
SILENT_IN_MESSAGE = frozenset((
    "name", "id", "uuid", "message_id", "index", "turn", "timestamp", "created", "created_at", "date", "source",
    "model", "lang", "language", "metadata", "meta",
))  # fmt: skip
SILENT_IN_ITEM = frozenset(("detail", "cache_control", "id", "uuid", "mime_type", "metadata", "meta"))
# All frames of a list are taken: the README of Qwen2-VL itself gives `fps` beside a list.
SILENT_WITH_FRAMES = frozenset(("fps",))

# Keys that change what is trained, with the rule and the fix.
TOOL_KEYS = ("tools", "functions", "tool_calls", "tool_call_id", "function_call")
PREFERENCE_KEYS = ("chosen", "rejected", "rejected_response", "rejected_responses", "rejected_messages")
REASONING_KEYS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thought", "thoughts")
AUDIO_KEYS = ("audio", "audios", "sound", "sounds")
MASK_KEYS = ("mask", "masked", "loss_mask", "train_mask", "labels")
REFUSED = dict.fromkeys(TOOL_KEYS, "of this format no tools are read; write the sample as OpenAI chat does")
REFUSED |= dict.fromkeys(AUDIO_KEYS, "the model does not hear; leave the sample out")
REFUSED |= dict.fromkeys(PREFERENCE_KEYS, "preferences cannot be trained on; keep the better answer as a message")
REFUSED |= dict.fromkeys(
    REASONING_KEYS, "Qwen2-VL's chat template writes no thoughts; put the text into 'content', or take it out"
)
REFUSED |= dict.fromkeys(
    MASK_KEYS, "what is learned are answers, whole; an answer's 'train' is true or false, its 'weight' a number"
)
REFUSED |= {
    "refusal": "an answer stands in 'content'; move the text there",
    "objects": "it says what placeholders of the text stand for; write boxes as items {'type': 'box', ...}",
    "system": "it is not read there; make it the first message, {'role': 'system', 'content': ...}",
    "history": "earlier turns are messages; put them into 'messages'",
}
# Refused beside messages in this project's format: there these keys, too, could be understood in several ways.
REFUSED_BESIDE_MESSAGES = REFUSED | dict.fromkeys(
    MEDIA_KEYS, "media are items of a user's content; write {'type': 'image', 'image': PATH} there"
)
REFUSED_BESIDE_MESSAGES |= {
    "conversations": "there are 'messages', too; keep one of them",
    "functions": "tools stand in 'tools'; rename the key",
}
# Numbers that a media item may give, as qwen-vl-utils reads them.
NUMBER_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
SAMPLING_KEYS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
VIDEO_KEYS = (*SAMPLING_KEYS, "total_pixels")
# Of a list of frames: how many of them are a second, and how many of what they were taken from. They decide the time
# that a model with a clock is told (Qwen2.5-VL the first, Qwen3-VL the second); Qwen2-VL has none.
CLOCK_KEYS = ("sample_fps", "raw_fps")
NUMBER_KEYS_OF_ANY = frozenset((*NUMBER_KEYS, *VIDEO_KEYS, *CLOCK_KEYS))
NUMBER = re.compile(r"\d{1,15}(\.\d{1,15})?", re.ASCII)
VIDEO_FILE = re.compile(r"(?i)data:video/|\S.*\.(mp4|mov|mkv|webm|avi|m4v|mpe?g|ts|flv|wmv|3gp)([?#].*)?\Z")
MEDIA_FILE = re.compile(
    r"(?i)data:(image|video|audio)/|\S.*\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif|mp4|mov|mkv|webm|avi|m4v|mpe?g|wav|mp3)"
    r"([?#].*)?\Z"
)


def is_empty(value: object) -> bool:
    """Whether a value is None, or an empty text or collection."""
    return value is None or (isinstance(value, (str, bytes, list, dict)) and not value)


def printable(key: object) -> str:
    """A key as a message shows it, however odd and long it is."""
    text = str(key)
    return text if len(text) <= 60 and text.isidentifier() else f"{text[:60]!r}"


def check_entry(entry: dict) -> list[str]:
    """The keys of a sample in this project's format that training does not use. DataError for one that changes it."""
    unused = []
    for key, value in entry.items():
        if key in ENTRY_KEYS or is_empty(value):
            continue
        if key in REFUSED_BESIDE_MESSAGES:
            raise DataError(f": has {key!r} beside its messages: {REFUSED_BESIDE_MESSAGES[key]}")
        if key in LEARNING_KEYS and not check_learning(key, value, "sample", ": "):
            continue
        unused.append(printable(key))
    return unused


def check_no_media_beside(entry: dict) -> None:
    """DataError where a sample whose messages show no image or video has one beside them, whatever the key's name."""
    for key, value in entry.items():
        if key not in ENTRY_KEYS and (found := media_file_in(value)) is not None:
            raise DataError(
                f": has a key {printable(key)} with {found!r:.80}, but its messages show no image or video; write "
                "{'type': 'image', 'image': PATH} into a user's content, or take the key out"
            )


def media_file_in(value: object) -> str | None:
    """The first name of a media file in a value: text, {"bytes" or "path"} or a list of these."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict):
            part = part.get("path") or ("bytes" if part.get("bytes") else None)
            if part == "bytes":
                return part
        if isinstance(part, str) and MEDIA_FILE.match(part[:4096]):
            return part
    return None


def check_message(message: dict, where: str) -> list[str]:
    """The keys of a message in this project's format that training does not use. DataError for any other."""
    unused = []
    for key, value in message.items():
        if key in MESSAGE_KEYS or is_empty(value):
            continue
        if key in LEARNING_KEYS:
            if not check_learning(key, value, message.get("role"), where):
                continue
        elif key in REFUSED:
            raise DataError(f"{where}has {key!r}: {REFUSED[key]}")
        elif key not in SILENT_IN_MESSAGE:
            known = ", ".join(sorted({*MESSAGE_KEYS, *OWN_KEYS}))
            raise DataError(
                f"{where}unknown key {printable(key)} of a message; known are {known}. Rename it, or take it out"
            )
        unused.append(f"messages[].{printable(key)}")
    return unused


def plain_item(item: dict) -> tuple[dict, list[str]]:
    """A content item in its plain form, and the names of the keys without effect that were taken out of it.

    Empty keys are removed, a list of one image or one video file becomes that file, and a number written as text
    becomes a number.
    """
    plain = {key: value for key, value in item.items() if value is not None}
    for kind in ("image", "video"):
        value = plain.get(kind)
        if isinstance(value, list) and len(value) == 1 and (kind == "image" or is_video_file(value[0])):
            plain[kind] = value[0]
    silent = SILENT_IN_ITEM
    if isinstance(plain.get("video"), list):
        silent |= SILENT_WITH_FRAMES
    unused = [f"content[].{key}" for key in plain if key in silent]
    if unused:
        plain = {key: value for key, value in plain.items() if key not in silent}
    for key in plain.keys() & NUMBER_KEYS_OF_ANY:
        if isinstance(plain[key], str) and NUMBER.fullmatch(plain[key]):
            plain[key] = float(plain[key]) if "." in plain[key] else int(plain[key])
    return plain, unused


def clocks_of(items: list[dict]) -> frozenset[str]:
    """The names of the keys of images and videos that say when frames were taken: without effect on a model that has no
    clock."""
    found: set[str] = set()
    for item in items:
        found |= {f"content[].{key}" for key in CLOCK_KEYS if key in item}
    return frozenset(found)


def is_video_file(value: object) -> bool:
    """Whether a path names a video and not one image of several."""
    return isinstance(value, str) and VIDEO_FILE.match(value) is not None
