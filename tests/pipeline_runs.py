"""Started by torchrun in test_pipeline_parallel.py: trains one run after another in one process group.

Beside what distributed_runs.py does, a run may have a fault put in ("plant"), and each rank notes in its output_dir how
many rows it had under way at most, and how many samples it has read (counted_RANK).

torchrun --nproc_per_node 2 tests/pipeline_runs.py RUNS.json
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import finetune_distributed
from util import dataset
from util.command_line import UserError
from util.config import Config
from util.parallel import pipeline


class CountedPasses(pipeline.StagePasses):
    """Remembers the most rows whose activations a stage has held."""

    most = 0

    def forward(self, batch):
        super().forward(batch)
        CountedPasses.most = max(CountedPasses.most, len(self.rows))


class CountedSamples(dataset.Samples):
    """Counts the samples that this process has read."""

    read = 0

    def __getitem__(self, index):
        CountedSamples.read += 1
        return super().__getitem__(index)


class Swapped:
    """Sends the first two of a step's rows in the wrong order."""

    def __init__(self) -> None:
        self.send, self.held, self.sent = pipeline.Pipe.send_down, None, 0

    def __call__(self, pipe, hidden):
        self.sent += 1
        if self.sent % 4 == 1:  # of four rows a step
            self.held = hidden
            return Nothing()
        sent = self.send(pipe, hidden)
        if self.held is not None:
            pipe.keep(self.send(pipe, self.held))
            self.held = None
        return sent


class Nothing:
    def wait(self):
        pass


def position_of_the_row_before(decode):
    """Later stages turn queries and keys by the positions of the row before."""
    before = {}

    def decode_wrongly(self, batch, *embeddings):
        own = batch.position_ids
        if not self.pipe.is_first:
            others = before.get("row", own)
            count = min(own.shape[1], others.shape[1])
            batch.position_ids = torch.cat([others[:, :count], own[:, count:]], 1)
        before["row"] = own
        return decode(self, batch, *embeddings)

    return decode_wrongly


def planted(fault: str):
    """The patch that puts a fault in."""
    swapped = Swapped()
    decode = pipeline.StageLoss.decode
    add = pipeline.StageLoss.add_tied_gradients
    return {
        "": lambda: patch.object(pipeline, "StagePasses", CountedPasses),
        "tied gradient not added": lambda: patch.object(pipeline.StageLoss, "add_tied_gradients", lambda self: None),
        "tied gradient added twice": lambda: patch.object(
            pipeline.StageLoss, "add_tied_gradients", lambda stage: [add(stage), add(stage)]
        ),
        "tied gradient counted twice in the norm": lambda: patch.object(
            pipeline.Pipe, "is_first", property(lambda pipe: pipe.index == 0 or sys._getframe(1).f_code.co_name == "norm_over_stages")
        ),
        "position of another row": lambda: patch.object(
            pipeline.StageLoss, "decode", position_of_the_row_before(decode)
        ),
        "sent in the wrong order": lambda: patch.object(
            pipeline.Pipe, "send_down", lambda pipe, hidden: swapped(pipe, hidden)
        ),
    }[fault]()  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    dataset.Samples = CountedSamples
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(settings["output_dir"])
        CountedPasses.most = 0
        CountedSamples.read = 0
        with planted(settings.pop("plant", "")):
            try:
                finetune_distributed.train(Config(**settings))
                counted = [CountedPasses.most, CountedSamples.read]
                (folder / f"counted_{os.environ['RANK']}").write_text(json.dumps(counted))
            except UserError as error:
                folder.mkdir(exist_ok=True)
                (folder / f"refused_{os.environ['RANK']}").write_text(str(error))


if __name__ == "__main__":
    main()
