"""A look over data before training: `python -m util check my_data/data.json --eval_data held_out.json`.

Files come first, then any flags of finetune.py. It tells which samples a training with these flags would refuse or
shrink, and everything that file headers say; with --decode every file is decoded, too. No weights are loaded. The exit
code is 2 where a sample cannot be trained on, or a file cannot be decoded.

With --gpus it also proposes how to lay out so many GPUs, for these data or, where no file is named, for a typical mix;
a folder with a config.json is enough of a model then.
"""

import argparse
import hashlib
import math
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from util.command_line import MOST_TOLD, UserError, parse, setting, settings_parser
from util.config import Config
from util.cost.settings import budget_in_bytes, changed

if TYPE_CHECKING:
    from util.dataset import Samples
    from util.vision import Budget

REPORT = "test_output/refused.txt"
GPU_MEMORY = "80GiB"
SAMPLES_PER_GPU = 8  # of a global batch, where --global_batch_size is not typed
ASSUMED_MFU = 0.35  # share of a GPU's peak that training reaches
ASSUMED_SHARE = 0.1  # of a large matrix product's rate that training reaches on a CPU, about what `tiny` does


@dataclass
class CheckSettings(Config):
    report: str | None = setting(
        None, f"write all refused samples into this file; default: {REPORT}, when they are more than {MOST_TOLD}"
    )

    decode: bool = setting(False, "decode every image and every frame of every video, and name the files that fail")
    gpus: int | None = setting(
        None, "propose how to lay out the model on so many H100s; computed, not measured", least=1
    )
    gpu_memory: str | None = setting(None, "with --gpus: memory of each, such as 80GiB; default: 80GiB")
    gpus_per_machine: int = setting(8, "with --gpus: how many of them NVLink joins", least=1)

    def invalid_combinations(self) -> list[str]:
        return [*super().invalid_combinations(), *self.invalid_gpus()]

    def invalid_gpus(self) -> list[str]:
        """A message for each setting that says something impossible of GPUs to lay out."""
        if not self.gpus:
            return [f"--gpu_memory {self.gpu_memory} needs --gpus"] if self.gpu_memory else []
        found = []
        size = budget_in_bytes(self.gpu_memory or GPU_MEMORY)
        if not size or math.isinf(size):
            found.append(f"--gpu_memory {self.gpu_memory}: must be a size above 0 such as 80GiB")
        if self.gpus > self.gpus_per_machine and self.gpus % self.gpus_per_machine:
            found.append(
                f"--gpus {self.gpus}: must be at most the {self.gpus_per_machine} of a machine, or whole machines of "
                f"{self.gpus_per_machine} (--gpus_per_machine)"
            )
        if self.dtype not in ("auto", "bfloat16"):
            found.append(f"--gpus counts in bfloat16, and --dtype is {self.dtype}")
        if self.gpus > 1 and self.optimizer != "adamw":
            found.append(f"--optimizer {self.optimizer} runs on one GPU alone, and --gpus is {self.gpus}")
        return found


@dataclass
class Note:
    """What is kept of a sample besides its size."""

    where: str
    named: str | None  # the kind that the file gives
    kind: str  # of content: "one image", "video" ...
    media: list[tuple[str, str | list[str]]]  # "image" or "video", and its path or the paths of its frames
    text: bytes  # digest of roles and texts, without regard to white space and case

    @property
    def files(self) -> list[tuple[str, str]]:
        """("image" or "video", path) of each file; a video that is given as frames is so many images."""
        found = []
        for kind, value in self.media:
            if isinstance(value, list):
                found += [("image", path) for path in value]
            else:
                found.append((kind, value))
        return found

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.files]


