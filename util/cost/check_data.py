"""A look over data before training: `python -m util check my_data/data.json --eval_data held_out.json`.

Files come first, then any flags of finetune.py: what a training with them would refuse or shrink is said, and all that
can be known from file headers; with --decode every file is decoded, too. No weights are loaded. Exit code 2 where a
sample cannot be trained on, or a file cannot be decoded.
"""

import argparse
import hashlib
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from util.command_line import MOST_TOLD, UserError, parse, setting, settings_parser
from util.config import Config

REPORT = "test_output/refused.txt"
ASSUMED_MFU = 0.35  # share of a GPU's peak that training reaches
ASSUMED_SHARE = 0.1  # of the rate of a large matrix product that training reaches on a CPU: `tiny` does, about


@dataclass
class CheckSettings(Config):
    report: str | None = setting(
        None, f"write all refused samples into this file; default: {REPORT}, when they are more than {MOST_TOLD}"
    )

    decode: bool = setting(False, "decode every image and every frame of every video, and name the files that fail")


@dataclass
class Note:
    """What is kept of a sample beside its size."""

    where: str
    named: str | None  # the kind that the file gives
    kind: str  # of content: "one image", "video" ...
    media: list[tuple[str, str | list[str]]]  # "image" or "video", and its path or the paths of its frames
    text: bytes  # digest of roles and texts, white space and case apart

    @property
    def files(self) -> list[tuple[str, str]]:
        """Each file with what it is, a video's frames as images."""
        found = []
        for kind, value in self.media:
            found += [("image", path) for path in value] if isinstance(value, list) else [(kind, value)]
        return found

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.files]


def note(example) -> Note:
    """The Note of a dataset.Example."""
    kinds = Counter(item["type"] for item in example.media)
    parts = [f"{'one' if number == 1 else 'several'} {kind}{'s' * (number > 1)}" for kind, number in kinds.items()]
    said = []
    for message in example.messages:
        texts = [item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in message["content"]]
        said.append(f"{message['role']}: {' '.join(unicodedata.normalize('NFKC', ' '.join(texts)).casefold().split())}")
    digest = hashlib.blake2b("\n".join(said).encode(), digest_size=16).digest()
    media = [(item["type"], item[item["type"]]) for item in example.media]
    return Note(example.where, example.kind, " and ".join(sorted(parts)) or "text alone", media, digest)


# ---- the same in training and in evaluation data --------------------------------------------------------------------


def identities(paths: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """What each path of both sets stands for: equal for equal content. Only files of a size found in both are read;
    a remote file is taken at its address."""
    from util.data import fetch

    def size(path: str) -> int | None:
        try:
            return None if fetch.is_remote(path) else os.stat(path).st_size
        except OSError:
            return None

    sets = [{path: size(path) for path in set(some)} for some in (paths, others)]
    shared = set(sets[0].values()) & set(sets[1].values()) - {None}
    both = {**sets[0], **sets[1]}
    hashed = [path for path, number in both.items() if number in shared]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(hashed, pool.map(digest_of, hashed), strict=True))
    return {path: digests.get(path, path) for path in both}


