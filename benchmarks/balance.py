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
from util.cost.work import draw
from util.steps import deal
from util.vision import FRAME_PIXELS, Budget


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