def note(example) -> Note:
    """The Note of a dataset.Example."""
    kinds = Counter(item["type"] for item in example.media)
    parts = [f"one {kind}" if number == 1 else f"several {kind}s" for kind, number in kinds.items()]
    content = " and ".join(sorted(parts)) or "text alone"
    said = []
    for message in example.messages:
        texts = [item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in message["content"]]
        words = unicodedata.normalize("NFKC", " ".join(texts)).casefold().split()
        said.append(f"{message['role']}: {' '.join(words)}")
    digest = hashlib.blake2b("\n".join(said).encode(), digest_size=16).digest()
    media = [(item["type"], item[item["type"]]) for item in example.media]
    return Note(example.where, example.kind, content, media, digest)


# ---- the same in training and in evaluation data --------------------------------------------------------------------


def identities(paths: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """For each path of two sets a text that is equal for files of equal content.

    Only files whose size occurs in both sets are read. A remote file counts as equal only to itself.
    """
    from util.data import fetch

    def size(path: str) -> int | None:
        try:
            return None if fetch.is_remote(path) else os.stat(path).st_size
        except OSError:
            return None

    sizes = {path: size(path) for path in set(paths)}
    other_sizes = {path: size(path) for path in set(others)}
    shared = set(sizes.values()) & set(other_sizes.values()) - {None}
    both = {**sizes, **other_sizes}
    hashed = [path for path, number in both.items() if number in shared]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(hashed, pool.map(digest_of, hashed), strict=True))
    return {path: digests.get(path, path) for path in both}