def digest_of(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # gone meanwhile
        return path


def overlap(train: list[Note], held_out: list[Note]) -> dict[str, list[str]]:
    """Lines that name what stands in both, under "conversations" (same text and media) and "media"."""
    same = identities((p for n in train for p in n.paths), (p for n in held_out for p in n.paths))
    conversations, media = {}, {}
    for one in train:
        conversations.setdefault((one.text, *[same[path] for path in one.paths]), one.where)
        for path in one.paths:
            media.setdefault(same[path], f"{path} ({one.where})")
    found: dict[str, list[str]] = {"conversations": [], "media": []}
    seen = set()
    for one in held_out:
        if first := conversations.get((one.text, *[same[path] for path in one.paths])):
            found["conversations"].append(f"{one.where} is {first}")
        for path in one.paths:
            if same[path] in media and path not in seen:
                seen.add(path)
                found["media"].append(f"{path} ({one.where}) is {media[same[path]]}")
    return found


# ---- everything decoded ---------------------------------------------------------------------------------------------


class Decoding:
    """Files by number, each decoded in full when it is asked for: what a worker does."""

    def __init__(self, files: list[tuple[str, str]], settings) -> None:
        self.files, self.settings = files, settings

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> str:
        """What training would refuse the file for, were it to ask for all of it; empty where all of it decodes."""
        from util import vision
        from util.data import fetch

        kind, path = self.files[number]
        try:
            (item,) = fetch.localise([{"type": kind, kind: path}], self.settings)
            if kind == "image":
                vision.to_tensor(vision.open_image(item["image"]), item["image"])
                return ""
            with vision.open_video(item) as video:
                decoded, promised = video.count_decodable(), len(video)
        except (ValueError, OSError) as error:
            return str(error)
        if decoded == promised:
            return ""
        return f"{fetch.printable(path)}: {promised - decoded:,} of {promised:,} frames cannot be decoded whole"


def decode_all(notes: list[Note], config: CheckSettings) -> list[str]:
    """Every file of some samples decoded once, in workers; lines that name those that fail."""
    from tqdm import tqdm

    from util.cost.measure import MOST_WORKERS, as_is, usable_cpus
    from util.data.loader import Loader
    from util.data.media import MediaReader

    first: dict[tuple[str, str], str] = {}  # file: the first sample that holds it
    for one in notes:
        for file in one.files:
            first.setdefault(file, one.where)
    decoding = Decoding(list(first), MediaReader(config).settings)
    workers = min(MOST_WORKERS, usable_cpus()) if config.num_workers is None else config.num_workers
    loader = Loader(decoding, batch_size=None, num_workers=min(workers, len(decoding)), collate_fn=as_is)
    failed, began = [], time.perf_counter()
    with tqdm(total=len(decoding), desc="decoding", unit=" files", leave=False, delay=1) as progress:
        for problem, where in zip(loader, first.values(), strict=True):
            failed += [f"{where}: {problem}"] if problem else []
            progress.update()
    seconds = time.perf_counter() - began
    show_table("decoded", {"files": f"{len(decoding):,} in {seconds:,.1f} s; {len(failed):,} cannot be decoded whole"})
    return failed


# ---- the forecast ---------------------------------------------------------------------------------------------------


def forecast(config: Config, path: str, samples, sizes, device) -> dict[str, str]:
    """Steps, memory by part and time of an epoch, each as a line: an estimate, from sizes and the model's config."""
    from util.cost import flops, memory
    from util.log import clock
    from util.model import choose_dtype, load_config
    from util.steps import training_steps

    model_config, dtype = load_config(path), choose_dtype(config.dtype, device)
    steps = training_steps(sizes, samples.examples, config)
    counts = memory.count_parameters(model_config, config)
    needs = memory.forecast(model_config, counts, config, dtype, steps.survey.heaviest)
    needed, free = sum(needs.values()), memory.free_bytes(device)
    epoch = steps.order(0)
    epoch = epoch[sizes.is_usable[epoch]]
    work = flops.training_flops(model_config, [sizes.columns()], config)[epoch].sum()
    rate, how = training_rate(device, dtype)
    tokens = int(sizes.tokens[epoch].sum())
    fits = "" if needed <= free else f": DOES NOT FIT the {free / memory.GIB:.1f} GiB that are free"
    if rate:
        seconds = work / rate
        span = clock(seconds) if seconds >= 1 else "under 0:01"
        took = f"{span} an epoch, a rough estimate, easily wrong by a factor of 3: {work:.2g} FLOPs at {how}"
    else:
        took = f"{work:.2g} FLOPs an epoch; {how}"
    return {
        "steps": f"{len(steps):,} of at most {config.global_batch_size} samples in {config.epochs} epoch(s), "
        f"{steps.survey.fewest} to {steps.survey.most} forward passes each",
        "tokens": f"{tokens:,} an epoch",
        "memory": f"{needed / memory.GIB:.2f} GiB at the peak on {device}{fits}: {memory.parts_in_words(needs)}",
        "time": f"{took}; evaluating, saving and waiting for data come on top",
    }


def training_rate(device, dtype) -> tuple[float | None, str]:
    """FLOP/s that training may reach on a device, and where the figure comes from."""
    import torch

    from util.cost import flops

    if device.type == "cuda":
        peak, name = flops.peak_flops(device), torch.cuda.get_device_name(device)
        if peak is None:
            return None, f"what {name} can do is not known here"
        return ASSUMED_MFU * peak, f"an assumed {ASSUMED_MFU:.0%} of {name}'s {peak / 1e12:,.0f} TFLOP/s"
    matrix = torch.rand(768, 768, dtype=dtype)
    matrix @ matrix  # the first one starts threads
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 0.3:
        matrix @ matrix
        products += 1
    rate = products * 2 * len(matrix) ** 3 / (time.perf_counter() - began)
    return ASSUMED_SHARE * rate, f"an assumed {ASSUMED_SHARE:.0%} of the {rate / 1e9:,.0f} GFLOP/s just measured here"


# ---- the overview ---------------------------------------------------------------------------------------------------


def percentiles(values: list[int]) -> str:
    """`40 / 52 / 130 / 900 / 1,200`: the least, 5 %, half, 95 %, the most."""
    ordered = sorted(values)
    chosen = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.05, 0.5, 0.95, 1)]
    return " / ".join(f"{value:,}" for value in chosen)


