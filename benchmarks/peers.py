"""Ours, the plain loop and TRL's SFTTrainer on the same conversations, taking turns.

    python benchmarks/peers.py --size tiny --vocabulary official --blocks 3 --out benchmarks/results/peers_tiny.json
    python benchmarks/peers.py --size tiny --loops ours plain

TRL is installed for this alone (`pip install trl datasets`), in any environment that has the project's packages; where
it is not there, the others are timed without it. Every flag of benchmarks/train_step.py and of finetune.py works too.

All three train the same weights (float32 on a CPU) in the same steps on the same samples with AdamW, and load their
data in the training process. TRL refuses packing and padding-free batches for vision data and knows no videos; it does
take a data collator. It is given the plain loop's, so that it trains on exactly the labels of the others: what the
assistant says, and nothing else. Gradient checkpointing, which TRL switches on unasked, is off unless
--trl_checkpointing is given.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# as run_command sets them, for all three, as they share a process; read when torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from benchmarks import plain_loop, train_step
from benchmarks.report import origin, write_result
from benchmarks.train_step import Work
from util.command_line import UserError, run_command
from util.cost import flops
from util.log import versions

Timed = Callable[[Work], tuple[list[float], list[float]]]  # -> the loss of each step, and the time when it was done


def parse(arguments: list[str]) -> tuple[argparse.Namespace, argparse.Namespace, object]:
    """This file's own flags, those of train_step.py, and the settings of a run."""
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--loops", nargs="+", choices=("ours", "plain", "trl"), help="default: those that are there")
    parser.add_argument("--samples", type=int, default=96, help="measured samples of a block")
    parser.add_argument("--trl_checkpointing", action="store_true", help="TRL with its default gradient checkpointing")
    own, others = parser.parse_known_args(arguments)
    if not {"--size", "--help", "-h"} & set(others):
        others = ["--size", "tiny", *others]
    if "--global_batch_size" not in others:
        others = ["--global_batch_size", "8", *others]
    step, config = train_step.parse(others)
    if own.samples % config.global_batch_size:
        raise UserError(f"--samples {own.samples} are no whole steps of --global_batch_size {config.global_batch_size}")
    step.steps = own.samples // config.global_batch_size
    has_trl = importlib.util.find_spec("trl") is not None
    if own.loops and "trl" in own.loops and not has_trl:
        raise UserError("--loops trl: TRL is not installed; pip install trl datasets")
    own.loops = own.loops or (["ours", "plain", "trl"] if has_trl else ["ours", "plain"])
    return own, step, config


# ---- the loops -------------------------------------------------------------------------------------------------------


def timed(loop: Callable, work: Work) -> tuple[list[float], list[float]]:
    """A loop of train_step.py, which yields the loss of each step."""
    losses, times = [], []
    for loss in loop(work):
        losses.append(loss)
        times.append(time.perf_counter())
    return losses, times


