"""Started by torchrun in test_distributed.py: trains one run after another in one process group.

torchrun --nproc_per_node 2 tests/distributed_runs.py RUNS.json     (a list of Config fields)
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import finetune_distributed
from util.config import Config

torch.set_num_threads(1)
for settings in json.loads(Path(sys.argv[1]).read_text()):
    finetune_distributed.train(Config(**settings))
