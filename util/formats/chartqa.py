"""ChartQA (arXiv 2203.10244) in this project's format: `python -m util chartqa`.

    python -m util chartqa                                    from the hub (pip install datasets)
    python -m util chartqa --from "my/ChartQA Dataset"        from a folder in the published layout
    python -m util chartqa --from drawn --count 3000          charts drawn on the spot, in that same layout
    python -m util chartqa --share 0.1 --seed 1               a tenth of the human and of the augmented questions

Writes train.jsonl, val.jsonl and test.jsonl into --output_dir, and test_plain.jsonl: the test without system message.
Run it again to go on with a preparation or a download that was interrupted. Questions and labels stay as published (but
for white space at their ends), so that scores can be compared with published ones; odd ones are counted and told.
"""

import argparse
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from util.command_line import UserError, command_parser
from util.data.lines import DataError
from util.formats.chartqa_sources import HUB_NAME, KINDS, Folder, Hub, Row
from util.formats.convert import Refused, counted, whole_file
from util.formats.media_paths import image_suffix, write_by_content

# Questions as published: 9,608 human and 23,111 augmented in all (arXiv 2203.10244).
PUBLISHED = {
    "train": {"human": 7398, "augmented": 20901},
    "val": {"human": 960, "augmented": 960},
    "test": {"human": 1250, "augmented": 1250},
}
SYSTEM_MESSAGE = "Answer the question about the chart with one word, one number or a short phrase."
CONTROL = re.compile(r"<\|(?:endoftext|im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")
MOST_ASPECT = 200  # of an image's sides, as Qwen2-VL's smart_resize has it
CHARTS = ("bars", "lines", "pies")  # the kinds that util/formats/draw_charts.py draws
DRAWN_CHARTS = 3000  # for training; a tenth of it each for val and test


# ---- one row --------------------------------------------------------------------------------------------------------


class Images:
    """Where the samples' images are: those of a folder stay there, those of the hub become files, each written once."""

    def __init__(self, output: Path) -> None:
        self.folder = os.path.realpath(output)
        self.store = output / "images"
        self.checked: dict[str, str] = {}  # path: what is wrong with it, or ""
        self.new = 0  # files written

    def place(self, image: object, png: Path | None) -> str:
        """The path of a row's image as the output files name it. Raises DataError, its message without the row."""
        if isinstance(image, bytes):
            suffix = image_suffix(image, ": ")
            path, is_new = write_by_content(self.store, image, suffix)
            self.new += is_new
            name = f"images/{path.name}"
        else:
            if not isinstance(image, str) or not image or Path(image).name != image or "\0" in image:
                raise DataError(f": imgname must be the name of a file in {png}, is {str(image)[:80]!r}; repair it")
            path = png / image
            name = str(path) if path.is_absolute() else os.path.relpath(os.path.realpath(path), self.folder)
        if str(path) not in self.checked:
            self.checked[str(path)] = problem_of(path)
        if self.checked[str(path)]:
            raise DataError(f": {self.checked[str(path)]}")
        return name


