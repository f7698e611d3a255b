"""Compiled against eager on this device: the same numbers, how much faster, how much smaller, and what compiling costs.

    python benchmarks/compile_check.py                     on a GPU: layers of the 2B size, 4 of each kind, in bf16
    python benchmarks/compile_check.py --device cpu        the same in small, to see that it runs

It needs nothing but this repository: weights are random. Two processes, one after the other, share a fresh cache of
graphs: the second must find all that the first has compiled. In each, losses and gradients of several batches are
compared with those of float32, computed without compiling: the compiled model may be off by what bf16 rounds, which is
what the eager one is off by. A table, and one JSON line last; exit code 1 where a comparison fails.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import origin, write_result
from util import compilation
from util.collator import Batch, Collator
from util.config import Config
from util.conversation import Encoded
from util.dataset import Sample
from util.loss import PackedLoss
from util.model import choose_device, prepare_layers
from util.vision import Grid, Medium

LAYERS = 4
# (text tokens, images of so many patches a side) of each batch: one image, several, text alone
BATCHES = [(512, [32]), (2048, [32, 24, 16]), (3000, []), (1024, [64])]
SMALL_BATCHES = [(64, [8]), (200, [12, 8, 4]), (100, [])]
DIALS = [(choice, how) for choice in ("off", "on") for how in ("none", "selective", "full")]
REPEATS = 10
MOST_GRAPHS = 8
MOST_ERROR = 1.25  # of the compiled model's distance from float32, beside the eager model's
GIB = 2**30


class Processor:
    """What PackedLoss asks a processor for."""

    class image_processor:
        image_mean, image_std = [0.5] * 3, [0.5] * 3


def small_config(scale: int) -> Qwen2VLConfig:
    """The 2B size with few layers; its widths divided by `scale`."""
    text = {
        "hidden_size": 1536 // scale,
        "intermediate_size": 8960 // scale,
        "num_attention_heads": 12 // scale,
        "num_key_value_heads": 2 if scale < 4 else 1,
        "num_hidden_layers": LAYERS,
        "vocab_size": 151936 // scale**3,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": LAYERS, "embed_dim": 1280 // scale, "num_heads": 16 // scale, "hidden_size": 1536 // scale}
    if scale > 1:
        text["num_hidden_layers"] = vision["depth"] = 1
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def make_batch(text_tokens: int, sides: list[int]) -> Batch:
    """A sample of text for each image, or one without any; half of the text is supervised."""
    generator = torch.Generator().manual_seed(text_tokens)
    samples = []
    pictures = [[side] for side in sides] or [[]]
    tokens = text_tokens // len(pictures)
    for sides_here in pictures:
        ids = torch.randint(10, 1000, (tokens,), generator=generator).tolist()
        weights = [0.0] * (tokens // 2) + [1.0] * (tokens - tokens // 2)
        grids = [Grid(1, side, side) for side in sides_here]
        media = [
            Medium(
                torch.randint(0, 256, (grid.patches, 588), generator=generator, dtype=torch.uint8), grid, is_video=False
            )
            for grid in grids
        ]
        samples.append(Sample(Encoded(ids, weights, [5] * len(grids)), media, "a sample"))
    return Collator()(samples)


def build(weights, device: torch.device, dtype: torch.dtype, choice: str, how: str) -> PackedLoss:
    """A model of plain weights in `dtype`, as one process trains it."""
    name = str(dtype).removeprefix("torch.")
    config = Config(device=str(device), dtype=name, compile=choice, activation_checkpointing=how)
    model = copy.deepcopy(weights).to(dtype)
    packed = PackedLoss(prepare_layers(model, config, device), Processor(), dtype).to(device)
    if compilation.is_on(choice, device):
        compilation.compile_loss(packed)
    return packed.train()


def step(model: PackedLoss, batch: Batch) -> float:
    loss = model(batch)
    (loss / len(batch.target_ids)).backward()
    return loss.item() / len(batch.target_ids)


def distance(found: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Relative, over all gradients together."""
    gap = sum((one.double() - other.double()).square().sum() for one, other in zip(found, right, strict=True))
    return (gap / sum(other.double().square().sum() for other in right)).sqrt().item()