def digest_of(path: str) -> str:
    """A hash of a file's content; its path where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # gone meanwhile
        return path


def overlap(train: list[Note], held_out: list[Note]) -> dict[str, list[str]]:
    """Lines that name what occurs in both, under "conversations" (same text and media) and "media"."""
    content_of = identities(paths_of(train), paths_of(held_out))
    conversations = {}  # (text, content of its media): the first sample in training
    media = {}  # content: the first file in training, and its sample
    for sample in train:
        contents = [content_of[path] for path in sample.paths]
        conversations.setdefault((sample.text, *contents), sample.where)
        for path, content in zip(sample.paths, contents, strict=True):
            media.setdefault(content, f"{path} ({sample.where})")
    found: dict[str, list[str]] = {"conversations": [], "media": []}
    seen = set()
    for sample in held_out:
        contents = [content_of[path] for path in sample.paths]
        if first := conversations.get((sample.text, *contents)):
            found["conversations"].append(f"{sample.where} is {first}")
        for path, content in zip(sample.paths, contents, strict=True):
            if content in media and path not in seen:
                seen.add(path)
                found["media"].append(f"{path} ({sample.where}) is {media[content]}")
    return found


def paths_of(notes: list[Note]) -> Iterator[str]:
    for sample in notes:
        yield from sample.paths


# ---- everything decoded ---------------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    problem: str  # what is wrong with a file if not all of it can be decoded; else ""
    is_dark: bool = False  # an image in which nothing is bright


class Decoding:
    """Decodes a file in full when it is asked for by its number; may be sent to workers."""

    def __init__(self, files: list[tuple[str, str]], settings) -> None:
        self.files, self.settings = files, settings

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Decoded:
        from util import vision
        from util.data import depth, fetch

        kind, path = self.files[number]
        try:
            (item,) = fetch.localise([{"type": kind, kind: path}], self.settings)
            if kind == "image":
                pixels = vision.to_tensor(vision.open_image(item["image"]), item["image"])
                return Decoded("", is_dark=int(pixels.max()) < depth.NEARLY_BLACK)
            with vision.open_video(item) as video:
                decoded = video.count_decodable()
                promised = len(video)
        except (ValueError, OSError) as error:
            return Decoded(str(error))
        if decoded == promised:
            return Decoded("")
        lost = f"{promised - decoded:,} of {promised:,} frames cannot be decoded whole"
        return Decoded(f"{fetch.printable(path)}: {lost}")


def decode_all(notes: list[Note], config: CheckSettings) -> list[str]:
    """Decode every file of some samples once, in workers; lines that name the files that fail.

    Images that are nearly black are named here, and are no failure: a night may be meant.
    """
    from tqdm import tqdm

    from util.cost.measure import MOST_WORKERS, as_is, usable_cpus
    from util.data.depth import NEARLY_BLACK
    from util.data.loader import Loader
    from util.data.media import MediaReader

    first: dict[tuple[str, str], str] = {}  # file: the first sample that holds it
    for sample in notes:
        for file in sample.files:
            first.setdefault(file, sample.where)
    decoding = Decoding(list(first), MediaReader(config).settings)
    workers = min(MOST_WORKERS, usable_cpus()) if config.num_workers is None else config.num_workers
    loader = Loader(decoding, batch_size=None, num_workers=min(workers, len(decoding)), collate_fn=as_is)
    failed = []
    dark = []
    began = time.perf_counter()
    with tqdm(total=len(decoding), desc="decoding", unit=" files", leave=False, delay=1) as progress:
        for decoded, ((_, path), where) in zip(loader, first.items(), strict=True):
            if decoded.problem:
                failed.append(f"{where}: {decoded.problem}")
            elif decoded.is_dark:
                dark.append(f"{where}: {path}")
            progress.update()
    seconds = time.perf_counter() - began
    lines = {"files": f"{len(decoding):,} in {seconds:,.1f} s; {len(failed):,} cannot be decoded whole"}
    if dark:
        lines["nearly black"] = f"{len(dark):,} images, in which no value is above {NEARLY_BLACK - 1} of 255"
    show_table("decoded", lines)
    show_list("nearly black", dark)
    return failed


# ---- the forecast ---------------------------------------------------------------------------------------------------


def forecast(config: Config, path: str, samples, sizes, device) -> dict[str, str]:
    """Lines with an estimate of steps, memory by part and time of an epoch, from sizes and the model's config."""
    from util.cost import flops, memory
    from util.cost.budget import fit_memory
    from util.log import clock
    from util.model import choose_dtype, load_config
    from util.steps import training_steps

    model_config = load_config(path, config)
    dtype = choose_dtype(config.dtype, device)
    steps = training_steps(sizes, samples.examples, config)
    counts = memory.count_parameters(model_config, config)
    config, steps, needs = fit_memory(config, steps, model_config, counts, dtype, device)
    needed = sum(needs.values())
    free = memory.free_bytes(device)
    margin = memory.reserved_margin(needs, device)
    fits = "" if needed + margin <= free else f": DOES NOT FIT the {free / memory.GIB:.1f} GiB that are free"
    epoch = steps.order(0)
    epoch = epoch[sizes.is_usable[epoch]]
    tokens = int(sizes.tokens[epoch].sum())
    parts = flops.epoch_work(model_config, sizes, epoch, config)
    work = sum(parts.values())
    rate, source = training_rate(device, dtype)
    if rate:
        seconds = work / rate
        span = clock(seconds) if seconds >= 1 else "under 0:01"
        took = f"{span} an epoch, a rough estimate, easily wrong by a factor of 3: {work:.2g} FLOPs at {source}"
    else:
        took = f"{work:.2g} FLOPs an epoch; {source}"
    return {
        "steps": f"{len(steps):,} of at most {config.global_batch_size} samples in {config.epochs} epoch(s), "
        f"{steps.survey.fewest} to {steps.survey.most} forward passes each",
        "tokens": f"{tokens:,} an epoch",
        "work": f"{flops.shares_in_words(parts)}, counted in FLOPs",
        "memory": f"{needed / memory.GIB:.2f} GiB at the peak on {device}{fits}: {memory.parts_in_words(needs)}",
        **({"memory budget": needs.chosen} if needs.chosen else {}),
        "time": f"{took}; evaluating, saving and waiting for data come on top",
    }