def problem_of(path: Path) -> str:
    """What makes an image file useless, seen from its header; "" for nothing."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
    except FileNotFoundError:
        return f"no such image {str(path)!r}; add the file, or take the row out"
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return f"{str(path)!r} is no image that can be read; get the file again"
    if max(width, height) > MOST_ASPECT * min(width, height):
        return f"{str(path)!r} is {width}x{height}, sides more than {MOST_ASPECT} to 1; take the row out"
    return ""


def text_of(value: object, name: str, notes: Counter) -> str:
    """A query or a label as text. Raises DataError where it cannot be used."""
    if isinstance(value, list):  # the hub's labels are lists of one
        if len(value) != 1:
            raise DataError(f": {name} must be one text, is a list of {len(value)}; keep one")
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        notes[f"{name}s that were numbers, written as text"] += 1
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f": {name} must be text, is {type(value).__name__}; repair it")
    text = value.strip()
    if not text:
        raise DataError(f": {name} is empty; write one, or take the row out")
    if control := CONTROL.search(text):
        raise DataError(f": {name} contains the control token {control[0]!r}; take it out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f": {name} holds half of a surrogate pair, which is no character; repair it")
    notes[f"{name}s with white space at their ends, taken off"] += text != value
    notes[f"{name}s with a lost character (U+FFFD), kept"] += "\ufffd" in text
    return text


def sample_of(row: Row, images: Images, png: Path | None, system: str, notes: Counter) -> dict:
    """A row as a sample of this project. Raises DataError that names the row."""
    try:
        query = text_of(row.query, "question", notes)
        label = text_of(row.label, "label", notes)
        path = images.place(row.image, png)
    except DataError as error:
        raise DataError(f"{row.where}{error}") from None
    notes["labels that are a list in brackets, kept as one text"] += label.startswith("[") and label.endswith("]")
    asked = [{"type": "image", "image": path}, {"type": "text", "text": query}]
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": label}]
    return {"kind": row.kind, "messages": messages}


# ---- all of it ------------------------------------------------------------------------------------------------------


def sampled(kinds: list[str], share: float, seed: int, split: str) -> list[int]:
    """The numbers of the rows that a share takes, in order; the same seed gives the same rows.

    The share is taken of human and of augmented questions alike. A larger share contains every smaller one.
    """
    chosen = []
    for kind in KINDS:
        rows = [index for index, other in enumerate(kinds) if other == kind]
        random.Random(f"{seed} {split} {kind}").shuffle(rows)
        chosen += rows[: max(round(share * len(rows)), min(1, len(rows)))]
    return sorted(chosen)


def difference_to_published(split: str, kinds: list[str]) -> str | None:
    """A warning where a split has more or fewer rows than the published one; else None."""
    counts = Counter(kinds)
    differences = []
    for kind, published in PUBLISHED[split].items():
        if more := counts[kind] - published:
            all_of_it = "" if counts[kind] else "all "
            differences.append(f"{all_of_it}{abs(more):,} {kind} {'too many' if more > 0 else 'missing'}")
    if not differences:
        return None
    return (
        f"warning: {split} has {len(kinds):,} rows, published are {sum(PUBLISHED[split].values()):,}: "
        f"{', '.join(differences)}; get the files again if this is to be compared with published scores"
    )


def rows_in_words(kinds: Iterable[str]) -> str:
    """`800 rows, 400 human and 400 augmented`."""
    counts = Counter(kinds)
    by_kind = " and ".join(f"{counts[kind]:,} {kind}" for kind in KINDS)
    return f"{counted(counts.total(), 'row')}, {by_kind}"


def joined(samples: list[dict], seed: int) -> list[dict]:
    """Samples about the same chart as one conversation of several turns, in the order of the charts' first questions.

    The turns of each are in random order, so that the model cannot learn to rely on the answers before.
    """
    charts: dict[str, list[dict]] = {}
    for sample in samples:
        charts.setdefault(sample["messages"][-2]["content"][0]["image"], []).append(sample)
    conversations = []
    for image, several in charts.items():
        random.Random(f"{seed} {image}").shuffle(several)
        messages = several[0]["messages"][:-2]
        for number, sample in enumerate(several):
            question, answer = sample["messages"][-2:]
            chart, query = question["content"]
            content = query["text"] if number else [chart, query]
            messages += [{"role": "user", "content": content}, answer]
        found = {sample["kind"] for sample in several}
        kinds = [kind for kind in KINDS if kind in found]
        conversations.append({"kind": " and ".join(kinds), "messages": messages})
    return conversations


def without_system(sample: dict) -> dict:
    return {**sample, "messages": [message for message in sample["messages"] if message["role"] != "system"]}


@dataclass
class Preparation:
    """Makes samples of rows."""

    images: Images
    system_message: str
    refused: Refused
    notes: Counter = field(default_factory=Counter)  # what was odd about the rows, and how often

    def read_split(self, opened: Folder | Hub, split: str, chosen: list[int]) -> list[dict]:
        """The samples of a split's chosen rows but those that are refused."""
        png = opened.root / split / "png" if isinstance(opened, Folder) else None
        samples = []
        seen = set()
        for row in tqdm(opened.rows(split, chosen), split, len(chosen), unit=" rows", leave=False, disable=None):
            try:
                if isinstance(row, DataError):
                    raise row
                sample = sample_of(row, self.images, png, self.system_message, self.notes)
            except DataError as error:
                self.refused.add(str(error))
                continue
            question, answer = sample["messages"][-2:]
            image, query = question["content"]
            same = (image["image"], query["text"], answer["content"])
            self.notes["rows that stand there twice, kept"] += same in seen
            seen.add(same)
            samples.append(sample)
        return samples

    def summary(self) -> list[str]:
        """Lines about what was odd, what was left out, and the images that were written."""
        lines = [f"{number:,} {note}" for note, number in self.notes.items() if number]
        if self.refused.count:
            lines.append(f"{self.refused.count:,} skipped")
        if self.images.new:
            lines.append(f"{counted(self.images.new, 'new image')} in {self.images.store}")
        return lines