def look_at(model: PackedLoss, batches: list[Batch], device: torch.device) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of all batches, and their gradients added up."""
    losses = [step(model, batch.to(device)) for batch in batches]
    gradients = [parameter.grad.cpu() for parameter in model.parameters()]
    model.zero_grad()
    return losses, gradients


def time_of(model: PackedLoss, batch: Batch, device: torch.device) -> tuple[float, float]:
    """(median seconds of a step, peak GiB) on the largest batch."""
    there = batch.to(device)
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(REPEATS if is_gpu else 1):
        began = time.perf_counter()
        step(model, there)  # reads its loss, so it waits for the forward pass
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        model.zero_grad()
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / GIB if is_gpu else 0.0


def measure(device: torch.device) -> dict:
    """What one process finds."""
    is_gpu = device.type == "cuda"
    torch.manual_seed(0)
    weights = Qwen2VLForConditionalGeneration(small_config(1 if is_gpu else 4))
    batches = [make_batch(tokens, sides) for tokens, sides in (BATCHES if is_gpu else SMALL_BATCHES)]
    largest = max(batches, key=lambda batch: len(batch.input_ids) + len(batch.image_patches))
    right_losses, right = look_at(build(weights, device, torch.float32, "off", "none"), batches, device)
    dtype = torch.bfloat16 if is_gpu else torch.float32
    rows = []
    for choice, how in DIALS:
        gc.collect()
        torch._dynamo.reset()  # else the graphs of the row before would be used, which keep more or less
        before = (compilation.graphs_made(), compilation.graphs_found(), compilation.CLOCK.seconds)
        model = build(weights, device, dtype, choice, how)
        losses, gradients = look_at(model, batches, device)
        seconds, peak = time_of(model, largest, device)
        off = max(abs(one - other) for one, other in zip(losses, right_losses, strict=True))
        row = {"compile": choice, "activation_checkpointing": how, "loss_off": off}
        row |= {"gradient_off": distance(gradients, right), "step_ms": seconds * 1e3, "peak_gib": peak}
        row |= {"graphs": compilation.graphs_made() - before[0], "found": compilation.graphs_found() - before[1]}
        rows.append({**row, "compile_seconds": compilation.CLOCK.seconds - before[2]})
        print_row(rows[-1])
        del model
    return {"rows": rows, "cannot_compile": compilation.Compiled.cannot}


def print_row(row: dict) -> None:
    print(
        f"  compile {row['compile']:3} {row['activation_checkpointing']:9}  {row['step_ms']:8.1f} ms  "
        f"{row['peak_gib']:6.2f} GiB  loss off {row['loss_off']:.1e}  gradient off {row['gradient_off']:.1e}  "
        f"{row['graphs']} graphs in {row['compile_seconds']:.1f} s, {row['found']} of them from the cache",
        flush=True,
    )


def faults(found: dict) -> list[str]:
    """What is wrong with the numbers of one process."""
    wrong = [found["cannot_compile"]] if found["cannot_compile"] else []
    rows = {(row["compile"], row["activation_checkpointing"]): row for row in found["rows"]}
    eager = rows["off", "none"]
    for dials, row in rows.items():
        if row["gradient_off"] > MOST_ERROR * eager["gradient_off"] + 1e-5:
            wrong.append(f"compile {dials[0]}, {dials[1]}: gradients are off by {row['gradient_off']:.1e}")
        if row["loss_off"] > MOST_ERROR * eager["loss_off"] + 1e-2:
            wrong.append(f"compile {dials[0]}, {dials[1]}: losses are off by {row['loss_off']:.1e}")
        if row["graphs"] > MOST_GRAPHS:
            wrong.append(f"compile {dials[0]}, {dials[1]}: {row['graphs']} graphs")
    return wrong


def in_a_process(name: str, cache: str, device: str) -> dict:
    """What a process of its own finds that keeps graphs in `cache`."""
    print(f"{name}:", flush=True)
    words = [sys.executable, __file__, "--device", device, "--alone"]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as job:
        lines = []
        for line in job.stdout or []:
            lines.append(line)
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if job.returncode:
        sys.exit(f"{name} ended with exit code {job.returncode}")
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cuda, cpu; auto: the GPU where there is one")
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    parser.add_argument("--alone", action="store_true", help="one of the two processes")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(choose_device(arguments.device))))
        return
    with tempfile.TemporaryDirectory() as cache:
        found = {name: in_a_process(name, cache, arguments.device) for name in ("first process", "second process")}
    wrong = [fault for part in found.values() for fault in faults(part)]
    anew = sum(row["graphs"] - row["found"] for row in found["second process"]["rows"])
    if anew:
        wrong.append(f"the second process compiled {anew} graphs anew")
    print("\n".join(wrong) or "all numbers agree")
    device = choose_device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    about = origin("compile_check.py", sys.argv[1:], device=name)
    write_result({**about, "torch": torch.__version__, **found, "wrong": wrong}, arguments.out)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
