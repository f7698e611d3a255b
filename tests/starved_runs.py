"""Started by torchrun in test_faults.py: a rank whose gloo threads get a core only when nothing else wants it, as may be on
a busy machine, and that ends right after a collective while something still refers to its process group.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

from util import ranks
from util.config import Config
from util.parallel import distributed

distributed.join_group(Config(device="cpu"), timeout=60)
kept = [dist.group.WORLD, dist.new_group(backend="gloo")]  # as a sharded model and torch's caches refer to them
ranks.gather_on_all("both are there")
core = {min(os.sched_getaffinity(0))}
for task in map(int, os.listdir("/proc/self/task")):
    os.sched_setaffinity(task, core)
    if Path(f"/proc/self/task/{task}/comm").read_text().startswith("pt_gloo"):
        os.sched_setscheduler(task, os.SCHED_IDLE, os.sched_param(0))
ranks.gather_on_all("the last word")
