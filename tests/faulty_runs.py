"""Started by torchrun in test_faults.py: trains with one fault put into rank 1.

python -m util.parallel.launch --nproc_per_node 2 tests/faulty_runs.py FAULT SETTINGS     (FAULT: see below; SETTINGS: JSON)
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import finetune_distributed
from util import dataset, packed_layers, run_folder
from util.command_line import run_training
from util.config import Config
from util.data.lines import DataError
from util.loss import PackedLoss

torch.set_num_threads(1)
if "RUNS" in os.environ:
    run_folder.RUNS = Path(os.environ["RUNS"])  # instead of train_output/, where the user's runs are
fault, settings = sys.argv[1], json.loads(sys.argv[2])
load, forward = dataset.Samples.__getitem__, PackedLoss.forward
calls = 0


def once(action, call=3):
    """Do it in a rank's third forward pass."""
    global calls
    calls += 1
    if calls == call:
        print(f"FAULT AT {time.time()}", flush=True)
        action()


def broken_worker(self, index):
    """Every sample of a later step than the second; of the held-out data, one."""
    log = Path(settings["output_dir"], "metrics.jsonl")
    trained = log.read_text().count('"loss"') if log.exists() else 0
    is_held_out = "test_data" in self.examples.files[0]
    if trained >= 2 and is_held_out == ("held-out" in fault):
        if fault == "raises in data worker":
            raise RuntimeError("the disk of this machine is on fire")
        raise DataError("the photo is gone")
    return load(self, index)


def raise_in_step():
    raise RuntimeError("a bug on rank 1")


def run_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


if os.environ["RANK"] == "1":
    if fault in ("raises in data worker", "bad data", "bad held-out data"):
        dataset.Samples.__getitem__ = broken_worker
    elif fault == "raises":
        PackedLoss.forward = lambda *args, **kwargs: once(raise_in_step) or forward(*args, **kwargs)
    elif fault == "out of memory":
        PackedLoss.forward = lambda *args, **kwargs: once(run_out_of_memory) or forward(*args, **kwargs)
    elif fault == "hangs":
        PackedLoss.forward = lambda *args, **kwargs: once(lambda: time.sleep(600)) or forward(*args, **kwargs)
    elif fault == "freezes":
        PackedLoss.forward = lambda *args, **kwargs: (
            once(lambda: os.kill(os.getpid(), signal.SIGSTOP)) or forward(*args, **kwargs)
        )
    elif fault == "dies":
        PackedLoss.forward = lambda *args, **kwargs: (
            once(lambda: os.kill(os.getpid(), 9), 5) or forward(*args, **kwargs)
        )
    elif fault == "slow":
        attend = packed_layers.attend

        def slow_attend(attention, *args):
            time.sleep(0.1 if attention.is_causal else 0)  # in each layer of the language model
            return attend(attention, *args)

        packed_layers.attend = slow_attend
    elif fault == "slow data":
        dataset.Samples.__getitem__ = lambda *args: time.sleep(0.1) or load(*args)
run_training(finetune_distributed.train, Config(**settings))
