"""Training on a CPU while other programs want its cores: the same run, its threads asleep or spinning.

    python benchmarks/busy.py --out benchmarks/results/busy.json

Other programs are loops that do nothing, one more than there are cores. finetune.py lets torch's threads sleep soon
while they wait for each other (GOMP_SPINCOUNT=10000). One in the environment overrules that; 300,000 is what OpenMP
takes where nothing is said.
"""

# ruff: noqa: E402

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.overhead import train
from benchmarks.report import origin, write_result

POLICIES = {"waiting": {}, "spinning": {"GOMP_SPINCOUNT": "300000"}}
SETTINGS = ["--device", "cpu", "--global_batch_size", "8", "--max_pixels", "50176", "--num_workers", "1"]


@contextmanager
def beside(loops: int):
    """So many busy programs while the body runs."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--blocks", type=int, default=3, help="times that all run")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.blocks):
        for loops in (0, (os.cpu_count() or 1) + 1):
            for policy, variables in POLICIES.items():
                with tempfile.TemporaryDirectory() as folder, beside(loops):
                    step = train("finetune.py", arguments.steps, SETTINGS, Path(folder), **variables)
                name = f"{policy}, {loops} busy programs beside"
                seconds.setdefault(name, []).append(round(step, 4))
                print(f"{name}: {step:.3f} s a step", flush=True)
    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
    write_result({**origin("busy.py", sys.argv[1:]), "median": medians, "runs": seconds}, arguments.out)


if __name__ == "__main__":
    main()
