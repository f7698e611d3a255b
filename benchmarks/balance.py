"""How evenly is a global batch dealt to 8 to 1,024 ranks? Planning alone, no training.

    python benchmarks/balance.py --out benchmarks/results/balance.json

Samples are drawn from a mix of texts, small and 4K images, and videos of 2 seconds to an hour, and cost their exact
FLOPs in Qwen2-VL-2B. Each step's global batch is dealt by `steps.deal` and, for comparison, in the order drawn,
equally many samples to each rank. The figure is slowest rank / mean rank: 1.00 wastes nothing. Its bound is what no way
to deal whole samples can go below.

With `--context_parallel_size` samples are dealt to groups of ranks that share every row: each rank of a group has as
many of its tokens as another, and whole pictures. A group takes as long as its fullest rank does in each row, and a row
has as many tokens for each rank as without.
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
from util.cost.flops import forward_flops, training_flops
from util.cost.work import draw
from util.dataset import Size
from util.parallel.context import deal_units
from util.steps import deal, first_fit
from util.vision import FRAME_TOKENS, Budget, Grid


def hands_of(costs: list[float], ranks: int) -> list[list[int]]:
    """The samples of one global batch by rank."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for index, hand in enumerate(deal(np.array([costs]), ranks)[0].tolist()):
        hands[hand].append(index)
    return hands


def unevenness(hands: list[list[int]], costs: list[float]) -> float:
    loads = [sum(costs[index] for index in hand) for hand in hands]
    return max(loads) / (sum(loads) / len(loads))


def shared_unevenness(model_config, sizes: list[Size], costs: list[float], ranks: int, together: int) -> float:
    """The same where groups of `together` ranks share their rows."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index].tokens)
    tokens = np.array([[sizes[index].tokens for index in order]])
    groups = deal(np.array([[costs[index] for index in order]]), ranks // together)
    there = np.ones_like(groups, dtype=bool)
    rows = first_fit(tokens, there, groups, ranks // together, Config.max_tokens * together, None)
    members: dict[tuple[int, int], list[Size]] = {}
    for index, group, row in zip(order, groups[0].tolist(), rows[0].tolist(), strict=True):
        members.setdefault((group, row), []).append(sizes[index])
    loads = [0.0] * (ranks // together)
    for (group, _), samples in members.items():
        loads[group] += work_of_fullest(model_config, samples, together)
    return max(loads) / (sum(costs) / ranks)


def work_of_fullest(model_config, samples: list[Size], together: int) -> float:
    """FLOPs of the fullest of the ranks that share a row of these samples, all parts trained."""
    pictures = []
    of_text = 0.0
    for size in samples:
        work = forward_flops(model_config, Size(size.tokens, size.supervised, []))
        of_text += work["language_model"] + work["head"]
        for grid in size.grids:
            pictures += [Grid(1, grid.h, grid.w)] * grid.t
    loads = [0.0] * together
    works: dict[Grid, float] = {}
    for picture, hand in zip(pictures, deal_units(pictures, together), strict=True):
        if picture not in works:
            work = forward_flops(model_config, Size(0, 0, [picture]))
            works[picture] = work["vision"] + work["merger"]
        loads[hand] += works[picture]
    return 3 * (max(loads) + of_text / together)


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
    parser.add_argument(
        "--context_parallel_size", type=int, nargs="+", default=[2, 4], help="ranks that share every row"
    )
    parser.add_argument("--steps", type=int, default=20, help="global batches of each setting")
    parser.add_argument("--seed", type=int, default=0, help="of the mix")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    config, budget, generator = official_config("2b"), Budget(), random.Random(arguments.seed)
    rows = []
    titles = "".join([f"{f'shared by {size}':>16}" for size in arguments.context_parallel_size])
    print(f"{'ranks':>6} {'a rank':>7} {'dealt':>14} {'bound':>7}{titles} {'as drawn':>10} {'planning':>10}", end="")
    print("  (worst step)")
    for ranks in arguments.ranks:
        for per_rank in arguments.samples_per_rank:
            dealt, bound, plain, seconds = [], [], [], []
            shared: dict[int, list[float]] = {size: [] for size in arguments.context_parallel_size}
            for _ in range(arguments.steps):
                sizes = [draw(generator, budget) for _ in range(ranks * per_rank)]
                costs = [training_flops(config, [size], Config()) for size in sizes]
                began = time.perf_counter()
                hands = hands_of(costs, ranks)
                seconds.append(time.perf_counter() - began)
                dealt.append(unevenness(hands, costs))
                bound.append(lower_bound(costs, ranks) / (sum(costs) / ranks))
                for together, found in shared.items():
                    found.append(shared_unevenness(config, sizes, costs, ranks, together))
                plain.append(unevenness([list(range(r, len(costs), ranks)) for r in range(ranks)], costs))
            row = {"ranks": ranks, "samples_per_rank": per_rank, "dealt_mean": statistics.mean(dealt),
                   "dealt_worst": max(dealt), "bound_mean": statistics.mean(bound),
                   "as_drawn_mean": statistics.mean(plain),
                   "planning_ms": 1000 * statistics.median(seconds)}  # fmt: skip
            for together, found in shared.items():
                row |= {f"shared_by_{together}_mean": statistics.mean(found), f"shared_by_{together}_worst": max(found)}
            columns = [f"{statistics.mean(found):>8.3f} ({max(found):.3f})" for found in shared.values()]
            rows.append({key: round(value, 4) for key, value in row.items()})
            print(f"{ranks:>6} {per_rank:>7} {row['dealt_mean']:>6.3f} ({row['dealt_worst']:.3f})"
                  f" {row['bound_mean']:>7.3f} {''.join(columns)} {row['as_drawn_mean']:>9.2f}"
                  f" {row['planning_ms']:>7.2f} ms")  # fmt: skip
    result = {
        **origin("balance.py", sys.argv[1:]),
        "frame_pixels": [tokens * Budget().token_pixels for tokens in FRAME_TOKENS],
        "rows": rows,
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
