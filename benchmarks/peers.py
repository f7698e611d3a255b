"""Ours, the plain loop and TRL's SFTTrainer on the same conversations, taking turns.

    python benchmarks/peers.py --size tiny --vocabulary official --blocks 3 --out benchmarks/results/peers_tiny.json
    python benchmarks/peers.py --size tiny --steps 2 --loops ours plain

TRL is installed for this alone (`pip install -r requirements-peers.txt`); where it is not there, the others are timed
without it. Every flag of benchmarks/train_step.py and of finetune.py works too.

Each block is a process of its own, as a user would start it. Ours has the environment that finetune.py makes for itself
(threads that sleep soon, large pages); the others have torch's own but for the first, without which a machine that is
shared would slow them alone. All three train the same weights (float32 on a CPU) in the same steps on the same samples
with AdamW, and load their data in the training process. TRL refuses packing and padding-free batches for vision data
and knows no videos; it does take a data collator. It is given the plain loop's, so that it trains on exactly the labels
of the others: what the assistant says, and nothing else. Gradient checkpointing, which TRL switches on unasked, is off
unless --trl_checkpointing is given.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import plain_loop, train_step
from benchmarks.report import origin, write_result
from benchmarks.train_step import Work
from util.command_line import UserError, run_command
from util.config import Config
from util.cost import flops
from util.log import versions

LOOPS = ("ours", "plain", "trl")
# -> the loss of each step, and the time when it was done, by the wall and of this process on its cores
Timed = Callable[[Work], tuple[list[float], list[tuple[float, float]]]]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The flags of train_step.py and of this file, and the settings of a run: 12 steps of 8 unless said otherwise."""
    parser = train_step.parser_of(__doc__)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, help="of these, ours among them")
    parser.add_argument("--block", choices=LOOPS, help="measure one block of it in this process, for the others")
    parser.add_argument("--trl_checkpointing", action="store_true", help="TRL with its default gradient checkpointing")
    parser.set_defaults(steps=12)
    own, config = train_step.parse(arguments, parser, defaults=["--global_batch_size", "8"])
    has_trl = importlib.util.find_spec("trl") is not None
    if own.loops and "trl" in own.loops and not has_trl:
        raise UserError("--loops trl: TRL is not installed; pip install -r requirements-peers.txt")
    if own.loops and "ours" not in own.loops:
        raise UserError("--loops: ours is what the others are compared with")
    own.loops = own.loops or [name for name in LOOPS if name != "trl" or has_trl]
    return own, config


# ---- the loops -------------------------------------------------------------------------------------------------------


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def timed(loop: Callable, work: Work) -> tuple[list[float], list[tuple[float, float]]]:
    """A loop of train_step.py, which yields the loss of each step."""
    losses, times = [], []
    for loss in loop(work):
        losses.append(loss)
        times.append(now())
    return losses, times


def trl_loop(work: Work, checkpointing: bool) -> tuple[list[float], list[tuple[float, float]]]:
    """SFTTrainer over the samples of all steps in their order, one micro-batch a step."""
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    times: list[tuple[float, float]] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **unused) -> None:
            times.append(now())

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


def loop_of(own: argparse.Namespace) -> Timed:
    every = {
        "ours": partial(timed, train_step.our_loop),
        "plain": partial(timed, train_step.the_plain_loop),
        "trl": partial(trl_loop, checkpointing=own.trl_checkpointing),
    }
    return every[own.block]


# ---- the clock -------------------------------------------------------------------------------------------------------


def measure_block(loop: Timed, work: Work, warmup: int) -> dict:
    """Seconds of the steps after the warm-up, from fresh weights, and the loss of every step."""
    losses, times = loop(work)
    assert len(losses) == len(times) == len(work.steps), f"{len(losses)} losses of {len(work.steps)} steps"
    wall, cores = (round(last - first, 4) for first, last in zip(times[warmup - 1], times[-1], strict=True))
    return {"wall": wall, "cores": cores, "losses": losses}


