"""Save, find and load checkpoints with torch.distributed.checkpoint: each is complete or absent.

A checkpoint holds tensors and one JSON file, nothing that is executed when it is read.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from util.config import UserError

ADMITTED = {
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # where Python 3.13 keeps it
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, keep: int) -> Path:
    """Write `checkpoints/step_000100` of a run and drop all but the `keep` newest. `state["step"]` names it.

    It is written under another name, flushed to disk, and renamed.
    """
    folder = run / "checkpoints"
    final = folder / f"step_{state['step']:06d}"
    unfinished = folder / f".unfinished_{final.name}"
    if is_first_rank():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    wait_for_all_ranks()
    tensors, scalars = gather(model, optimizer)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    dcp.save(tensors, storage_writer=FileSystemWriter(unfinished, sync_files=True), no_dist=not is_distributed())
    if is_first_rank():
        write_flushed(unfinished / "state.json", json.dumps({**state, "optimizer": scalars}, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(unfinished, final)
        flush_folder(folder)
        for old in find_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    wait_for_all_ranks()
    return final


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


def wait_for_all_ranks() -> None:
    if is_distributed():
        torch.distributed.barrier()


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