def overview(files: list[str], findings: list) -> dict[str, str]:
    """Lines about one set of data."""
    from util.cost.measure import CUT, describe_unused
    from util.data import bad_samples

    good = [finding for finding in findings if finding.size]
    lines = {"data": f"{', '.join(files)}: {len(findings):,} samples, {len(good):,} can be trained on"}
    kinds = Counter(finding.note.kind for finding in findings if finding.note)
    named = Counter(finding.note.named for finding in findings if finding.note and finding.note.named)
    for name, counted in (("content", kinds), ("kinds", named)):
        if counted:
            shown = ", ".join(f"{number:,} {kind}" for kind, number in counted.most_common(8))
            lines[name] = shown + (f" and {len(counted) - 8} more kinds" if len(counted) > 8 else "")
    if good:
        tokens = [finding.size.tokens for finding in good]
        patches = [grid.patches for finding in good for grid in finding.size.grids]
        supervised = [finding.size.supervised for finding in good]
        lines["tokens"] = f"{percentiles(tokens)} a sample (least / 5 % / half / 95 % / most), {sum(tokens):,} in all"
        if patches:
            lines["patches"] = f"{percentiles(patches)} an image or video, {sum(patches):,} of {len(patches):,} in all"
        lines["supervised"] = f"{sum(supervised) / sum(tokens):.1%} of the tokens; {percentiles(supervised)} a sample"
        if capped := sum(grid.capped for finding in good for grid in finding.size.grids):
            lines["videos"] = f"{capped:,} made smaller or shorter to cost at most --video_max_tokens"
    if cut := sum(grid.cut for finding in good for grid in finding.size.grids):
        lines["cut videos"] = f"{cut:,} {CUT}"
    if unused := Counter(key for finding in findings for key in finding.unused):
        lines["keys"] = describe_unused(unused)
    if shrunk := [finding for finding in good if finding.budget]:
        before, after = sum(f.tokens_before for f in shrunk), sum(f.size.tokens for f in shrunk)
        lines["shrunk"] = (
            f"{len(shrunk):,} to fit --max_tokens, {before:,} to {after:,} tokens; the first is {shrunk[0].note.where}"
        )
    if refused := Counter(finding.reason for finding in findings if not finding.size):
        lines["refused"] = f"{refused.total():,}: {bad_samples.reasons_in_words(refused)}"
    return lines


def show_table(title: str, lines: dict[str, str]) -> None:
    width = max(map(len, lines))
    print("\n".join([title, *(f"  {name:<{width}}  {line}" for name, line in lines.items()), ""]), flush=True)