def block_of(name: str, arguments: list[str]) -> dict:
    """What `measure_block` gives in a process of its own."""
    large_pages = "1" if name == "ours" else "0"  # as finetune.py sets them, and as torch does
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "THP_MEM_ALLOC_ENABLE": large_pages}
    command = [sys.executable, __file__, *arguments, "--block", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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


def ratios(blocks: dict[str, list[dict[str, float]]], clock: str) -> dict[str, dict[str, float]]:
    """How many times faster ours is than each other by a clock: of neighbouring blocks, so that drift cancels."""
    found = {}
    for name in [name for name in blocks if name != "ours"]:
        pairs = [other[clock] / ours[clock] for other, ours in zip(blocks[name], blocks["ours"], strict=True)]
        found[name] = {"median": round(statistics.median(pairs), 3), "min": round(min(pairs), 3)}
    return found


def main(arguments: list[str]) -> None:
    own, config = parse(arguments)
    with tempfile.TemporaryDirectory() as directory:
        work, sizes = train_step.make_work(Path(directory), own, config)
        if own.block:
            print(json.dumps(measure_block(loop_of(own), work, own.warmup)))
            return
        first_losses = train_step.check_equal_work(work)
        blocks: dict[str, list[dict]] = {name: [] for name in own.loops}
        load = [os.getloadavg()[0]]
        for _ in range(own.blocks):
            for name in own.loops:
                blocks[name].append(block_of(name, arguments))
                print(f"{name}: {blocks[name][-1]['wall']:.1f} s", file=sys.stderr, flush=True)  # a block takes minutes
            load.append(os.getloadavg()[0])
    losses = {name: found[0]["losses"] for name, found in blocks.items()}
    check_losses(losses, work)

    measured = [sizes[index] for planned in work.steps[own.warmup :] for micro in planned for index in micro]
    result = {
        **origin("peers.py", arguments, device=gpu_name(work.device)),
        "versions": versions_of(own.loops),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in load],
        "dtype": str(work.dtype).removeprefix("torch."),
        "settings": {**vars(own), "out": str(own.out) if own.out else None, "config": dataclasses.asdict(config)},
        "samples": len(measured),
        "tokens": sum(size.tokens for size in measured),
        "supervised_tokens": sum(size.supervised for size in measured),
        "work": flops.shares_in_words(flops.work_by_part(work.model_config, measured, config)),
        "first_loss": {**first_losses, **{name: values[0] for name, values in losses.items()}},
        "seconds": {name: by_clock(found) for name, found in blocks.items()},
        "samples_per_second": {name: speed(found, len(measured)) for name, found in blocks.items()},
        "ours_is_times_as_fast_as": ratios(blocks, "wall"),
        "of_time_on_cores_others_take_times_ours": ratios(blocks, "cores"),
    }
    print_table(result)
    write_result(result, own.out)


def by_clock(blocks: list[dict]) -> dict[str, list[float]]:
    return {"wall": [block["wall"] for block in blocks], "cores": [block["cores"] for block in blocks]}


def speed(blocks: list[dict[str, float]], samples: int) -> float:
    return round(samples / statistics.median(block["wall"] for block in blocks), 3)


def versions_of(loops: list[str]) -> dict[str, str]:
    return {**versions(), **({"trl": importlib.metadata.version("trl")} if "trl" in loops else {})}


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def print_table(result: dict) -> None:
    print(
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, load {result['load_average']}\n"
        f"{result['samples']} samples, {result['tokens']:,} tokens, {result['supervised_tokens']:,} supervised; "
        f"work: {result['work']}"
    )
    for name, speed in result["samples_per_second"].items():
        ratio = result["ours_is_times_as_fast_as"].get(name)
        told = f"ours is {ratio['median']:.2f} times as fast ({ratio['min']:.2f} in its worst pair)" if ratio else ""
        print(f"{name:6}{speed:8.2f} samples/s  {told}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
