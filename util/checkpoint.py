"""Save, find and load checkpoints with torch.distributed.checkpoint: each is complete or absent.

A checkpoint holds tensors and one JSON file, nothing that is executed when it is read.
"""

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from util.config import UserError

ADMITTED = {
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # where Python 3.13 keeps it
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


class Saver:
    """Saves a run's checkpoints beside the training: `save` returns when everything is copied to CPU memory, a thread
    writes the files. One save at a time: the next waits for the last.

    A checkpoint is written under another name, flushed to disk, and renamed. Where that fails (a full disk), the run
    says so and goes on; what was complete stays. With several processes every rank calls `save` and `wait`.
    """

    def __init__(self, run: Path, keep: int, say: Callable[[str], None]) -> None:
        self.run, self.keep, self.say = run, keep, say
        self.folder = run / "checkpoints"
        self.idle = threading.Event()
        self.idle.set()
        if is_first_rank():
            for leftover in self.folder.glob(".*"):  # of a process that was killed while saving
                shutil.rmtree(leftover, ignore_errors=True)
        # The thread's collectives must not mix with those of the training: a group of their own, on the CPU.
        self.group = torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Begin to write `checkpoints/step_000100`, named by `state["step"]`."""
        self.wait()
        final = self.folder / f"step_{state['step']:06d}"
        unfinished = self.folder / f".unfinished_{final.name}"
        tensors, scalars = gather(model, optimizer)
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        state = json.dumps({**state, "optimizer": scalars}, indent=2)
        self.idle.clear()
        writing = dcp.async_save(
            tensors,
            storage_writer=FileSystemWriter(unfinished, sync_files=True),
            process_group=self.group,
            no_dist=not is_distributed(),
        )
        # on the first rank it is done when the others are: that rank writes the index of all files last
        writing.add_done_callback(lambda writing: self._complete(writing, unfinished, final, state))

    def wait(self) -> None:
        """Wait until the save that is under way is complete, or has failed."""
        self.idle.wait()

    def _complete(self, writing: Future, unfinished: Path, final: Path, state: str) -> None:
        try:
            writing.result()
            if is_first_rank():
                self._publish(unfinished, final, state)
                self.say(f"saved {final}")
        except (OSError, RuntimeError, CheckpointException) as error:
            if is_first_rank():
                shutil.rmtree(unfinished, ignore_errors=True)
                complete = find_checkpoints(self.run)
                newest = f"the newest complete one is {complete[-1]}" if complete else "there is none yet"
                self.say(f"NOT SAVED: {final} ({reason(error)}); training goes on, {newest}")
        finally:
            self.idle.set()

    def _publish(self, unfinished: Path, final: Path, state: str) -> None:
        write_flushed(unfinished / "state.json", state)
        if final.exists():
            discard(final)
        os.rename(unfinished, final)
        flush_folder(self.folder)
        for old in find_checkpoints(self.run)[: -self.keep]:
            discard(old)


def reason(error: BaseException) -> str:
    """The last line of an error, which says what went wrong, without the traceback that DCP puts before it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for a whole one."""
    doomed = checkpoint.with_name(f".discarded_{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put weights, optimizer and random state back as they were; return the `state` they were saved with."""
    state = json.loads((path / "state.json").read_text())
    reader = TensorReader(path)
    saved = reader.read_metadata().state_dict_metadata
    parameters = dict(model.named_parameters())
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for key, entry in saved.items():
        if key.startswith(("optimizer.", "random.")):
            parameter = parameters.get(key.removeprefix("optimizer.").rpartition(".")[0])
            like = parameter is not None and parameter.shape == entry.size
            dtype = entry.properties.dtype
            tensors[key] = torch.empty_like(parameter, dtype=dtype) if like else torch.empty(entry.size, dtype=dtype)
    if missing := sorted(set(tensors) - set(saved)):
        raise UserError(f"{path}: made from another model: it has no {missing[0]}")
    dcp.load(tensors, storage_reader=reader, no_dist=not is_distributed())
    for name, parameter in optimized(model, optimizer).items():
        prefix = f"optimizer.{name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        optimizer.state[parameter] = {**own, **state["optimizer"].get(name, {})}
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return state


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Weights and optimizer state as one flat dict of tensors, and what of the optimizer's state is no tensor."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    scalars = {}
    for name, parameter in optimized(model, optimizer).items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """What the optimizer trains, by the name of the model's parameter (its own may share that one's memory)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names[getattr(parameter, "source", parameter)]: parameter for parameter in trained}


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if (path / "state.json").exists())


def resolve_resume(resume: str, output_dir: str | None, latest: Path) -> Path | None:
    """The checkpoint that `--resume` means; None to start fresh. Raises UserError for a path without one."""
    if resume == "none":
        return None
    if resume == "auto":
        found = find_checkpoints(Path(output_dir) if output_dir else latest)
        return found[-1].resolve() if found else None
    path = Path(resume)
    if (path / "state.json").exists():
        return path.resolve()
    if found := find_checkpoints(path):
        return found[-1].resolve()
    raise UserError(f"--resume {resume}: no checkpoint there (a checkpoint is a folder checkpoints/step_... of a run)")


def is_distributed() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def is_first_rank() -> bool:
    return not is_distributed() or torch.distributed.get_rank() == 0


def write_flushed(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class TensorReader(FileSystemReader):
    """Reads a checkpoint's tensors. DCP unpickles its own `.metadata` freely; this admits only its classes."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        own = getattr(dcp.metadata, name, None) if module == dcp.metadata.__name__ else None
        is_own_class = isinstance(own, type) and own.__module__ == module
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_own_class or is_dtype or (module, name) in ADMITTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's metadata must not name {module}.{name}; the file is not ours")
