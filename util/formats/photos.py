"""Folders of pictures or videos: with a caption beside each, with a table of them, or with a folder for each class.

- `photos/1.jpg` and `photos/1.txt` (its caption) or `photos/1.json` (a text, or a row such as {"question", "answer"});
- `photos/metadata.csv` or `metadata.jsonl` with a column `file_name` (the imagefolder of Hugging Face `datasets`);
- `photos/cat/1.jpg`: the name of the folder is the answer.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from util.data import keys
from util.data.frames import is_image_file, natural_key
from util.data.lines import DataError
from util.formats.tables import Placed

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTIONS = (".txt", ".json")
SPLITS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"))


def metadata_of(folder: str) -> str | None:
    """The table of a folder's files that lies in it, if there is one. DataError for two, or for one in each split."""
    found = [name for name in METADATA if os.path.isfile(os.path.join(folder, name))]
    if len(found) > 1:
        raise DataError(f"{folder}: holds {' and '.join(found)}; name one of them")
    return os.path.join(folder, found[0]) if found else None


def open_photos(folder: str, notes: list[str]) -> tuple[int, Iterator[object]]:
    """How many pictures and videos a folder holds, and an iterator over their rows, each Placed or a DataError.

    What the user is to know besides is added to `notes`.
    """
    media, texts = files_in(folder)
    if not media:
        raise DataError(
            f"{folder}: a folder without pictures, videos or a dataset of save_to_disk; name the data file in it"
        )
    if {Path(name).parts[0].casefold() for name in media} <= SPLITS:
        splits = sorted({Path(name).parts[0] for name in media})
        raise DataError(f"{folder}: holds the splits {', '.join(splits)}; name one, such as {folder}/{splits[0]}")
    if any(captions_of(name, texts) for name in media):
        if said := passed_over(media, texts):
            notes.append(f"{folder}: {said}")
        return len(media), captioned(folder, media, texts)
    if any(len(Path(name).parts) > 1 for name in media):
        classes = Counter(Path(name).parts[0] for name in media if len(Path(name).parts) == 2)
        few = ", ".join(f"{name} {count:,}" for name, count in classes.most_common(8))
        notes.append(f"{folder}: {len(classes):,} folders as classes: {few}{', ...' if len(classes) > 8 else ''}")
        return len(media), classed(folder, media)
    raise DataError(
        f"{folder}: {len(media):,} pictures and no text that belongs to one; write the caption of {media[0]} into "
        f"{Path(media[0]).with_suffix('.txt')}, or put the pictures of each class into a folder of its name"
    )


def files_in(folder: str) -> tuple[list[str], set[str]]:
    """The pictures and videos below a folder in natural order, and the files of text; paths relative to the folder.

    Hidden files and folders are passed over, and so is what macOS puts into archives.
    """
    media = []
    texts = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        for name in names:
            path = os.path.relpath(os.path.join(parent, name), folder)
            if is_image_file(name) or (keys.is_video_file(name) and not name.startswith(".")):
                media.append(path)
            elif name.endswith(CAPTIONS) and not name.startswith("."):
                texts.add(path)
    return sorted(media, key=natural_key), texts


# ---- captions -------------------------------------------------------------------------------------------------------


def captions_of(name: str, texts: set[str]) -> list[str]:
    """The files of text that belong to a picture: `1.txt`, `1.json`, `1.jpg.txt` or `1.jpg.json` beside `1.jpg`."""
    stem = os.path.splitext(name)[0]
    return [path for path in (f"{stem}.txt", f"{stem}.json", f"{name}.txt", f"{name}.json") if path in texts]


def captioned(folder: str, media: list[str], texts: set[str]) -> Iterator[object]:
    """A row for each picture and the text beside it; a DataError for a picture that has none, or several."""
    stems = Counter(os.path.splitext(name)[0] for name in media)
    for name in media:
        where = os.path.join(folder, name)
        stem = os.path.splitext(name)[0]
        found = captions_of(name, texts)
        if not found:
            yield DataError(
                f"{where}: no text beside it; write its caption into {Path(where).with_suffix('.txt').name}"
            )
        elif len(found) > 1:
            yield DataError(f"{where}: several texts beside it, {' and '.join(found)}; keep one")
        elif stems[stem] > 1 and os.path.splitext(found[0])[0] == stem:
            yield DataError(f"{where}: {found[0]} is beside {stems[stem]} pictures of this name; rename all but one")
        else:
            yield from rows_beside(folder, name, found[0])


def passed_over(media: list[str], texts: set[str]) -> str:
    """What is said of files of text that belong to no picture, such as a README; "" where there are none."""
    used = set()
    for name in media:
        used.update(captions_of(name, texts))
    left = sorted(texts - used, key=natural_key)
    if not left:
        return ""
    few = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    return f"passed over, as no picture has its name: {few} ({len(left):,} of text in all)"


def rows_beside(folder: str, name: str, text: str) -> Iterator[object]:
    """The row, or the rows, that the file of text beside a picture holds."""
    where = os.path.join(folder, text)
    try:
        content = Path(where).read_text(encoding="utf-8-sig")
        rows = json.loads(content) if text.endswith(".json") else content.strip()
    except UnicodeDecodeError as error:
        yield DataError(f"{where}: not UTF-8 text (byte {error.start}); save the file as UTF-8")
        return
    except (ValueError, RecursionError) as error:
        yield DataError(f"{where}: not valid JSON ({error!s:.80}); repair it")
        return
    except OSError as error:
        yield DataError(f"{where}: cannot be read ({error.strerror})")
        return
    for row in rows if isinstance(rows, list) else [rows]:
        if isinstance(row, str):
            row = {"caption": row}
        if not isinstance(row, dict):
            yield DataError(
                f"{where}: holds {type(row).__name__}; a caption is a text, or {{'question': ..., 'answer': ...}}"
            )
            continue
        yield Placed(where, {**row, "image": name})


# ---- classes --------------------------------------------------------------------------------------------------------


def classed(folder: str, media: list[str]) -> Iterator[object]:
    """A row for each picture, whose class is its folder; a DataError for one that lies elsewhere."""
    for name in media:
        where = os.path.join(folder, name)
        parts = Path(name).parts
        if len(parts) == 2:
            yield Placed(where, {"image": name, "class": parts[0]})
        elif len(parts) == 1:
            yield DataError(f"{where}: lies beside the folders of the classes; put it into the folder of its class")
        else:
            yield DataError(
                f"{where}: lies {len(parts) - 1} folders deep; name the folder that the folders of the classes lie in"
            )