def training_rate(device, dtype) -> tuple[float | None, str]:
    """FLOP/s that training may reach on a device, and where the figure comes from."""
    import torch

    from util.cost import flops

    if device.type == "cuda":
        peak = flops.peak_flops(device)
        name = torch.cuda.get_device_name(device)
        if peak is None:
            return None, f"what {name} can do is not known here"
        return ASSUMED_MFU * peak, f"an assumed {ASSUMED_MFU:.0%} of {name}'s {peak / 1e12:,.0f} TFLOP/s"
    matrix = torch.rand(768, 768, dtype=dtype)
    matrix @ matrix  # the first one starts threads
    began = time.perf_counter()
    products = 0
    while time.perf_counter() - began < 0.3:
        matrix @ matrix
        products += 1
    rate = products * 2 * len(matrix) ** 3 / (time.perf_counter() - began)
    return ASSUMED_SHARE * rate, f"an assumed {ASSUMED_SHARE:.0%} of the {rate / 1e9:,.0f} GFLOP/s just measured here"


# ---- a layout for many GPUs ------------------------------------------------------------------------------------------


def propose_layout(config: CheckSettings, path: str, train: "Looked | None") -> None:
    """Print how to lay out `--gpus` of them, and why, for what was looked at or, without data, for a typical mix."""
    from util.cost import choose_layout, work
    from util.cost.links import Hardware
    from util.cost.sizes import Sizes
    from util.model import load_config

    assert config.gpus
    model_config = load_config(path, config)
    beside = {}
    sizes = Sizes.of(train.findings) if train else None
    if "global_batch_size" not in config.given:
        most = len(sizes.usable) if sizes else math.inf
        config = changed(config, global_batch_size=int(min(SAMPLES_PER_GPU * config.gpus, most)))
        beside["assumed"] = (
            f"--global_batch_size {config.global_batch_size}, up to {SAMPLES_PER_GPU} samples for each GPU; of what "
            "stands here it is the one flag that changes the result, so choose it first"
        )
    if train and sizes:
        order = train.samples.examples.order(config.seed, 0)
        order = order[sizes.is_usable[order]]
        samples = work.Workload.of(sizes, order, config, model_config, f"of {', '.join(config.data)}")
    else:
        samples = work.typical(config, model_config)
    memory = budget_in_bytes(config.gpu_memory or GPU_MEMORY) or 0
    hardware = Hardware(memory=memory, machine=config.gpus_per_machine)
    proposal = choose_layout.propose(choose_layout.Search(model_config, config, samples, config.gpus, hardware))
    show_table(proposal.title, {**proposal.facts, **beside})
    show_list("why not another one", proposal.others)
    show_list("what does not fit", proposal.misfits)
    show_list("to start it", proposal.commands)


# ---- the overview ---------------------------------------------------------------------------------------------------


def percentiles(values: list[int]) -> str:
    """`40 / 52 / 130 / 900 / 1,200`: the least, 5 %, half, 95 %, the most."""
    ordered = sorted(values)
    last = len(ordered) - 1
    chosen = [ordered[round(share * last)] for share in (0, 0.05, 0.5, 0.95, 1)]
    return " / ".join(f"{value:,}" for value in chosen)


def overview(files: list[str], findings: list) -> dict[str, str]:
    """Lines about one set of data, by name."""
    from util.cost.measure import unused_in_words
    from util.data import bad_samples

    good = [finding for finding in findings if finding.size]
    lines = {"data": f"{', '.join(files)}: {len(findings):,} samples, {len(good):,} can be trained on"}
    notes = [finding.note for finding in findings if finding.note]
    lines |= kinds_line("content", Counter(note.kind for note in notes))
    lines |= kinds_line("kinds", Counter(note.named for note in notes if note.named))
    if good:
        lines |= size_lines([finding.size for finding in good])
    unused: Counter = Counter()
    for finding in findings:
        unused.update(finding.unused)
    if unused:
        lines["keys"] = unused_in_words(unused)
    if shrunk := [finding for finding in good if finding.budget]:
        before = sum(finding.tokens_before for finding in shrunk)
        after = sum(finding.size.tokens for finding in shrunk)
        lines["shrunk"] = (
            f"{len(shrunk):,} to fit --max_tokens, {before:,} to {after:,} tokens; the first is {shrunk[0].note.where}"
        )
    if refused := Counter(finding.reason for finding in findings if not finding.size):
        lines["refused"] = f"{refused.total():,}: {bad_samples.reasons_in_words(refused)}"
    return lines


