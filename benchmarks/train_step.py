"""How fast is a training step of this project, and how fast is the usual way to write it (plain_loop.py)?

    python benchmarks/train_step.py --size tiny --compare
    python benchmarks/train_step.py --size tiny --compare --vocabulary official
    python benchmarks/train_step.py --size 2b --compare --micro_batch_size 4 --out benchmarks/results/step_2b.json

Weights are random and data is drawn on the spot, both from --seed; speed does not depend on what a model knows. Every
flag of finetune.py that is not named here works too (--global_batch_size, --max_tokens, --dtype, --freeze,
--activation_checkpointing, ...). Each block builds its model anew, so both loops start from the same weights and have
the device to themselves; blocks alternate, so that what slows the machine slows both.
"""
# ruff: noqa: E402

import argparse
import copy
import dataclasses
import gc
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks import plain_loop
from benchmarks.report import origin, write_result
from benchmarks.rows import write_row
from util.collator import Batch, Collator
from util.command_line import UserError, run_command
from util.config import Config, parse_arguments
from util.cost import flops
from util.cost.measure import measure
from util.cost.memory import GIB, peak_bytes
from util.dataset import Samples, Size, load_examples
from util.log import versions
from util.model import (
    choose_device,
    choose_dtype,
    load_config,
    load_processor,
    part_of,
    prepare_model,
    set_budget,
)
from util.optimizer import build_optimizer, clip_gradient, set_learning_rate
from util.steps import training_steps
from util.tiny_model import make_model, make_tiny_model
from util.vision import Budget

REFERENCE = Path(os.environ.get("QWEN2_VL_REFERENCE") or ROOT.parent / "shared" / "qwen2_vl_reference")
CONFIG_FILES = {"2b": "config.json", "7b": "config.7b.json"}
OFFICIAL_VOCABULARY = 151936

WORDS = ["the", "red", "square", "is", "left", "of", "a", "blue", "circle", "and", "above", "one", "green", "line"]
# sides of images and of frames in pixels, most frames of a video, most words of an answer; tiny: a fifth of the tokens
SCALES = {"tiny": ((100, 500), (100, 188), 6, 80), "2b": ((224, 1120), (224, 420), 12, 400)}
SCALES["7b"] = SCALES["2b"]
MIXES = {  # shares of samples with one image, two images, a video, text alone
    "images": {"image": 0.8, "two images": 0.2},
    "mixed": {"image": 0.5, "two images": 0.1, "video": 0.1, "text": 0.3},
    "text": {"text": 1.0},
}
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 3e-2}  # of the loss, between the two loops


def parser_of(documentation: str) -> argparse.ArgumentParser:
    """The flags of this file, for a script that is described by `documentation`."""
    summary, _, rest = documentation.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SCALES, required=True, help="sizes of the model and of its data")
    parser.add_argument("--data", choices=MIXES, default="mixed", help="what the samples are made of")
    parser.add_argument("--compare", action="store_true", help="measure the plain loop too")
    parser.add_argument("--vocabulary", choices=("own", "official"), default="own", help="of the tiny model")
    parser.add_argument("--blocks", type=int, default=3, help="measured blocks of each loop")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a block")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that are not measured")
    parser.add_argument(
        "--micro_batch_size",
        type=int,
        help="of the plain loop; default: the whole step. Ours packs rows up to --max_tokens",
    )
    parser.add_argument("--layers", type=int, help="only this many layers in the tower and in the language model")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument(
        "--rows", type=Path, help="append a line of JSON for each block here, as soon as it is measured"
    )
    return parser


def parse(
    arguments: list[str], parser: argparse.ArgumentParser | None = None, defaults: Iterable[str] = ()
) -> tuple[argparse.Namespace, Config]:
    """The flags that are named here, and the settings of a run; `defaults`: of these, before what the user says."""
    parser = parser or parser_of(__doc__)
    own, others = parser.parse_known_args(arguments)
    # Both loops load their data in the same process unless told otherwise, and keep one learning rate.
    defaults = [*defaults, "--num_workers", "0", "--schedule", "constant", "--warmup_ratio", "0"]
    if own.size == "tiny":
        defaults += ["--min_pixels", "3136"]
    return own, parse_arguments(parser.description, defaults + others)