def prepare(
    source: str,
    output_dir: str,
    splits: list[str],
    share: float,
    seed: int,
    system_message: str,
    join_questions: bool,
    skip_bad: bool,
    count: int,
    scale: int,
    charts: list[str],
    hub_name: str,
) -> str:
    """Write the files of `splits` and give the summary. Raises UserError, and then no .jsonl file is written."""
    output = Path(output_dir)
    check_flags(splits, share, count, scale, output)
    opened = open_source(source, output, seed, count, scale, charts, hub_name)
    refused = Refused(skip_bad)
    preparation = Preparation(Images(output), system_message, refused)
    lines = []
    files = {}
    for split in splits:
        kinds = opened.kinds(split)
        if source == "drawn":
            lines.append(f"{split}: {rows_in_words(kinds)}")
        elif warning := difference_to_published(split, kinds):
            print(warning, file=sys.stderr)
        else:
            lines.append(f"{split}: {rows_in_words(kinds)}, as published")
        files[f"{split}.jsonl"] = preparation.read_split(opened, split, sampled(kinds, share, seed, split))
    refused.stop(
        f"{counted(refused.count, 'row')} cannot be used, so nothing is written; --skip_bad leaves such rows out"
    )
    lines += write_files(output, files, join_questions, seed)
    lines += preparation.summary()
    lines.append(f"look at one: python -m util show {output / next(iter(files))}")
    return "\n".join(lines)


def write_files(output: Path, files: dict[str, list[dict]], join_questions: bool, seed: int) -> list[str]:
    """Write the samples of each file, and the test without its system message; a line about each file.

    Raises UserError, and writes nothing, where a file would be empty.
    """
    if "test.jsonl" in files:
        files = {**files, "test_plain.jsonl": [without_system(sample) for sample in files["test.jsonl"]]}
    for name, samples in files.items():
        if not samples:
            raise UserError(f"{output / name}: no rows are left for it, so nothing is written")
    lines = []
    for name, samples in files.items():
        conversations = joined(samples, seed) if join_questions and name == "train.jsonl" else samples
        with whole_file(output / name) as writer:
            for conversation in conversations:
                writer.write(conversation)
        line = f"wrote {output / name}: {rows_in_words(sample['kind'] for sample in samples)}"
        if len(conversations) < len(samples):
            line += f", in {counted(len(conversations), 'conversation')}"
        lines.append(line)
    return lines


def check_flags(splits: list[str], share: float, count: int, scale: int, output: Path) -> None:
    """Raise one UserError that names every flag with an impossible value."""
    found = []
    if not 0 < share <= 1:
        found.append(f"--share {share}: must be above 0 and at most 1")
    if count < 10:  # val and test get a tenth of it
        found.append(f"--count {count}: must be at least 10")
    if scale < 1:
        found.append(f"--scale {scale}: must be at least 1")
    if len(set(splits)) < len(splits):
        found.append(f"--splits {' '.join(splits)}: names one twice")
    if output.exists() and not output.is_dir():
        found.append(f"--output_dir {output}: is a file; name a folder")
    if found:
        raise UserError("\n".join(found))


def open_source(source: str, output: Path, seed: int, count: int, scale: int, charts: list[str], hub_name: str):
    """The Folder or Hub that `--from` names; charts are drawn first where it is `drawn`."""
    if source == "hub":
        return Hub(hub_name)
    if source != "drawn":
        return Folder(source)
    from util.formats.draw_charts import draw_dataset

    counts = {"train": count, "val": count // 10, "test": count // 10}
    draw_dataset(output / "drawn", counts, seed, scale, tuple(charts))
    return Folder(str(output / "drawn"))


def parser() -> argparse.ArgumentParser:
    made = command_parser("chartqa", __doc__)
    made.add_argument("--from", dest="source", default="hub", metavar="FROM",
                        help="hub, a folder in the published layout, or drawn; default: hub")  # fmt: skip
    made.add_argument("--output_dir", default="train_data/chartqa", help="where to write; default: %(default)s")
    made.add_argument("--splits", nargs="+", choices=tuple(PUBLISHED), default=list(PUBLISHED), help="default: all")
    made.add_argument("--share", type=float, default=1.0, help="of each split and kind; default: %(default)s")
    made.add_argument("--seed", type=int, default=0, help="of the sample and of drawn charts; default: %(default)s")
    made.add_argument("--system_message", default=SYSTEM_MESSAGE, help="default: %(default)r; '' for none")
    made.add_argument("--no_system_message", dest="system_message", action="store_const", const="",
                        help="the same as --system_message ''")  # fmt: skip
    made.add_argument("--join_questions", action="store_true",
                        help="train on all questions about a chart in one conversation: it is read once")  # fmt: skip
    made.add_argument("--skip_bad", action="store_true", help="list rows that cannot be used and leave them out")
    made.add_argument("--hub_name", default=HUB_NAME, help="another name, or a folder of its parquet files")
    made.add_argument("--count", type=int, default=DRAWN_CHARTS, help="drawn charts to train on; default: %(default)s")
    made.add_argument("--scale", type=int, default=1, help="of drawn charts, times 112x84; default: %(default)s")
    made.add_argument("--charts", nargs="+", choices=CHARTS, default=[], help="which are drawn; default: all")
    return made


def main(arguments: list[str]) -> None:
    print(prepare(**vars(parser().parse_args(arguments))))