def kinds_line(name: str, counted: Counter) -> dict[str, str]:
    """A line of the eight most frequent kinds; nothing where there are none."""
    if not counted:
        return {}
    line = ", ".join(f"{number:,} {kind}" for kind, number in counted.most_common(8))
    if len(counted) > 8:
        line += f" and {len(counted) - 8} more kinds"
    return {name: line}


def size_lines(sizes: list) -> dict[str, str]:
    """Lines about the sizes of at least one sample."""
    from util.cost.measure import CUT, DEEP, FIRST, unlearned_in_words, weighted_in_words

    tokens = [size.tokens for size in sizes]
    supervised = [size.supervised for size in sizes]
    grids = list(chain.from_iterable(size.grids for size in sizes))
    patches = [grid.patches for grid in grids]
    lines = {"tokens": f"{percentiles(tokens)} a sample (least / 5 % / half / 95 % / most), {sum(tokens):,} in all"}
    if patches:
        lines["patches"] = f"{percentiles(patches)} an image or video, {sum(patches):,} of {len(patches):,} in all"
    lines["supervised"] = f"{sum(supervised) / sum(tokens):.1%} of the tokens; {percentiles(supervised)} a sample"
    if unlearned := sum(size.unlearned for size in sizes):
        lines["not learned"] = unlearned_in_words(unlearned, sum(size.unlearned > 0 for size in sizes))
    if weighted := sum(size.weighted for size in sizes):
        lines["weights"] = weighted_in_words(weighted, sum(size.weighted > 0 for size in sizes))
    if capped := sum(grid.capped for grid in grids):
        lines["videos"] = f"{capped:,} made smaller or shorter to cost at most --video_max_tokens"
    if cut := sum(grid.cut for grid in grids):
        lines["cut videos"] = f"{cut:,} {CUT}"
    if deep := sum(grid.deep for grid in grids):
        lines["deep images"] = f"{deep:,} {DEEP}"
    if first := sum(grid.first for grid in grids):
        lines["first images"] = f"{first:,} {FIRST}"
    return lines


def show_table(title: str, lines: dict[str, str]) -> None:
    """A title, and the lines below it, each after its name."""
    width = max(map(len, lines))
    print(title)
    for name, line in lines.items():
        print(f"  {name:<{width}}  {line}")
    print(flush=True)


def media_with(fact: str, findings: list) -> list[tuple[str, str]]:
    """(sample, path) of each image or video of which a fact of vision.Grid is true; of a list of frames the first."""
    found = []
    for finding in findings:
        if finding.size and finding.note:
            media = zip(finding.note.media, finding.size.grids, strict=True)
            named = [path for (_, path), grid in media if getattr(grid, fact)]
            found += [(finding.note.where, path[0] if isinstance(path, list) else path) for path in named]
    return found


def with_ranges(media: list[tuple[str, str]], settings) -> list[str]:
    """Lines that name images that are not of 8 bits, those that will be shown with the range of their values."""
    from util import vision
    from util.data import depth, fetch

    lines = [f"{where}: {path}" for where, path in media]
    for number, (_, path) in enumerate(media[:MOST_TOLD]):
        with suppress(ValueError, OSError):  # gone since it was measured
            (item,) = fetch.localise([{"type": "image", "image": path}], settings)
            image = vision.open_image(item["image"])
            lines[number] += f" ({depth.values_in_words(image, image.info['depth'])})"
    return lines


def show_list(title: str, lines: list[str], hint: str = "") -> None:
    """A title and up to 20 lines below it, and where there are more the hint; nothing where there are no lines."""
    from util.data.lines import first_of

    if lines:
        print(title)
        for line in first_of(lines, hint=hint):
            print(f"  {line}")
        print(flush=True)


