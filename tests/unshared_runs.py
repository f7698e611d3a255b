"""Started by torchrun in test_disk.py: two ranks as on two machines that do not share a folder.

torchrun --nproc_per_node 2 tests/unshared_runs.py RUNS.json     (a list of Config fields)
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
from util.parallel import distributed

torch.set_num_threads(1)
(settings,) = json.loads(Path(sys.argv[1]).read_text())
shared = Path(settings["output_dir"]).parent
if os.environ["RANK"] == "1":  # the same name, another disk
    open_run = distributed.open_run

    def elsewhere(*arguments):
        run = open_run(*arguments)
        run.directory = shared / "disk_of_rank_1" / run.directory.name
        return run

    distributed.open_run = elsewhere
try:
    finetune_distributed.train(Config(**settings))
except UserError as error:
    (shared / f"refused_{os.environ['RANK']}").write_text(str(error))
