"""How fast is each kernel for attention over packed pieces on this device, and how exact?

    python benchmarks/attention.py --out benchmarks/results/attention_h200.json
    python benchmarks/attention.py --smoke

Shapes are those of the official models at 16,384 patches or tokens: the vision tower (16 heads of width 80, each image
within itself) and the language models (12 and 28 query heads, 2 and 4 key-value heads, width 128, causal). `first` is
the first forward and backward pass of a shape, in which a library may have to build its plan. FLOP count a causal piece
half, and the backward pass as 2.5 forward passes. Differences are from float32, relative to its norm. A kernel that
raises or is not installed says so in its row. Takes under a minute on an H200.
"""
# ruff: noqa: E402

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from benchmarks.report import origin, write_result
from util import attention
from util.attention import Segments
from util.command_line import UserError

WARM_UP, REPEATS = 3, 10
ROW = (
    "{part:14} {pieces:16} {kernel:12} {first:>8} {forward:>8} {both:>8} {speed:>8} {difference:>10} {of_gradients:>10}"
)
HEADER = {"part": "part", "pieces": "pieces", "kernel": "kernel", "first": "first ms", "forward": "fwd ms",
          "both": "both ms", "speed": "TFLOP/s", "difference": "output", "of_gradients": "gradients"}  # fmt: skip


@dataclass
class Shape:
    part: str
    heads: int
    shared: int  # key-value heads
    width: int
    causal: bool

    @property
    def scale(self) -> float:
        return self.width**-0.5


TOWER = Shape("tower", 16, 16, 80, causal=False)
LANGUAGE_2B = Shape("language 2B", 12, 2, 128, causal=True)
LANGUAGE_7B = Shape("language 7B", 28, 4, 128, causal=True)


def drawn(least: int, most: int, total: int) -> list[int]:
    """Lengths of pieces between two bounds, always the same, `total` tokens together."""
    chance = random.Random(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, chance.randint(least, most)))
    return lengths