def paths_of(own: argparse.Namespace) -> dict[str, str | None]:
    """The paths among the arguments as text, which JSON knows."""
    return {name: str(path) if path else None for name, path in vars(own).items() if name in ("out", "rows")}


# ---- model and data --------------------------------------------------------------------------------------------------


def describe_model(own: argparse.Namespace) -> tuple[Qwen2VLConfig, object]:
    """Config and processor of the model to be measured."""
    if own.size == "tiny" and own.vocabulary == "own":
        path = str(make_tiny_model())
        return cut(load_config(path), own.layers), load_processor(path)
    file = REFERENCE / CONFIG_FILES.get(own.size, "config.json")
    if not file.exists():
        raise UserError(
            f"{file}: not there. Real sizes and the official vocabulary need the config, preprocessor_config.json, "
            "chat_template.json and tokenizer files of the official models in one folder (the config of 7b as "
            "config.7b.json); name it in QWEN2_VL_REFERENCE"
        )
    processor = load_processor(str(REFERENCE))
    if own.size != "tiny":
        return cut(Qwen2VLConfig.from_dict(json.loads(file.read_text(encoding="utf-8"))), own.layers), processor
    with torch.device("meta"):
        model_config = make_model(processor.tokenizer, seed=0).config
    model_config.text_config.vocab_size = OFFICIAL_VOCABULARY
    return cut(model_config, own.layers), processor


def cut(model_config: Qwen2VLConfig, layers: int | None) -> Qwen2VLConfig:
    """The same model with fewer layers."""
    if layers:
        model_config.vision_config.depth = layers
        model_config.text_config.num_hidden_layers = layers
        model_config.text_config.layer_types = model_config.text_config.layer_types[:layers]
    return model_config