def cut_videos(findings: list) -> list[str]:
    """Lines that name the videos whose files end before their time."""
    lines = []
    for finding in findings:
        if finding.size and finding.note:
            media = zip(finding.note.media, finding.size.grids, strict=True)
            lines += [f"{finding.note.where}: {path}" for (_, path), grid in media if grid.cut]
    return lines


def say(title: str, lines: list[str]) -> None:
    """A title and up to 20 lines below it; nothing where there are none."""
    if lines:
        print(title)
        print("".join(f"  {line}\n" for line in lines[:MOST_TOLD]), end="")
        if len(lines) > MOST_TOLD:
            print(f"  ... and {len(lines) - MOST_TOLD:,} more")
        print(flush=True)


def say_refused(problems: list[str], report: str | None) -> None:
    """Name the samples that cannot be trained on: up to 20 here, all of them in a file when they are more."""
    if report or len(problems) > MOST_TOLD:
        file = Path(report or REPORT)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(problem + "\n" for problem in problems), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--report {file}: cannot be written ({error.strerror})") from None
    if problems:
        print("refused")
        print("".join(f"  {problem}\n" for problem in problems[:MOST_TOLD]), end="")
        if len(problems) > MOST_TOLD:
            print(f"  ... and {len(problems) - MOST_TOLD:,} more: all are in {file}")
        print(flush=True)


def check(config: CheckSettings) -> None:
    """Look at all data of `config` and print what there is to know; exit code 2 where samples are refused."""
    from util.cost.measure import look
    from util.cost.sizes import Sizes
    from util.data.media import MediaReader
    from util.dataset import Examples, Samples
    from util.model import choose_device, find_model, load_processor
    from util.vision import Budget

    device = choose_device(config.device)
    path = find_model(config.model, device)
    processor = load_processor(path)
    found, problems, looked, undecodable = {}, [], {}, []
    for title, files in (("training data", config.data), ("evaluation data", config.eval_data)):
        if not files:
            continue
        samples = Samples(Examples(files, processor), processor, Budget.of(config), MediaReader(config))
        began = time.perf_counter()
        findings = look(samples, config.max_tokens, config.on_long_sample, config.num_workers, note)
        rate = len(samples) / (time.perf_counter() - began)
        found[title], looked[title] = findings, samples
        problems += [finding.problem for finding in findings if not finding.size]
        show_table(f"{title} ({rate:,.0f} samples a second)", overview(files, findings))
        say("cut videos", cut_videos(findings))
        if config.decode:
            undecodable += decode_all([finding.note for finding in findings if finding.note], config)
    train, held_out = (
        [f.note for f in found.get(title, []) if f.note] for title in ("training data", "evaluation data")
    )
    if config.eval_data:
        both = overlap(train, held_out)
        lines = {name: f"{len(same):,}" for name, same in both.items()}
        show_table("the same in training and evaluation data", lines)
        print("".join(f"  {line}\n" for same in both.values() for line in same[:MOST_TOLD]), flush=True)
    sizes = Sizes.of(found["training data"])
    if len(sizes.usable):
        samples = looked["training data"]
        show_table("forecast", forecast(config, path, samples, sizes, device))
    say_refused([*problems, *undecodable], config.report)
    ends = []
    if problems:
        ends.append(
            f"{len(problems):,} samples cannot be trained on; mend them, or see --on_bad_sample and --on_long_sample"
        )
    if undecodable:
        ends.append(f"{len(undecodable):,} files cannot be decoded in full; replace them, or see --on_bad_sample")
    if ends:
        raise UserError("\n".join(ends))


def parser() -> argparse.ArgumentParser:
    made = settings_parser(CheckSettings, __doc__.splitlines()[0])
    made.prog = "python -m util check"
    return made


def main(arguments: list[str]) -> None:
    files = list(takewhile(lambda word: not word.startswith("-"), arguments))
    flags = [*(["--data", *files] if files else []), *arguments[len(files) :]]
    check(parse(CheckSettings, __doc__.splitlines()[0], flags))
