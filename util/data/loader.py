"""The DataLoader whose workers survive the signals that end a run: they serve it until it is saved."""

import atexit
import signal
from multiprocessing import active_children

from torch.utils.data import DataLoader

from util import signals

atexit.register(signals.kill_workers)  # before multiprocessing's own wait for them, which they would not hear


class Loader(DataLoader):
    """torch's DataLoader, its workers out of reach of signals; they end with this process, however that ends.

    A worker that dies is told by the next batch that is asked for, and not, as torch does it, by an exception in
    whatever line the main thread is at: a step's update would be left half done.
    """

    def __iter__(self):
        if not signals.is_main_thread():
            return super().__iter__()
        before = signal.getsignal(signal.SIGCHLD)
        others = set(active_children())
        with signals.kept_from_children():
            batches = super().__iter__()
        signals.workers.update(set(active_children()) - others)
        if before is not None:  # None: not set from Python
            signal.signal(signal.SIGCHLD, before)
        return batches
