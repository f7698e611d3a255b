"""Faults of a job of many processes: a restart goes on with the same run, a slow rank is named, a job that hangs ends
and says which samples each rank was on.
"""

import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from util import run_folder
from util.command_line import record_failure
from util.config import Config
from util.cost.settings import changed
from util.loss import PackedLoss
from util.model import layers
from util.parallel.context import ContextLoss

EVERY = 20  # steps between two comparisons of the ranks
MEASURED = 5  # of these, the last steps are measured
SLOW = 1.5  # a rank that takes this many times as long as the median for the same work is slow
STARVED = 0.2  # a rank that waits for its data longer than the median rank, by this share of a step, is starved


def collective_timeout() -> float:
    """Seconds without progress after which a job ends (environment variable COLLECTIVE_TIMEOUT)."""
    return float(os.environ.get("COLLECTIVE_TIMEOUT", 1800))


def continue_after_restart(config: Config) -> Config:
    """The settings with which all ranks go on: those of the first rank, whose defaults may come from a run's files.

    When torchrun has started the processes again, the settings continue the run that this job began, from its newest
    checkpoint. That run is found by the process that started it: torchrun, which outlives the restart.
    """
    box = [config]
    if dist.get_rank() == 0 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        runs = [Path(config.output_dir).resolve()] if config.output_dir else sorted(run_folder.RUNS.glob("2*"))
        for run in reversed(runs):
            if launched_by(run) == launcher():
                has_checkpoint = bool(run_folder.complete_checkpoints(run))
                # Without a checkpoint yet, a run that was itself resumed from another begins there again.
                resume = "auto" if has_checkpoint or config.resume == "none" else config.resume
                box = [changed(config, output_dir=str(run), resume=resume)]
                break
    dist.broadcast_object_list(box, src=0)
    return box[0]


def launcher() -> list:
    """What started this process, as [name of the machine, process number]."""
    return [socket.gethostname(), os.getppid()]


def launched_by(run: Path) -> list | None:
    """The launcher that a run's settings name; None where they name none or cannot be read."""
    try:
        return run_folder.read_settings(run)["launched_by"]
    except (OSError, ValueError, KeyError):
        return None