def trl_loop(work: Work, checkpointing: bool) -> tuple[list[float], list[float]]:
    """SFTTrainer over the samples of all steps in their order, one micro-batch a step."""
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **unused) -> None:
            times.append(time.perf_counter())

    examples = work.plain_examples

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        return plain_loop.collate([examples[row["index"]] for row in rows], work.processor)

    config = work.config
    micro_batches = [micro for step in work.plain_steps for micro in step]
    order = [index for micro in micro_batches for index in micro]
    with tempfile.TemporaryDirectory() as directory:
        settings = SFTConfig(
            output_dir=directory,
            max_steps=len(work.plain_steps),
            per_device_train_batch_size=len(micro_batches[0]),
            gradient_accumulation_steps=len(work.plain_steps[0]),
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=work.dtype == torch.bfloat16,
            use_cpu=work.device.type == "cpu",
            gradient_checkpointing=checkpointing,
            train_sampling_strategy="sequential",
            dataloader_num_workers=config.num_workers,
            remove_unused_columns=False,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
        )
        trainer = SFTTrainer(
            model=work.model(),
            args=settings,
            # the column "images" tells it that these are samples with pictures, which it leaves to the collator
            train_dataset=Dataset.from_list([{"index": index, "images": []} for index in order]),
            processing_class=work.processor,
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, times


def loops_of(own: argparse.Namespace) -> dict[str, Timed]:
    every = {
        "ours": partial(timed, train_step.our_loop),
        "plain": partial(timed, train_step.the_plain_loop),
        "trl": partial(trl_loop, checkpointing=own.trl_checkpointing),
    }
    return {name: every[name] for name in own.loops}


# ---- the clock -------------------------------------------------------------------------------------------------------


def measure_block(loop: Timed, work: Work, warmup: int) -> tuple[float, list[float]]:
    """Seconds of the steps after the warm-up, from fresh weights, and the loss of every step."""
    train_step.release(work.device)
    losses, times = loop(work)
    assert len(losses) == len(times) == len(work.steps), f"{len(losses)} losses of {len(work.steps)} steps"
    return times[-1] - times[warmup - 1], losses


def check_losses(losses: dict[str, list[float]], work: Work) -> None:
    """Every loop sees the same tokens and trains the same model: the loss of each step agrees, not only of the first.

    Where a step of the padded loops has several micro-batches, the plain loop takes the mean of their means.
    """
    steps = len(work.plain_steps) if all(len(step) == 1 for step in work.plain_steps) else 0
    for name, found in losses.items():
        for number in range(steps):
            ours, other = losses["ours"][number], found[number]
            assert abs(ours - other) < 10 * train_step.TOLERANCE[work.dtype], (
                f"step {number + 1}: loss of ours {ours}, of {name} {other}"
            )


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """How many times faster ours is than each other: of neighbouring blocks, so that drift cancels."""
    found = {}
    for name in seconds.keys() - {"ours"}:
        pairs = [other / ours for other, ours in zip(seconds[name], seconds["ours"], strict=True)]
        found[name] = {"median": round(statistics.median(pairs), 3), "min": round(min(pairs), 3)}
    return found


def main(arguments: list[str]) -> None:
    own, step, config = parse(arguments)
    loops = loops_of(own)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, list[float]] = {}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as directory:
        work, sizes = train_step.make_work(Path(directory), step, config)
        first_losses = train_step.check_equal_work(work)
        for _ in range(step.blocks):
            for name, loop in loops.items():
                spent, losses[name] = measure_block(loop, work, step.warmup)
                seconds[name].append(round(spent, 4))
            load.append(os.getloadavg()[0])
    if "ours" in loops:
        check_losses(losses, work)

    measured = [sizes[index] for planned in work.steps[step.warmup :] for micro in planned for index in micro]
    found = versions()
    if "trl" in loops:
        found["trl"] = importlib.metadata.version("trl")
    result = {
        **origin("peers.py", arguments, device=gpu_name(work.device)),
        "versions": found,
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in load],
        "dtype": str(work.dtype).removeprefix("torch."),
        "settings": {**vars(step), "out": None, **vars(own), "config": dataclasses.asdict(config)},
        "samples": len(measured),
        "tokens": sum(size.tokens for size in measured),
        "supervised_tokens": sum(size.supervised for size in measured),
        "work": flops.shares_in_words(flops.work_by_part(work.model_config, measured, config)),
        "first_loss": {**first_losses, **{name: values[0] for name, values in losses.items()}},
        "block_seconds": seconds,
        "samples_per_second": {
            name: round(len(measured) / statistics.median(values), 3) for name, values in seconds.items()
        },
        "ours_is_times_as_fast_as": ratios(seconds) if "ours" in loops else None,
    }
    print_table(result)
    write_result(result, step.out)


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def print_table(result: dict) -> None:
    print(
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, load {result['load_average']}\n"
        f"{result['samples']} samples, {result['tokens']:,} tokens, {result['supervised_tokens']:,} supervised; "
        f"work: {result['work']}"
    )
    for name, speed in result["samples_per_second"].items():
        ratio = (result["ours_is_times_as_fast_as"] or {}).get(name)
        told = f"ours is {ratio['median']:.2f} times as fast ({ratio['min']:.2f} in its worst pair)" if ratio else ""
        print(f"{name:6}{speed:8.2f} samples/s  {told}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