def random_model(
    model_config: Qwen2VLConfig, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Qwen2VLForConditionalGeneration:
    """The model in `dtype`, made on the device: the same weights for the same seed."""
    torch.manual_seed(seed)
    with device:
        return Qwen2VLForConditionalGeneration._from_config(
            copy.deepcopy(model_config), attn_implementation="sdpa", dtype=dtype
        )


def make_data(directory: Path, own: argparse.Namespace, count: int, seed: int) -> Path:
    """Write `count` samples of mixed lengths and sizes as real files, and return their data.json.

    Videos are lists of frames, so that both loops decode the same pictures.
    """
    rng = random.Random(seed)
    image_sides, frame_sides, most_frames, most_words = SCALES[own.size]
    files = 0

    def picture(width: int, height: int) -> str:
        nonlocal files
        files += 1
        noise = np.random.default_rng((seed, files)).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
        path = directory / f"{files}.jpg"
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        return str(path)

    def image() -> dict:
        return {"type": "image", "image": picture(rng.randint(*image_sides), rng.randint(*image_sides))}

    def video() -> dict:
        width, height = rng.randint(*frame_sides), rng.randint(*frame_sides)
        frames = range(2 * rng.randint(2, most_frames // 2))
        return {"type": "video", "video": [picture(width, height) for _ in frames]}

    def words(most: int) -> str:
        """Short texts are as frequent as long ones: the logarithm of the length is uniform."""
        return " ".join(rng.choices(WORDS, k=round(math.exp(rng.uniform(math.log(2), math.log(most))))))

    media = {"image": [image], "two images": [image, image], "video": [video], "text": []}
    mix = MIXES[own.data]
    samples = []
    for kind in rng.choices(list(mix), list(mix.values()), k=count):
        question = [make() for make in media[kind]] + [{"type": "text", "text": words(most_words // 4)}]
        answer = [{"type": "text", "text": words(most_words)}]
        samples.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path = directory / "data.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


@dataclasses.dataclass
class Work:
    """What both loops are given."""

    config: Config
    model_config: Qwen2VLConfig
    processor: object
    samples: Samples
    steps: list[list[list[int]]]  # for each step its micro-batches, packed
    plain_steps: list[list[list[int]]]  # the same samples in the plain loop's micro-batches
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return choose_dtype(self.config.dtype, self.device)

    @property
    def plain_examples(self) -> list[dict]:
        return [{"messages": example.messages} for example in self.samples.examples]

    def model(self) -> Qwen2VLForConditionalGeneration:
        return random_model(self.model_config, self.config.seed, self.device)


# ---- the two loops ---------------------------------------------------------------------------------------------------


def our_loop(work: Work) -> Iterator[float]:
    """The loop of finetune.py, line by line, without its log; yields the loss of each step."""
    config, device, steps = work.config, work.device, work.steps
    model = prepare_model(work.model(), config, work.processor, device)
    optimizer = build_optimizer(model, config, max(map(len, steps)))
    loader = DataLoader(
        work.samples,
        batch_sampler=[micro for step in steps for micro in step],
        collate_fn=Collator(),
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    for number, step in enumerate(steps, 1):
        micro_batches = [next(batches) for _ in step]
        yield training_step(model, optimizer, micro_batches, number, len(steps), config, device)["loss"]


def training_step(
    model,
    optimizer,
    micro_batches: list[Batch],
    number: int,
    total: int,
    config: Config,
    device: torch.device,
    mark: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """A step of the loop of finetune.py, line by line, without its guard and its log.

    Returns the loss and the norm, which the log reads, and the seconds for which the host waited to read them: where
    they are few, the host was late and not the device. `mark` is called where a part of the step begins or ends.
    """
    supervised_weight = sum(batch.counts["supervised_weight"] for batch in micro_batches)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for batch in micro_batches:
        batch = batch.to(device)
        mark("pass begins")
        batch_loss_sum = model(batch)
        mark("forward ends")
        if batch_loss_sum.requires_grad:
            (batch_loss_sum / supervised_weight).backward()
        loss_sum += batch_loss_sum.detach()
        mark("pass ends")

    norm = clip_gradient(model, optimizer, config.max_grad_norm)
    began = time.perf_counter()
    grad_norm = norm.item()
    set_learning_rate(optimizer, number - 1, total, config)
    loss = loss_sum.item() / supervised_weight
    waited = time.perf_counter() - began
    optimizer.step()
    optimizer.zero_grad()
    mark("step ends")
    return {"loss": loss, "grad_norm": grad_norm, "host_wait_seconds": waited}


def the_plain_loop(work: Work) -> Iterator[float]:
    config, model = work.config, work.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in config.freeze)
    if config.activation_checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return plain_loop.train(
        model, work.processor, work.plain_examples, work.plain_steps,
        config.learning_rate, config.max_grad_norm, work.dtype, config.num_workers,
    )  # fmt: skip


@torch.no_grad()
def check_equal_work(work: Work) -> dict[str, float]:
    """Both loops see the same tokens in the first step and give the same mean loss over its supervised ones."""
    model = prepare_model(work.model(), work.config, work.processor, work.device)
    batches = [Collator()([work.samples[index] for index in micro]) for micro in work.steps[0]]
    ours = {
        "supervised_tokens": sum(batch.counts["supervised_tokens"] for batch in batches),
        "tokens": sum(batch.counts["tokens"] for batch in batches),
        "patches": sum(len(batch.vision_position_ids) for batch in batches),
    }
    our_loss = sum(model(batch.to(work.device)).item() for batch in batches) / ours["supervised_tokens"]
    del model
    release(work.device)

    model, examples = work.model().train(), work.plain_examples
    plain = dict.fromkeys(ours, 0)
    plain_loss = 0.0
    for micro in work.plain_steps[0]:
        batch = plain_loop.collate([examples[index] for index in micro], work.processor)
        supervised = int((batch["labels"] != plain_loop.IGNORED).sum())
        plain["supervised_tokens"] += supervised
        plain["tokens"] += int(batch["attention_mask"].sum())
        plain["patches"] += sum(len(batch[name]) for name in ("pixel_values", "pixel_values_videos") if name in batch)
        batch = {name: tensor.to(work.device) for name, tensor in batch.items()}
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.dtype == torch.bfloat16):
            plain_loss += model(**batch, use_cache=False).loss.item() * supervised / ours["supervised_tokens"]
    assert ours == plain, f"the loops do not see the same: ours {ours}, plain {plain}"
    assert abs(our_loss - plain_loss) < TOLERANCE[work.dtype], f"first loss {our_loss}, plain {plain_loss}"
    return {"ours": our_loss, "plain": plain_loss}


# ---- the clock -------------------------------------------------------------------------------------------------------


def measure_block(loop: Callable[[Work], Iterator[float]], work: Work, warmup: int) -> dict | None:
    """Run all steps from fresh weights: seconds of those after the warm-up, the losses, and peak memory in GiB.

    None where the device ran out of memory.
    """
    on_gpu = work.device.type == "cuda"
    release(work.device)
    try:
        losses_of = loop(work)
        losses = [next(losses_of) for _ in range(warmup)]
        if on_gpu:
            torch.cuda.synchronize(work.device)
            torch.cuda.reset_peak_memory_stats(work.device)
        began = time.perf_counter()
        losses += list(losses_of)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "losses": losses, "peak_gib": peak_bytes(work.device) / GIB if on_gpu else None}
    except torch.OutOfMemoryError:
        return None


def release(device: torch.device) -> None:
    """Give back what earlier models held, so that a block has the device to itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summarise(blocks: list[dict | None], samples: int, tokens: int, work_flops: float, peak: float | None) -> dict:
    """Median and slowest of the blocks of one loop; no figure where a block ran out of memory."""
    if None in blocks:
        return {"failed": "out of memory"}
    seconds = [block["seconds"] for block in blocks]
    middle, slowest = statistics.median(seconds), max(seconds)
    figures = {"block_seconds": [round(value, 4) for value in seconds]}
    for name, amount in (("samples_per_second", samples), ("tokens_per_second", tokens)):
        figures[name] = {"median": round(amount / middle, 3), "min": round(amount / slowest, 3)}
    figures["peak_memory_gib"] = round(blocks[0]["peak_gib"], 2) if blocks[0]["peak_gib"] else None
    figures["mfu"] = round(work_flops / middle / peak, 4) if peak else None
    figures["losses"] = blocks[0]["losses"]
    return figures


def make_work(directory: Path, own: argparse.Namespace, config: Config) -> tuple[Work, list[Size]]:
    """Data of --size in `directory`, its steps for both loops, and the size of each sample."""
    device = choose_device(config.device)
    model_config, processor = describe_model(own)
    budget = Budget.of(config, "qwen2_vl")
    set_budget(processor, budget)
    count = (own.warmup + own.steps) * config.global_batch_size
    data = make_data(directory, own, count, config.seed)
    samples = Samples(load_examples([str(data)], processor), processor, budget)
    sizes = measure(samples, config.max_tokens)
    planned = training_steps(sizes, samples.examples, config)
    steps = [step.micro_batches for step in islice(planned.after(0), planned.per_epoch)]
    # The plain loop takes the samples of a step in the order they come, sorted by length by nobody.
    plain_steps = []
    for step in steps:
        members = sorted(index for micro in step for index in micro)
        size = own.micro_batch_size or len(members)
        plain_steps.append([members[i : i + size] for i in range(0, len(members), size)])
    return Work(config, model_config, processor, samples, steps, plain_steps, device), sizes


def main(arguments: list[str]) -> None:
    own, config = parse(arguments)
    with tempfile.TemporaryDirectory() as directory:
        work, sizes = make_work(Path(directory), own, config)
        loops = {"ours": our_loop, "plain": the_plain_loop} if own.compare else {"ours": our_loop}
        first_losses = check_equal_work(work) if own.compare else None
        blocks: dict[str, list[dict | None]] = {name: [] for name in loops}
        for _ in range(own.blocks):
            for name, loop in loops.items():
                blocks[name].append(measure_block(loop, work, own.warmup))
                row = blocks[name][-1] or {"error": "out of memory"}
                write_row(
                    own.rows, {"row": f"{own.size} {own.data}, {name}", **row, **origin("train_step.py", arguments)}
                )

    device, model_config, steps, plain_steps = work.device, work.model_config, work.steps, work.plain_steps
    measured = [index for step in steps[own.warmup :] for micro in step for index in micro]
    tokens = sum(sizes[index].tokens for index in measured)
    padded = sum(
        len(micro) * max(sizes[index].tokens for index in micro) for step in plain_steps[own.warmup :] for micro in step
    )
    parts = flops.work_by_part(model_config, [sizes[index] for index in measured], config)
    work_flops = sum(parts.values())
    peak = flops.peak_flops(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    result = {
        **origin("train_step.py", arguments, device=gpu),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "dtype": str(work.dtype).removeprefix("torch."),
        "settings": {**vars(own), **paths_of(own), "config": dataclasses.asdict(config)},
        "data": {
            "samples": len(measured),
            "tokens": tokens,
            "supervised_tokens": sum(sizes[index].supervised for index in measured),
            "patches": sum(grid.patches for index in measured for grid in sizes[index].grids),
            "padding_of_plain": round(1 - tokens / padded, 4),
            "micro_batches_of_ours": sum(map(len, steps[own.warmup :])),
            "micro_batches_of_plain": sum(map(len, plain_steps[own.warmup :])),
        },
        "work": {
            "flops": work_flops,
            "shares": {part: round(share, 4) for part, share in flops.shares(parts).items()},
            "in_words": flops.shares_in_words(parts),
        },
        "first_loss": first_losses,
        "loops": {name: summarise(found, len(measured), tokens, work_flops, peak) for name, found in blocks.items()},
    }
    result["ratio"] = ratio(result["loops"])
    print_table(result)
    write_result(result, own.out)


def ratio(loops: dict[str, dict]) -> dict | None:
    """How many times faster ours is: pairs of neighbouring blocks, so that drift cancels."""
    if len(loops) < 2 or any("failed" in figures for figures in loops.values()):
        return None
    pairs = zip(loops["plain"]["block_seconds"], loops["ours"]["block_seconds"], strict=True)
    ratios = [plain / ours for plain, ours in pairs]
    return {"median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3)}


def print_table(result: dict) -> None:
    data = result["data"]
    print(
        f"{result['device']}, {result['threads']} threads, {result['dtype']}\n"
        f"{data['samples']} samples, {data['tokens']:,} tokens ({data['supervised_tokens']:,} supervised), "
        f"{data['patches']:,} patches; the plain loop pads {data['padding_of_plain']:.0%} of its positions\n"
        f"work: {result['work']['in_words']}\n"
        f"{'':6}{'samples/s':>10}{'(min)':>10}{'tokens/s':>11}{'(min)':>11}{'peak memory':>15}{'MFU':>8}"
    )
    for name, figures in result["loops"].items():
        if "failed" in figures:
            print(f"{name:6}{figures['failed']:>20}")
            continue
        samples, tokens = figures["samples_per_second"], figures["tokens_per_second"]
        memory = f"{figures['peak_memory_gib']:.2f} GiB" if figures["peak_memory_gib"] else "not measured"
        mfu = f"{figures['mfu']:.1%}" if figures["mfu"] else "-"
        speeds = f"{samples['median']:>10.2f}{samples['min']:>10.2f}{tokens['median']:>11,.0f}{tokens['min']:>11,.0f}"
        print(f"{name:6}{speeds}{memory:>15}{mfu:>8}")
    if result["ratio"]:
        print(f"ours is {result['ratio']['median']:.2f} times as fast ({result['ratio']['min']:.2f} in its worst pair)")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
