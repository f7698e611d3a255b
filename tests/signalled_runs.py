"""Started by test_signals.py: trains, and waits at one moment until the test lets it go on.

python tests/signalled_runs.py MOMENT FOLDER SETTINGS        (alone; through util.parallel.launch: as one of several ranks)

It says that it has reached the moment by a file FOLDER/reached, and goes on when there is FOLDER/go_on. SETTINGS: JSON,
the fields of Config and "start_method", how data workers are started. These run this file, too.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.checkpoint import FileSystemWriter

import finetune
import finetune_distributed
from util import dataset, model
from util.command_line import run_training
from util.config import Config
from util.cost import measure
from util.loss import PackedLoss
from util.publish import save_model
from util.results import evaluate

moment, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)


def wait_here() -> None:
    (folder / "reached").touch()
    while not (folder / "go_on").exists():
        time.sleep(0.01)


def waiting(owner, name: str, when=lambda *arguments: True) -> None:
    """Let `owner.name` wait at its first call for which `when` says so, on the first rank."""
    function, is_first = getattr(owner, name), os.environ.get("RANK", "0") == "0"

    def wait_and_call(*arguments, **named):
        if is_first and not (folder / "reached").exists() and when(*arguments):
            wait_here()
        return function(*arguments, **named)

    setattr(owner, name, wait_and_call)


def is_logged(step: int) -> bool:
    log = Path(settings["output_dir"], "metrics.jsonl")
    return log.exists() and log.read_text().count('"loss"') >= step


if moment == "start":
    waiting(model, "find_model")
elif moment == "headers":
    measure.WORTH_WORKERS, measure.CHUNK = 0.0, 8
    waiting(measure.Chunks, "__getitem__", lambda chunks, number: number == 2)
elif moment == "first batch":
    waiting(dataset.Samples, "__getitem__")
elif moment == "data":
    waiting(dataset.Samples, "__getitem__", lambda *_: is_logged(1))
elif moment == "step":
    waiting(PackedLoss, "forward", lambda packed, *_: packed.training and is_logged(1))
elif moment == "loss":
    waiting(PackedLoss, "score")
elif moment == "answers":
    waiting(evaluate.Answerer, "read")
elif moment == "best":
    waiting(save_model, "move_files")
elif moment == "save":
    waiting(FileSystemWriter, "write_data")
elif moment == "final save":
    waiting(save_model, "save_model")

if __name__ == "__main__":
    multiprocessing.set_start_method(settings.pop("start_method", "fork"), force=True)
    if "RANK" not in os.environ:
        os.setpgid(0, 0)  # the group that a terminal would signal
    train = finetune_distributed.train if "RANK" in os.environ else finetune.train
    run_training(train, Config(**settings))
