"""Room on the disk: what a run will write, told before it starts; and a last save, repeated until it succeeds."""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from util import ranks
from util.command_line import UserError
from util.config import Config
from util.tensors import PARTS

GB = 1e9
RETRY_SECONDS = 10


def gigabytes(size: float) -> str:
    """`26.5 GB`, `3.1 MB`: as file managers and `df -H` count."""
    return f"{size / GB:,.1f} GB" if size >= 0.1 * GB else f"{size / 1e6:,.1f} MB"


def free_bytes(folder: Path) -> int:
    """What this user can still write where `folder` is or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- before the first step ------------------------------------------------------------------------------------------


def model_bytes(counts: dict, config: Config, dtype: torch.dtype) -> int:
    """Size in bytes of the model that a run leaves; adapters alone are saved, in the precision they are trained in."""
    if config.lora_rank:
        return sum(counts["adapters"].values()) * wide_bytes(dtype)
    return parameters_of(counts) * dtype.itemsize


def checkpoint_bytes(counts: dict, config: Config, dtype: torch.dtype) -> int:
    """Size in bytes of one checkpoint: weights in the precision of training, and two moments of each trained one."""
    if config.lora_rank:
        saved = trained = sum(counts["adapters"].values())
    else:
        saved = parameters_of(counts)
        trained = sum(counts[part] for part in PARTS if part not in config.freeze)
    # adamw_flash keeps 8 more bits of each weight among its states
    moments = {"adamw": 2 * wide_bytes(dtype), "adamw_8bit": 2, "adamw_flash": 3}[config.optimizer]
    return saved * wide_bytes(dtype) + trained * moments


def parameters_of(counts: dict) -> int:
    return sum(counts[part] for part in PARTS)


def wide_bytes(dtype: torch.dtype) -> int:
    """Bytes of a weight as it is trained: fp32, or fp64 on request."""
    return max(4, dtype.itemsize)


def needs(counts: dict, config: Config, dtype: torch.dtype) -> tuple[int, int, int]:
    """(bytes of the model, bytes of one checkpoint, how many checkpoints may lie there at a time).

    Where the best model is kept while the run trains, those of the model are twice its size: it lies there while a
    better one, or that of the last step, is written.
    """
    most = 0
    if str(config.save_every) != "0":
        most = config.keep + 1  # the newest, and the one that is being written
        if config.eval_data:
            most += 1  # the one with the lowest evaluation loss
    models = 2 if keeps_best(config) else 1
    return models * model_bytes(counts, config, dtype), checkpoint_bytes(counts, config, dtype), most


def keeps_best(config: Config) -> bool:
    """Whether evaluations before the last step may leave a model."""
    return config.leaves == "best" and config.eval_every > 0


def room_in_words(folder: Path, counts: dict, config: Config, dtype: torch.dtype) -> str:
    """A line of the plan: what will be written, and what is free."""
    model, checkpoint, most = needs(counts, config, dtype)
    parts = f"model {gigabytes(model)}"
    if keeps_best(config):
        parts = f"model and best model so far {gigabytes(model)}"
    if most:
        parts += f", and up to {most} checkpoints of {gigabytes(checkpoint)}"
    needed = model + most * checkpoint
    free = free_bytes(folder)
    text = f"{gigabytes(needed)} to write: {parts}; {gigabytes(free)} are free"
    if needed > free:
        text += ": TOO LITTLE for all of them, the last ones will not be saved (fewer with --keep)"
    return text


def check(folder: Path, counts: dict, config: Config, dtype: torch.dtype) -> None:
    """Raise UserError where not even the final model fits, or with --save_every not one checkpoint beside it."""
    model, checkpoint, most = needs(counts, config, dtype)
    free = free_bytes(folder)
    least = model
    what = f"the model ({gigabytes(model)})"
    if keeps_best(config):
        what = f"the model and the best so far ({gigabytes(model)}; --final last keeps none)"
    if most:
        least += checkpoint
        what += f" and one checkpoint ({gigabytes(checkpoint)})"
    if least > free and config.check_disk:
        raise UserError(
            f"--output_dir {folder}: {what} will not fit, {gigabytes(free)} are free. Make room or name a folder on "
            "another disk; --no-check_disk goes ahead all the same"
        )


# ---- when writing fails all the same --------------------------------------------------------------------------------


def failure(error: BaseException, folder: Path, needed: int) -> str:
    """Why something of `needed` bytes could not be written into `folder`, in one line."""
    free = free_bytes(folder)
    found = os_error(error)
    if found is not None and found.errno != errno.ENOSPC:
        text = os.strerror(found.errno)
    elif found is not None or free < needed:  # torch's own writer says only that it failed
        text = "the disk is full"
    else:
        text = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return f"{text}: {gigabytes(needed)} are to be written to {folder}, {gigabytes(free)} are free there"


def os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error that caused this one, if any; safetensors gives its number only in the message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def until_saved(
    save: Callable[[], str], say: Callable[[str], None], while_waiting: Callable[[], None] = lambda: None
) -> None:
    """Call `save`, which returns "" or why it failed, until it succeeds, because a run's work exists nowhere else.

    All ranks must call; if one fails, all try again. `while_waiting` is called before each wait.
    """
    told = None
    while True:
        failed = [problem for problem in ranks.gather_on_all(save()) if problem]
        if not failed:
            break
        if failed[0] != told:
            told = failed[0]
            say(f"NOT SAVED YET: {told}. Nothing is lost while this process lives: it tries again every "
                f"{RETRY_SECONDS} s")  # fmt: skip
        while_waiting()
        time.sleep(RETRY_SECONDS)
    if told:
        say("saved at last")
