"""Started by torchrun in test_distributed.py: trains one run after another in one process group.

What a run is refused for goes into a file in its output_dir, one for each rank.

torchrun --nproc_per_node 2 tests/distributed_runs.py RUNS.json     (a list of Config fields)
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import finetune_distributed
from util.command_line import UserError
from util.config import Config

torch.set_num_threads(1)
for settings in json.loads(Path(sys.argv[1]).read_text()):
    try:
        finetune_distributed.train(Config(**settings))
    except UserError as error:
        Path(settings["output_dir"]).mkdir(exist_ok=True)
        (Path(settings["output_dir"]) / f"refused_{os.environ['RANK']}").write_text(str(error))
