"""The packed batches of a run, by a DataLoader whose workers serve it until it is saved."""

import atexit
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from multiprocessing import active_children, connection

import torch
from torch.utils.data import DataLoader

from util import signals
from util.data.bad_samples import Lenient, LenientCollator

atexit.register(signals.kill_workers)  # before multiprocessing's own wait for them, which they would not hear


class Loader(DataLoader):
    """torch's DataLoader with workers that signals to the job do not reach, and that end however this process ends.

    The death of a worker is raised when the next batch is asked for. torch would raise it in whatever line the main
    thread is at, and could leave a step's update half done.
    """

    def __iter__(self) -> Iterator:
        return told_of_dead_workers(self._start())

    def _start(self):
        """torch's iterator, its workers started out of reach of signals."""
        if not signals.is_main_thread():
            return super().__iter__()
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None  # Windows has none
        others = set(active_children())
        with signals.kept_from_children():
            batches = super().__iter__()
        signals.workers.update(set(active_children()) - others)
        if before is not None:  # None: not there, or not set from Python
            signal.signal(signal.SIGCHLD, before)
        return batches

    def begin(self) -> Iterator:
        """An iterator over the batches. The first one is made at once, so that what is wrong with it is raised here."""
        batches = iter(self)
        for first in batches:
            return chain([first], batches)
        return batches


def told_of_dead_workers(batches) -> Iterator:
    """The batches of torch's iterator. Where one cannot be had because a worker died, the error says so.

    torch says so itself, but only where it waits for the worker. While it takes a batch out of the worker's memory,
    the end of the worker is a broken connection, a file that is gone, or an end of input.
    """
    try:
        yield from batches
    except (OSError, EOFError) as error:
        workers = getattr(batches, "_workers", [])
        # The connections of a process that dies are closed a moment before it can be seen to have ended.
        ended = connection.wait([worker.sentinel for worker in workers], timeout=2) if workers else []
        for worker in workers:
            if worker.sentinel in ended:
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) exited unexpectedly") from error
        raise


def packed_batches(
    samples,
    micro_batches: Iterable[list[int]],
    collate: Callable,
    config,
    device: torch.device,
    is_pinned: bool = True,
) -> Loader:
    """The packed batch of each of `micro_batches`, lists of sample numbers, made in data workers.

    `is_pinned`: for a GPU they are in memory that it can copy from while it computes.

    Raises DataError where a sample cannot be read; with `--on_bad_sample skip` the batch does without and counts it.
    """
    return Loader(
        Lenient(samples, config.on_bad_sample),
        batch_sampler=micro_batches,
        collate_fn=LenientCollator(collate),
        num_workers=worker_count(config, device),
        pin_memory=is_pinned and device.type == "cuda",
    )


def worker_count(config, device: torch.device) -> int:
    """Data worker processes: --num_workers, else up to 8 with a GPU, and 1 beside a CPU that is busy training. Ranks
    that share rows have these 8 together, as they read by turns."""
    if config.num_workers is not None:
        return config.num_workers
    readers = config.context_parallel_size * config.tensor_parallel_size
    return -(-min(8, usable_cpus()) // readers) if device.type == "cuda" else 1


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
