"""How evenly is a global batch dealt to 8 to 1,024 ranks? Planning alone, no training.

    python benchmarks/balance.py --out benchmarks/results/balance.json

Samples are drawn from a mix of texts, small and 4K images, and videos of 2 seconds to an hour, and cost their exact
FLOPs in Qwen2-VL-2B. Each step's global batch is dealt by `steps.deal` and, for comparison, in the order drawn,
equally many samples to each rank. The figure is slowest rank / mean rank: 1.00 wastes nothing. Its bound is what no way
to deal whole samples can go below.
"""

# ruff: noqa: E402

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.report import origin, write_result
from tests.official import official_config
from util.config import Config
from util.cost.flops import training_flops
from util.dataset import Size
from util.steps import deal
from util.vision import FRAME_PIXELS, IMAGE_PIXELS, PATCH, Budget, Grid, frame_count, frame_size, smart_resize


def draw(generator: random.Random, budget: Budget) -> Size:
    """One sample of the mix: 30 % text, 50 % images from 0.1 to 8.3 megapixels, 20 % videos from 2 s to 1 h."""
    text, kind = round(generator.lognormvariate(4.5, 1)) + 30, generator.random()
    grids = []
    if 0.3 <= kind < 0.8:
        height, width = ((336, 448), (1080, 1920), (2160, 3840))[generator.choices(range(3), (5, 3, 2))[0]]
        height, width = smart_resize(height, width, *IMAGE_PIXELS)
        grids = [Grid(1, height // PATCH, width // PATCH)]
    elif kind >= 0.8:
        seconds = 2 * (1800 ** generator.random())  # 2 s to 1 h, evenly on a logarithmic scale
        frames = frame_count({}, round(seconds * 30), 30, budget)
        (height, width), _ = frame_size({}, 720, 1280, frames, budget)
        grids = [Grid(frames // 2, height // PATCH, width // PATCH)]
    return Size(text + sum(grid.tokens for grid in grids), max(1, text // 4), grids)


def hands_of(costs: list[float], ranks: int) -> list[list[int]]:
    """The samples of one global batch by rank."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for index, hand in enumerate(deal(np.array([costs]), ranks)[0].tolist()):
        hands[hand].append(index)
    return hands


def unevenness(hands: list[list[int]], costs: list[float]) -> float:
    loads = [sum(costs[index] for index in hand) for hand in hands]
    return max(loads) / (sum(loads) / len(loads))


def lower_bound(costs: list[float], ranks: int) -> float:
    """What the slowest of `ranks` ranks costs at least, however whole samples are dealt: the mean, and for every k, as
    one rank has k + 1 of the k * ranks + 1 costliest samples, the k + 1 cheapest of these (Martello and Toth, 1990)."""
    ordered = sorted(costs, reverse=True)
    together = [sum(ordered[k * ranks - i] for i in range(k + 1)) for k in range((len(costs) - 1) // ranks + 1)]
    return max(sum(costs) / ranks, *together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024], help="numbers of ranks")
    parser.add_argument("--samples_per_rank", type=int, nargs="+", default=[8, 16, 32], help="of a global batch")
    parser.add_argument("--steps", type=int, default=20, help="global batches of each setting")
    parser.add_argument("--seed", type=int, default=0, help="of the mix")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    config, budget, generator = official_config("2b"), Budget(), random.Random(arguments.seed)
    rows = []
    print(f"{'ranks':>6} {'a rank':>7} {'dealt':>14} {'bound':>7} {'as drawn':>10} {'planning':>10}  (worst step)")
    for ranks in arguments.ranks:
        for per_rank in arguments.samples_per_rank:
            dealt, bound, plain, seconds = [], [], [], []
            for _ in range(arguments.steps):
                costs = [training_flops(config, [draw(generator, budget)], Config()) for _ in range(ranks * per_rank)]
                began = time.perf_counter()
                hands = hands_of(costs, ranks)
                seconds.append(time.perf_counter() - began)
                dealt.append(unevenness(hands, costs))
                bound.append(lower_bound(costs, ranks) / (sum(costs) / ranks))
                plain.append(unevenness([list(range(r, len(costs), ranks)) for r in range(ranks)], costs))
            row = {"ranks": ranks, "samples_per_rank": per_rank, "dealt_mean": statistics.mean(dealt),
                   "dealt_worst": max(dealt), "bound_mean": statistics.mean(bound),
                   "as_drawn_mean": statistics.mean(plain),
                   "planning_ms": 1000 * statistics.median(seconds)}  # fmt: skip
            rows.append({key: round(value, 4) for key, value in row.items()})
            print(f"{ranks:>6} {per_rank:>7} {row['dealt_mean']:>6.3f} ({row['dealt_worst']:.3f})"
                  f" {row['bound_mean']:>7.3f} {row['as_drawn_mean']:>9.2f} {row['planning_ms']:>7.2f} ms")  # fmt: skip
    result = {
        **origin("balance.py", sys.argv[1:]),
        "frame_pixels": FRAME_PIXELS,
        "rows": rows,
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