def show_refused(problems: list[str], report: str | None) -> None:
    """Name the samples that cannot be trained on: up to 20 here, and if there are more all of them in a file."""
    hint = ""
    if report or len(problems) > MOST_TOLD:
        file = Path(report or REPORT)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--report {file}: cannot be written ({error.strerror})") from None
        hint = f": all are in {file}"
    show_list("refused", problems, hint)


@dataclass
class Looked:
    """What a look at one set of data gave."""

    samples: "Samples"
    findings: list  # a sizes.Finding for each sample
    undecodable: list[str]  # lines that name files, with --decode

    @property
    def notes(self) -> list[Note]:
        return [finding.note for finding in self.findings if finding.note]


def look_at(title: str, files: list[str], processor, config: CheckSettings, budget: "Budget") -> Looked:
    """Look at one set of data, and print what there is to know of it."""
    from util.cost.measure import look
    from util.data.media import MediaReader
    from util.dataset import Examples, Samples

    samples = Samples(Examples(files, processor, config.train_on), processor, budget, MediaReader(config))
    began = time.perf_counter()
    findings = look(samples, config.max_tokens, config.on_long_sample, config.num_workers, note)
    rate = len(samples) / (time.perf_counter() - began)
    show_table(f"{title} ({rate:,.0f} samples a second)", overview(files, findings))
    for title, fact in (("cut videos", "cut"), ("first images", "first")):
        show_list(title, [f"{where}: {path}" for where, path in media_with(fact, findings)])
    show_list("deep images", with_ranges(media_with("deep", findings), samples.reader.settings))
    looked = Looked(samples, findings, [])
    if config.decode:
        looked.undecodable = decode_all(looked.notes, config)
    return looked


def show_overlap(train: list[Note], held_out: list[Note]) -> None:
    """Print what occurs in training and in evaluation data."""
    both = overlap(train, held_out)
    show_table("the same in training and evaluation data", {name: f"{len(same):,}" for name, same in both.items()})
    for same in both.values():
        for line in same[:MOST_TOLD]:
            print(f"  {line}")
    print(flush=True)


def check(config: CheckSettings) -> None:
    """Look at all data of `config` and print what there is to know; UserError where samples are refused."""
    import torch

    from util.cost.sizes import Sizes
    from util.model import choose_device, find_model, load_processor, model_type_of
    from util.vision import Budget

    device = choose_device(config.device)
    # what is laid out for GPUs is, unless named, what a GPU would train
    path = find_model(config.model, torch.device("cuda") if config.gpus else device)
    if config.gpus and "data" not in config.given:
        return propose_layout(config, path, None)
    processor = load_processor(path, config)
    budget = Budget.of(config, model_type_of(path))
    train = look_at("training data", config.data, processor, config, budget)
    all_data = [train]
    if config.eval_data:
        held_out = look_at("evaluation data", config.eval_data, processor, config, budget)
        all_data.append(held_out)
        show_overlap(train.notes, held_out.notes)
    sizes = Sizes.of(train.findings)
    if len(sizes.usable):
        show_table("forecast", forecast(config, path, train.samples, sizes, device))
        if config.gpus:
            propose_layout(config, path, train)

    problems = []
    undecodable = []
    for looked in all_data:
        problems += [finding.problem for finding in looked.findings if not finding.size]
        undecodable += looked.undecodable
    show_refused([*problems, *undecodable], config.report)
    refuse(problems, undecodable)


def refuse(problems: list[str], undecodable: list[str]) -> None:
    """UserError where there is anything to mend."""
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
    made = settings_parser(CheckSettings, __doc__.splitlines()[0], "%(prog)s FILE ... [any of the flags below]")
    made.prog = "python -m util check"
    return made


def main(arguments: list[str]) -> None:
    files = list(takewhile(lambda word: not word.startswith("-"), arguments))
    flags = arguments[len(files) :]
    if files:
        flags = ["--data", *files, *flags]
    check(parse(CheckSettings, "", flags, parser=parser()))