class Watch:
    """Knows where every rank is, and how fast it computes.

    Every rank writes into the job's store (torchrun's, which outlives any rank) which samples it is at. A thread ends
    the job when its rank has not moved for `collective_timeout()` seconds: once one rank hangs, no rank moves. Every
    20 steps the ranks compare how many seconds they computed per unit of work. Only the forward passes of a rank's own
    layers are timed, so that waiting for other ranks does not count. Of ranks that share a row attention waits for the
    others, and pictures are dealt unevenly: there the language model's layers are timed without attention, and the unit
    of work is a token.
    """

    def __init__(self, world, model: PackedLoss, run, saver, last_step: int) -> None:
        self.world, self.run, self.last_step = world, run, last_step
        self.number = 0  # of the step
        self.measuring = False
        self.work = self.data_seconds = self.step_seconds = 0.0
        self.shares_rows = isinstance(model, ContextLoss)
        self.is_inside = False  # of the forward pass of a layer
        self.marks: list = []  # begin, end, begin, end ... of layers: seconds, or events on a GPU
        self.began = self.moved = time.monotonic()
        self.finished = threading.Event()
        if world.size == 1:
            return
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
        )
        self.store = dist.PrefixStore(f"watch_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._tell("starting", [])
        saver.while_waiting = lambda: self._tell("waiting for room on the disk", [])
        model.register_forward_pre_hook(self._begin_pass, prepend=True)
        timed = layers(model.model)
        if isinstance(model, ContextLoss):
            timed = model.model.model.language_model.layers
            model.row_attention.around = self._left
        for layer in timed:  # inside the hooks of fully_shard, so that no collective is timed
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave, prepend=True)
        threading.Thread(target=self._guard, daemon=True).start()

    def begin(self, number: int, samples: list[str]) -> None:
        """A step begins; its samples of this rank are being fetched."""
        self.number = number
        self.began = time.monotonic()
        self.measuring = self.world.size > 1 and (number - 1) % EVERY >= EVERY - MEASURED
        if self.world.size > 1:
            self._tell("fetching", samples)

    def end(self, work: float, data_seconds: float) -> None:
        """A step is done: this rank's share was `work` FLOPs, and it waited `data_seconds` for its data."""
        if self.measuring:
            self.work += 0 if self.shares_rows else work
            self.data_seconds += data_seconds
            self.step_seconds += time.monotonic() - self.began
            if self.number % EVERY == 0:
                self._compare()
        self.measuring = False
        if self.number == self.last_step:
            self.finish()

    def finish(self) -> None:
        """There is no further step: what follows takes its time."""
        self.finished.set()

    # ---- slow ranks ----

    def _begin_pass(self, module, args) -> None:
        batch = args[0]
        self._tell("training on", batch.where)
        if self.measuring and self.shares_rows:
            self.work += len(batch.input_ids)

    @contextmanager
    def _left(self) -> Iterator[None]:
        """While a layer waits for others, which is not its own work; where it computes once more, nothing is timed."""
        is_timed = self.is_inside
        if is_timed:
            self._leave()
        yield
        if is_timed:
            self._enter()

    @torch.compiler.disable
    def _enter(self, *unused: object) -> None:
        self.is_inside = True
        if self.measuring:
            self._mark()

    @torch.compiler.disable
    def _leave(self, *unused: object) -> None:
        self.is_inside = False
        if self.measuring:
            self._mark()

    def _mark(self) -> None:
        """Begin or end of a layer's forward pass, on the clock of the device."""
        if self.world.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)

    def _compare(self) -> None:
        """Gather the times of all ranks; the first names those that are slow."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
            seconds = sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        else:
            seconds = sum(end - begin for begin, end in pairs)
        mine = torch.tensor([seconds, self.work, self.data_seconds], dtype=torch.float64)
        everyone = [torch.zeros_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        computing, work, waiting = torch.stack(everyone).T.tolist()
        self.run.log_ranks({
            "step": self.number,
            "compute_seconds_by_rank": [round(value, 4) for value in computing],
            "data_seconds_by_rank": [round(value, 4) for value in waiting],
        })  # fmt: skip
        for ranks in self.world.layout.weight_groups():  # other stages have other work for the same samples
            own = np.array([computing, work, waiting])[:, ranks].tolist()
            for text in name_slow_ranks(*own, self.step_seconds, ranks):
                self.run.say(f"step {self.number}: {text}")
        self.work = self.data_seconds = self.step_seconds = 0.0
        self.marks.clear()

    # ---- jobs that hang ----

    def _tell(self, doing: str, samples: list[str]) -> None:
        self.moved = time.monotonic()
        named = "; ".join(samples[:4])
        if len(samples) > 4:
            named += f" and {len(samples) - 4} more"
        place = f"{socket.gethostname()}, step {self.number}, {doing} {named or 'no sample'}"
        self.store.set(str(self.world.rank), json.dumps([time.time(), place]))

    def _guard(self) -> None:
        while not self.finished.wait(1.0):
            if time.monotonic() - self.moved > collective_timeout():
                self._end_job()

    def _end_job(self) -> None:
        if self.store.add("told", 1) > 1:  # another rank was first and tells; torchrun then ends this one
            time.sleep(20)
            os._exit(1)
        lines = [f"no progress for {collective_timeout():.0f} s (COLLECTIVE_TIMEOUT). Where every rank is:"]
        for rank in range(self.world.size):
            if not self.store.check([str(rank)]):  # `get` would wait for it, and the table would be lost
                lines.append(f"  rank {rank} (has not begun to train)")
                continue
            since, place = json.loads(self.store.get(str(rank)))
            lines.append(f"  rank {rank} ({place}) for {time.time() - since:.0f} s")
        lines.append("The rank that is at an earlier place than the others, or fetches, holds them all up.")
        record_failure("\n".join(lines))
        os._exit(1)


def name_slow_ranks(
    computing: list[float], work: list[float], waiting: list[float], step_seconds: float, ranks: list[int] | None = None
) -> list[str]:
    """A line for each rank that, against the median rank, computes slowly for its work or waits long for its data.

    computing and waiting: seconds by rank; work: FLOPs by rank; step_seconds: what the measured steps took together.
    `ranks`: the numbers of those that are compared; None: all, counted from 0.
    """
    ranks = ranks or list(range(len(work)))
    rates = {}  # seconds per FLOP of the ranks that had work
    for place, (seconds, flops) in enumerate(zip(computing, work, strict=True)):
        if flops:
            rates[place] = seconds / flops
    lines = []
    if rates:
        usual = statistics.median_low(rates.values())
        for place, rate in rates.items():
            if rate > SLOW * usual:
                own = f"rank {ranks[place]} is slow: {computing[place]:.2f} s of computing"
                lines.append(f"{own} for what takes the others {usual * work[place]:.2f} s")
    usual = statistics.median_low(waiting)
    for rank, seconds in zip(ranks, waiting, strict=True):
        if seconds - usual > STARVED * step_seconds:
            lines.append(f"rank {rank} waits for its data: {seconds:.2f} s, the others {usual:.2f} s (--num_workers)")
    return lines