def work(smoke: bool) -> list[tuple[Shape, str, list[int]]]:
    """Each shape with the lengths of its pieces and a name for them."""
    unit = 16 if smoke else 1024  # tokens are so many sixteenths of the row
    total = 16 * unit
    of_tower = {"1024 x 16": [unit] * 16, "4096 x 4": [4 * unit] * 4, "200 to 5000": drawn(unit // 5, 5 * unit, total)}
    of_language = {
        "512 x 32": [unit // 2] * 32,
        "2048 x 8": [2 * unit] * 8,
        "16384 x 1": [total],
        "100 to 3000": drawn(unit // 10 + 1, 3 * unit, total),
    }
    shapes = [(TOWER, *item) for item in of_tower.items()]
    shapes += [(LANGUAGE_2B, *item) for item in of_language.items()]
    return shapes + [(LANGUAGE_7B, *item) for item in of_language.items()]


# ---- one kernel on one shape -----------------------------------------------------------------------------------------


def attend_by(name: str) -> Callable:
    """attend(q, k, v, segments, causal, scale) of one name. UserError where it is not installed."""
    if name == "plain":
        return attention.by_operator(name)
    attention.check_backend(name)
    return attention.BACKENDS[name]


def inputs_of(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.width, generator=generator, device=device).to(dtype)

    tensors = [draw(heads).requires_grad_() for heads in (shape.heads, shape.shared, shape.shared)]
    return tensors, draw(shape.heads)


def reference(shape: Shape, lengths: list[int], tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and gradients in float32, of the first and the last key-value head and the query heads that share them."""
    group = shape.heads // shape.shared
    queries = [*range(group), *range(shape.heads - group, shape.heads)]
    q, k, v = tensors
    exact = [q[:, queries], k[:, [0, -1]], v[:, [0, -1]]]
    exact = [x.detach().float().requires_grad_() for x in exact]
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in exact[1:])  # else sdpa has no quick way in float32
    out = attention.stacked_sdpa(exact[0], wide_k, wide_v, Segments.of(lengths), shape.causal, shape.scale)
    gradients = torch.autograd.grad(out, exact, gradient[:, queries].float())
    return [out.detach(), *gradients]


def differences(shape: Shape, exact: list[Tensor], found: list[Tensor]) -> tuple[float, float]:
    """Of the output and, the largest, of the gradients: the norm of the difference over the reference's."""
    group = shape.heads // shape.shared
    queries = [*range(group), *range(shape.heads - group, shape.heads)]
    shown = [x[:, heads].float() for x, heads in zip(found, (queries, queries, [0, -1], [0, -1]), strict=True)]
    gaps = [((mine - other).norm() / other.norm()).item() for mine, other in zip(shown, exact, strict=True)]
    return gaps[0], max(gaps[1:])


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of the repeats after the warm-up."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(REPEATS):
        times.append(once(run, device))
    return statistics.median(times)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, the device's own where it has a clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def measure(name: str, shape: Shape, lengths: list[int], prepared: tuple, device: torch.device) -> dict:
    """The figures of one kernel; or what it raised."""
    tensors, gradient, exact = prepared
    segments = Segments.of(lengths).to(device)
    try:
        attend = attend_by(name)

        def forward() -> Tensor:
            return attend(*tensors, segments, shape.causal, shape.scale)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), tensors, gradient)

        first = once(both, device)
        found = [forward().detach(), *both()]
        difference, of_gradients = differences(shape, exact, found)
        del found
        figures = {"first_ms": first, "both_ms": milliseconds(both, device)}
        with torch.no_grad():
            figures["forward_ms"] = milliseconds(forward, device)
    except UserError as error:
        return {"absent": str(error)}
    except Exception as error:  # of any library: the other kernels are still to be measured
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]}
    pairs = sum(length**2 for length in lengths) / (2 if shape.causal else 1)
    flops = 3.5 * 4 * shape.heads * shape.width * pairs
    figures["tflops"] = flops / figures["both_ms"] / 1e9
    return {**figures, "difference": difference, "difference_of_gradients": of_gradients}


def shown(row: dict) -> str:
    head = {name: row[name] for name in ("part", "pieces", "kernel")}
    if reason := row.get("absent") or row.get("failed"):
        return "{part:14} {pieces:16} {kernel:12} ".format(**head) + reason
    return ROW.format(
        **head,
        first=f"{row['first_ms']:.1f}",
        forward=f"{row['forward_ms']:.3f}",
        both=f"{row['both_ms']:.3f}",
        speed=f"{row['tflops']:.1f}",
        difference=f"{row['difference']:.1e}",
        of_gradients=f"{row['difference_of_gradients']:.1e}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small pieces, on whatever device there is")
    parser.add_argument("--kernels", nargs="+", help="only these; default: all that this device may have")
    parser.add_argument("--out", type=Path, help="write the JSON here too, after each row")
    own = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if not (own.smoke or on_gpu):
        sys.exit("benchmarks/attention.py: torch sees no GPU; --smoke runs the same code on small pieces on the CPU")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    usual = ["sdpa", "varlen", "dense", "dense_flash", "cudnn", "flash_attn", "flash_3", "flash_4"]
    kernels = own.kernels or (usual if on_gpu else ["sdpa", "plain"])

    began = time.perf_counter()
    device_name = torch.cuda.get_device_name(device) if on_gpu else None
    result = {**origin("attention.py", sys.argv[1:], device=device_name), "torch": torch.__version__, "rows": []}
    result["cudnn"] = torch.backends.cudnn.version()
    print(ROW.format(**HEADER), flush=True)
    for shape, pieces, lengths in work(own.smoke):
        tensors, gradient = inputs_of(shape, sum(lengths), device, dtype)
        prepared = (tensors, gradient, reference(shape, lengths, tensors, gradient))
        for name in kernels:
            row = {"part": shape.part, "pieces": pieces, "kernel": name}
            row |= measure(name, shape, lengths, prepared, device)
            result["rows"].append(row)
            print(shown(row), flush=True)
            result["seconds"] = round(time.perf_counter() - began, 1)
            if own.out:  # a kernel may take the whole process with it: what is measured is kept
                own.out.parent.mkdir(parents=True, exist_ok=True)
                own.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    write_result(result, own.out)


if __name__ == "__main__":
    main()
