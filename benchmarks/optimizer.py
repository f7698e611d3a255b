"""How long does an optimizer step with its clipping take, and how near is that to the memory's speed?

    python benchmarks/optimizer.py --out benchmarks/results/optimizer_2b.json           on a GPU, 2B, about a minute
    python benchmarks/optimizer.py --device cpu --layers 1 --steps 2                    whether it runs

The project's AdamW over bf16 weights, with gradients in bf16 (one micro-batch a step) and in fp32 (several), against
torch's fused AdamW over fp32 weights, all on parameters of the published shapes with random gradients. One row after
the other in one process. The config of the model is in the folder that QWEN2_VL_REFERENCE names.
"""

# ruff: noqa: E402

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.report import origin, write_result
from benchmarks.train_step import CONFIG_FILES, describe_model
from util.config import Config
from util.model import choose_device, keep_all_as_halves
from util.optimizer import build_optimizer, clip_gradient

# kind of row: precision of weights, precision of gradients, bytes read and written per parameter in clipping and update
ROWS = {
    "mixed, gradients in bf16": (torch.bfloat16, torch.bfloat16, 2 + (12 + 2) + 12),
    "mixed, gradients in fp32": (torch.bfloat16, torch.float32, 4 + (12 + 4) + 12),
    "torch, fused, fp32": (torch.float32, torch.float32, 4 + 8 + (12 + 4) + 12),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=CONFIG_FILES, default="2b", help="of the model")
    parser.add_argument("--device", default="auto", help="cuda or cpu")
    parser.add_argument("--layers", type=int, help="only this many layers in the tower and in the language model")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each row")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them: moments are made, kernels compiled")
    parser.add_argument("--combo_kernels", action="store_true", help="let Inductor fuse tensors of one size, too")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser.parse_args(arguments)


def build(model_config, weights: torch.dtype, device: torch.device) -> nn.Module:
    """The model with random weights, as training keeps them."""
    with torch.device("meta"):
        bare = Qwen2VLForConditionalGeneration(model_config).to(weights)
    model = bare.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    if weights == torch.bfloat16:
        keep_all_as_halves(model)
    return model


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(kind: str, model_config, device: torch.device, own: argparse.Namespace) -> dict:
    weights, gradients, moved = ROWS[kind]
    model = build(model_config, weights, device)
    config = Config(device=str(device), dtype="bfloat16" if weights == torch.bfloat16 else "float32")
    optimizer = build_optimizer(model, config, 2 if gradients == torch.float32 else 1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter, dtype=gradients).mul_(1e-3)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = []
    host = []
    began_first = time.perf_counter()
    for number in range(own.warmup + own.steps):
        wait_for(device)
        began = time.perf_counter()
        clip_gradient(model, optimizer, 1.0)
        optimizer.step()
        host.append(time.perf_counter() - began)  # all is queued
        wait_for(device)
        seconds.append(time.perf_counter() - began)
        if number == 0:
            first = time.perf_counter() - began_first
    median = statistics.median(seconds[own.warmup :])
    found = {
        "milliseconds": round(1e3 * median, 2),
        "host_milliseconds": round(1e3 * statistics.median(host[own.warmup :]), 2),
        "gigabytes_per_second": round(moved * parameters / median / 1e9, 1),
        "first_step_seconds": round(first, 1),  # with the compilation
    }
    if device.type == "cuda":
        found["peak_bytes_per_parameter"] = round(torch.cuda.max_memory_allocated() / parameters, 2)
    return found


def main(arguments: list[str]) -> None:
    own = parse(arguments)
    device = choose_device(own.device)
    if own.combo_kernels:
        torch._inductor.config.combo_kernels = True
    model_config, _ = describe_model(argparse.Namespace(size=own.size, vocabulary="official", layers=own.layers))
    rows = {}
    for kind in ROWS:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rows[kind] = measure(kind, model_config, device, own)
        print(f"{kind:26} {rows[kind]}", flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else None
    write_result({**origin("optimizer.py", arguments, device=name), "torch": torch.__version__, "rows": rows}, own.out)


if __name__ == "__main__":
    main(sys.argv[1:])
