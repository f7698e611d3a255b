"""Save, find and load checkpoints with torch.distributed.checkpoint: each is complete or absent.

A checkpoint holds tensors and one JSON file, nothing that is executed when it is read.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import pickle
import shutil
import socket
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from util import ranks
from util.adapters import new_tokens
from util.command_line import MOST_TOLD, Ended, UserError, harmless_settings
from util.config import Config
from util.cost import disk
from util.cost.settings import as_asked
from util.data.lines import split_weight
from util.mixed_adamw import PIECE, exact_pieces, parameters_of, set_exact_value
from util.run_folder import complete_checkpoints, final_in_words, read_final, step_of
from util.tensors import run_parameters, trained_parameters

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a process alone is meant

MOST_BYTES = 2**31  # of weights that are read at a time where not all may be in memory at once
ADMITTED = {
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # where Python 3.13 keeps it
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


class Saver:
    """Saves a run's checkpoints beside the training: threads copy everything to CPU memory and write the files.

    The next step's passes may run meanwhile; what changes weights must call `wait_for_copy` before. One save at a time:
    the next waits for the last.

    A checkpoint is written under another name, flushed to disk, and renamed. Where that fails (a full disk), the run
    says so and goes on; what was complete stays. With several processes every rank calls all of these, and all must
    see the same folder.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        last_step: int,
        say: Callable[[str], None],
        plan: dict,
        evaluations: Sequence[dict] = (),
    ) -> None:
        """`plan`: what the run takes and leaves out of its data (Sizes.mark), which a resumed run compares.

        `evaluations`: those that were made (FinalModel.evaluations); a checkpoint holds what was known when it began.
        """
        self.evaluations = evaluations
        self.run, self.config, self.last_step, self.say, self.plan = run, config, last_step, say, plan
        self.every, self.minutes = split_interval(config.save_every)
        self.saves = bool(self.every or self.minutes)  # whether the last step makes a checkpoint, too
        self.saved_at = time.monotonic()
        self.folder = run / "checkpoints"
        self.problem = ""  # why the last save failed
        self.while_waiting: Callable[[], None] = lambda: None  # for room on the disk: see faults.Watch
        self.idle = threading.Event()
        self.idle.set()
        if ranks.is_first():
            self.data = data_fingerprint(config.data)
            self.new_tokens = new_tokens.texts_of(config)
            for leftover in self.folder.glob(".*"):  # of a process that was killed while saving
                shutil.rmtree(leftover, ignore_errors=True)
        self.stager = Stager()
        self.copying: futures.Future | None = None
        check_shared(self.folder)
        # The thread's collectives must not mix with those of the training: a group of their own, on the CPU.
        self.group: Any = torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None

    def is_due(self, step: int) -> int:
        """1 where a checkpoint should follow this step, by `--save_every`; ranks, whose clocks differ, add it up."""
        if self.minutes:
            return int(step == self.last_step or time.monotonic() - self.saved_at >= 60 * self.minutes)
        return int(self.every > 0 and (step == self.last_step or step % self.every == 0))

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, is_last: bool = False) -> None:
        """Begin to write `checkpoints/step_000100`, named by `state["step"]`; its "eval_loss" may make it the best.

        `is_last`: the run ends with it. Then this waits until it is complete, and tries again where it fails.
        """
        if is_last:
            disk.until_saved(lambda: self._save_and_wait(model, optimizer, dict(state)), self.say, self.while_waiting)
        else:
            self._begin(model, optimizer, state, self._say_failure)

    def _save_and_wait(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> str:
        """ "" or why it failed."""
        self._begin(model, optimizer, state, lambda final: None)
        self.wait()
        return self.problem

    def _begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, failed: Callable[[Path], None]
    ) -> None:
        self.wait()
        self.saved_at = time.monotonic()
        self.problem = ""
        final = self.folder / f"step_{state['step']:06d}"
        unfinished = self.folder / f".unfinished_{final.name}"
        tensors, scalars = tensors_and_scalars(model, optimizer)
        tensors |= {random_key(kind): read() for kind, (read, _) in random_states().items()}
        state["optimizer"] = scalars
        state["evaluations"] = list(self.evaluations)
        needed = sum(tensor.nbytes for tensor in tensors.values())
        self.idle.clear()
        if is_spent(self.stager):
            self.stager = Stager()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the stager's stream does not wait for the update that is under way
        saving: Any = dcp.async_save(
            tensors,
            storage_writer=FileSystemWriter(unfinished, sync_files=True),
            async_stager=self.stager,
            process_group=self.group,
            no_dist=not ranks.are_several(),
        )
        self.copying = saving.staging_completion
        # on the first rank it is done when the others are: that rank writes the index of all files last
        saving.upload_completion.add_done_callback(
            lambda writing: self._complete(writing, unfinished, final, state, needed, failed)
        )

    def save_unless_there(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Save what the run ends with, where it has no checkpoint of that step yet (one that is there may know its
        "eval_loss")."""
        self.wait()
        steps = [step_of(path) for path in complete_checkpoints(self.run)]
        if step not in ranks.gather_on_all(steps)[0]:
            self.save(model, optimizer, {"step": step}, is_last=True)

    def wait_for_copy(self) -> None:
        """Wait until the save that is under way, if any, has copied what is about to change."""
        if self.copying:
            futures.wait([self.copying])

    def wait(self) -> None:
        """Wait until the save that is under way is complete, or has failed."""
        self.idle.wait()

    def _complete(
        self,
        writing: futures.Future,
        unfinished: Path,
        final: Path,
        state: dict,
        needed: int,
        failed: Callable[[Path], None],
    ) -> None:
        try:
            writing.result()
            if ranks.is_first():
                self._publish(unfinished, final, state)
                self.say(f"saved {final}")
        except (Exception, CheckpointException) as error:  # whatever it is: the training must not end with it
            shutil.rmtree(unfinished, ignore_errors=True)
            self.problem = disk.failure(first_failure(error), self.folder, needed)
            failed(final)
        finally:
            self.idle.set()

    def _say_failure(self, final: Path) -> None:
        complete = complete_checkpoints(self.run)
        newest = f"the newest complete one is {complete[-1]}" if complete else "there is none yet"
        self.say(f"NOT SAVED: {final} ({self.problem}); training goes on, {newest}")

    def _publish(self, unfinished: Path, final: Path, state: dict) -> None:
        check_files(unfinished)
        state |= {"settings": as_asked(self.config), "data": self.data, "plan": self.plan}
        state["new_tokens"] = self.new_tokens
        state["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        state["files"] = {path.name: checksum(path) for path in sorted(unfinished.iterdir())}
        body = json.dumps(state, indent=2)
        write_flushed(unfinished / "state.json", f"{body}\n{zlib.crc32(body.encode()):08x}\n")
        if final.exists():
            discard(final)
        os.rename(unfinished, final)
        flush_folder(self.folder)
        found = complete_checkpoints(self.run)
        for old in set(found) - {*found[-self.config.keep :], best_of(found)}:
            discard(old)


@dataclasses.dataclass
class WeightInHalves:
    """Stands in a checkpoint's tensors for a bf16 weight whose fp32 value is saved: see util/mixed_adamw.py."""

    parameter: nn.Parameter
    dtype = torch.float32

    @property
    def nbytes(self) -> int:
        return self.parameter.numel() * self.dtype.itemsize


class Stager(DefaultStager):
    """Copies tensors to the CPU: on a GPU through pinned memory, on a stream of its own. It keeps that memory for the
    next save.

    A weight in two halves arrives there as the one fp32 that these are. It is put together on its device, piece by
    piece, so that the device never holds more than a piece of it.
    """

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        super().__init__(StagingOptions(on_gpu, False, True, on_gpu))
        self.copier = futures.ThreadPoolExecutor(max_workers=1)
        self.stream = torch.Stream() if on_gpu else None  # made here, as torch makes its own
        self.room: dict[str, torch.Tensor] = {}

    def stage(self, state_dict: dict, **unused: Any) -> futures.Future:
        return self.copier.submit(self.copy, state_dict)

    def copy(self, tensors: dict) -> dict[str, torch.Tensor]:
        in_halves = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, WeightInHalves)}
        copied: Any = super().stage({name: tensor for name, tensor in tensors.items() if name not in in_halves})
        together = dict(copied.result())
        with self.stream or nullcontext():
            for name, weight in in_halves.items():
                together[name] = self.put_together(name, weight.parameter)
        if self.stream:
            self.stream.synchronize()
        return together

    def put_together(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        on_gpu = parameter.device.type == "cuda"
        if name not in self.room:
            self.room[name] = torch.empty(parameter.shape, dtype=torch.float32, pin_memory=on_gpu)
        room = self.room[name]
        for target, piece in zip(room.view(-1).split(PIECE), exact_pieces(parameter), strict=True):
            target.copy_(piece, non_blocking=on_gpu)
        return room

    def close(self) -> None:
        super().close()
        self.copier.shutdown(wait=False)


def is_spent(stager: DefaultStager) -> bool:
    """Whether a stager has closed itself: torch 2.11's does so after one save, and every later one would fail."""
    return not getattr(getattr(stager, "_state_dict_stager", None), "_deepcopy_dispatch", True)


def split_interval(text: str | int) -> tuple[int, int]:
    """`--save_every` as (steps, minutes), one of them 0."""
    text = str(text)
    if text.endswith("min"):
        return 0, int(text.removesuffix("min"))
    return int(text), 0


def checksum(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file: against damage, not against malice."""
    size = 0
    found = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(2**24):
            size += len(chunk)
            found = zlib.crc32(chunk, found)
    return [size, found]


def data_fingerprint(files: list[str]) -> list[str]:
    """What the data files hold, so that a resumed run notices other data."""
    found = []
    for named in files:
        file, _ = split_weight(named)
        found.append(f"{named} {checksum(Path(file))}")
    return found


def data_mark(files: list[str]) -> str:
    """A mark of what data files hold and how often, wherever they lie."""
    found = []
    for named in files:
        file, weight = split_weight(named)
        found.append([weight, *checksum(Path(file))])
    return f"{zlib.crc32(json.dumps(found).encode()):08x}"


def read_state(checkpoint: Path) -> dict:
    """What a checkpoint says of itself. Raises ValueError or OSError where that file is damaged."""
    body, _, check = (checkpoint / "state.json").read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
    if check != f"{zlib.crc32(body.encode()):08x}":
        raise ValueError("state.json is damaged")
    return json.loads(body)


def verify(checkpoint: Path) -> dict:
    """The state of a checkpoint whose files are all as they were written, else ValueError or OSError."""
    state = read_state(checkpoint)
    for name, expected in state["files"].items():
        if checksum(checkpoint / name) != expected:
            raise ValueError(f"{name} is damaged")
    return state


def first_failure(error: BaseException) -> BaseException:
    """Of the errors of several ranks, which DCP puts into one, the first."""
    if not isinstance(error, CheckpointException):
        return error
    failure, _ = next(iter(error.failures.values()))  # with its traceback
    return failure


def check_files(folder: Path) -> None:
    """Raise OSError where a file is not there, or not whole, that the index of a checkpoint names.

    Each machine writes its ranks' files, and the first rank's disk alone looks complete to the first rank.
    """
    ends: dict[str, int] = {}  # where the last tensor of each file ends
    for entry in TensorReader(folder).read_metadata().storage_data.values():
        end = entry.offset + entry.length
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), end)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.exists():
            raise OSError(f"{name}, which another rank has written, is not in this folder: is it on another disk?")
        if path.stat().st_size < end:
            raise OSError(f"{name} has {path.stat().st_size:,} bytes of {end:,}")


def check_shared(folder: Path) -> None:
    """Raise UserError where not all ranks see the same folder: no checkpoint in it could ever be loaded."""
    if not ranks.are_several():
        return
    name = f".probe_{uuid.uuid4().hex}"
    if ranks.is_first():
        (folder / name).touch()
    probe = folder / ranks.gather_on_all(name)[0]  # all ranks wait here until it is there
    try:
        check_seen(probe, f"--output_dir {folder.parent}")
    finally:
        if ranks.is_first():
            probe.unlink()


def check_seen(path: Path, flag: str) -> None:
    """Raise UserError, on all ranks, where some of them do not see what is there for the first."""
    seen = ranks.gather_on_all((socket.gethostname(), path.exists()))
    if blind := sorted({host for host, is_there in seen if not is_there}):
        raise UserError(
            f"{flag}: what {seen[0][0]} has there is not seen on {', '.join(blind)}. Checkpoints are written and read "
            "by all ranks together: name a folder that all machines share"
        )


def best_of(checkpoints: list[Path]) -> Path | None:
    """The one with the lowest evaluation loss; None where none has one that is a number."""
    losses = {path: evaluation_loss(path) for path in checkpoints}
    evaluated = [path for path in checkpoints if math.isfinite(losses[path])]
    return min(evaluated, key=lambda path: losses[path], default=None)


def evaluation_loss(checkpoint: Path) -> float:
    """NaN where it was not evaluated, or its file is damaged."""
    try:
        loss = read_state(checkpoint).get("eval_loss")
    except (OSError, ValueError):
        loss = None
    return math.nan if loss is None else loss


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for a whole one."""
    doomed = checkpoint.with_name(f".discarded_{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put weights, optimizer and random state back as they were; return the `state` they were saved with."""
    check_seen(path, f"--resume {path}")
    state = read_state(path)
    reader = TensorReader(path)
    saved = reader.read_metadata().state_dict_metadata
    weights = {f"model.{name}": parameter for name, parameter in trained_parameters(model).items()}
    in_halves = {key: parameter for key, parameter in weights.items() if parameter.dtype == torch.bfloat16}
    tensors = {key: parameter.detach() for key, parameter in weights.items() if key not in in_halves}
    trained = optimized(model, optimizer)
    is_fused = optimizer.defaults.get("fused", False)
    for key, entry in saved.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer" and (name := rest.rpartition(".")[0]) in trained:
            tensors[key] = empty_state(trained[name], entry, is_fused)
        elif kind == "random":
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    if missing := sorted({*tensors, *weights} - set(saved)):
        raise UserError(f"{path}: made from another model: it has no {missing[0]}")
    dcp.load(tensors, storage_reader=reader, no_dist=not ranks.are_several())
    for key, exact in reader.read_in_parts(in_halves):
        set_exact_value(in_halves[key], exact)
    for name, parameter in trained.items():
        prefix = f"optimizer.{name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        take_state(optimizer, parameter, {**own, **state["optimizer"].get(name, {})})
    for kind, (_, write) in random_states().items():
        if random_key(kind) in tensors:  # a rank that was not there before goes on from its seed
            write(tensors[random_key(kind)])
    return state


def empty_state(parameter: nn.Parameter, entry, is_fused: bool) -> torch.Tensor:
    """Room for a tensor of the optimizer's state, laid out as the optimizer makes it: like its own parameter where it
    has that one's shape (sharded if that is), else whole. All is on that one's device, but for the number of its steps,
    which fused AdamW alone has there, and whose reading would wait for the device."""
    if entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
    where = parameter.device if is_fused or entry.size else torch.device("cpu")
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=where)


def random_states() -> dict[str, tuple[Callable, Callable]]:
    """How to read and write the states of the random generators, by kind of device."""
    states = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    if torch.cuda.is_available():
        states["cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return states


def random_key(kind: str) -> str:
    """Every rank has a state of its own: what each draws (dropout) depends on its samples."""
    rank, _ = ranks.rank_and_size()
    return f"random.{kind}.{rank}" if rank else f"random.{kind}"


def tensors_and_scalars(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, dict]]:
    """Weights and optimizer state as one flat dict of tensors, and what of the optimizer's state is no tensor. A weight
    in two halves is a WeightInHalves, which the Stager makes a tensor."""
    tensors: dict[str, Any] = {}
    for name, parameter in trained_parameters(model).items():
        is_in_halves = parameter.dtype == torch.bfloat16
        tensors[f"model.{name}"] = WeightInHalves(parameter) if is_in_halves else parameter.detach()
    scalars: dict[str, dict] = {}
    for name, parameter in optimized(model, optimizer).items():
        for key, value in kept_state(optimizer, parameter).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def kept_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter, as tensors and numbers; one that keeps others says what they are."""
    has_others = hasattr(optimizer, "kept_state")
    return optimizer.kept_state(parameter) if has_others else optimizer.state[parameter]


def take_state(optimizer: Any, parameter: nn.Parameter, kept: dict[str, Any]) -> None:
    if hasattr(optimizer, "take_state"):
        optimizer.take_state(parameter, kept)
    else:
        optimizer.state[parameter] = kept


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """What the optimizer trains, by name."""
    own = set(parameters_of(optimizer.param_groups))
    found = {name: parameter for name, parameter in run_parameters(model).items() if parameter in own}
    # Of a model that shows working copies none would be found, and a checkpoint lack all moments without a word.
    assert len(found) == len(own), f"of the {len(own)} tensors that are trained, the model shows {len(found)}"
    return found


def resolve_resume(config: Config, latest: Path) -> Path | None:
    """The checkpoint that `--resume` means; None to start fresh.

    A damaged one is named and the one before it taken. Settings that are not those it was made with are named, too.
    Raises Ended where the run is finished. Raises UserError for a path without a checkpoint, where all are damaged, and
    for settings that change what the rest of the run computes, without `--resume_anyway`.
    """
    if config.resume == "none":
        return None
    run = Path(config.resume)
    if config.resume == "auto":
        run = Path(config.output_dir) if config.output_dir else latest
    is_checkpoint = (run / "state.json").exists()
    found = [run] if is_checkpoint else complete_checkpoints(run)
    # `auto` without a directory begins a new run, in another one, where the newest has no checkpoint
    if not is_checkpoint and (found or config.resume != "auto" or config.output_dir):
        end_if_finished(config, run, bool(found))
    if not found and config.resume != "auto":
        raise UserError(f"--resume {config.resume}: no checkpoint there (it is a folder checkpoints/step_... of a run)")
    for checkpoint in reversed(found):
        try:
            state = verify(checkpoint)
        except (OSError, ValueError, KeyError) as error:
            print(f"{checkpoint}: not used ({error})", flush=True)
            continue
        compare_settings(config, state, checkpoint)
        return checkpoint.resolve()
    if found:
        raise UserError(f"--resume {config.resume}: every checkpoint there is damaged (see above)")
    return None


def end_if_finished(config: Config, run: Path, has_checkpoint: bool) -> None:
    """Raise Ended, exit code 0, where a run is finished: by `--stop_after`, or without a checkpoint to go on from."""
    final = read_final(run)
    if final is None:
        return
    if not has_checkpoint:
        how = "it has no checkpoint to go on from; another --output_dir begins a new run"
    elif final["stop_after"] and (final["stop_after"], final["final"]) == (config.stop_after, config.leaves):
        how = "another --stop_after goes on (0: to the last step)"
    else:
        return
    raise Ended(f"{run} is finished: its model is that of {final_in_words(final)}; {how}", 0)


def compare_settings(config: Config, state: dict, checkpoint: Path) -> None:
    """Say which settings are not those of a checkpoint; UserError for one that changes what is computed."""
    now = dataclasses.asdict(config)
    # A setting that is younger than the checkpoint was what is its default now.
    then = {**dataclasses.asdict(Config()), **state["settings"]}
    changed = {name: (then[name], now[name]) for name in now if then[name] != now[name]}
    new_tokens.refuse_others(config, state.get("new_tokens", []), checkpoint)
    changed.pop("new_tokens", None)  # the same tokens in another file
    if config.data == then["data"] and data_fingerprint(config.data) != state["data"]:
        changed["data"] = ("the files as they were", "files with other content")
    lines = {name: f"  --{name}: {old} -> {new}" for name, (old, new) in changed.items()}
    harmless = harmless_settings(Config)
    if config.on_long_sample != "stop":
        harmless.discard("max_tokens")  # samples are left out or shrunk by it
    serious = [line for name, line in lines.items() if name not in harmless]
    if "optimizer" in changed:
        raise UserError(
            f"{checkpoint} holds the moments of --optimizer {then['optimizer']}, which --optimizer {now['optimizer']} "
            f"cannot go on with: give --optimizer {then['optimizer']}, or begin a new run with --model set to the "
            "model that this one left"
        )
    if serious and not config.resume_anyway:
        raise UserError(
            f"{checkpoint} was made with other settings:\n" + "\n".join(serious) + "\n"
            "They change what the rest of the run computes. Give the old ones, or --resume_anyway to go on with these"
        )
    if told := [line for name, line in lines.items() if name not in ("resume", "output_dir", "resume_anyway")]:
        print(f"going on from {checkpoint} with other settings:\n" + "\n".join(told), flush=True)


def compare_plan(config: Config, checkpoint: Path, sizes, examples) -> None:
    """Say what of the data is taken or left out in another way than by the run of a checkpoint.

    `sizes`: Sizes, `examples`: its Examples. Raises UserError without `--resume_anyway`, since the rest of the run
    would compute something else.
    """
    now = sizes.mark()
    then = read_state(checkpoint).get("plan")
    if then is None or now == then:  # None: of a version that kept no plan
        return
    lines = differences(now, then, examples)
    if lines and not config.resume_anyway:
        raise UserError(
            f"{checkpoint} was made with another plan of the data:\n" + "\n".join(lines) + "\n"
            "That changes what the rest of the run computes. Restore the files, or --resume_anyway to go on with these"
        )
    if lines and ranks.is_first():
        print(f"going on from {checkpoint} with another plan of the data:\n" + "\n".join(lines), flush=True)


def differences(now: dict, then: dict, examples) -> list[str]:
    """A line for each difference between two plans of the data (Sizes.mark), and the samples' names where known."""
    lines = []
    for name, what in (("left_out", "samples left out"), ("shrunk", "samples shrunk to fit --max_tokens")):
        if now[name] != then[name]:
            lines.append(f"  {what}: {then[name]['count']:,} -> {now[name]['count']:,}")
    for what, ones, others in (("newly", now, then), ("no longer", then, now)):
        there = others["left_out"]["first"]
        if others["left_out"]["count"] > len(there):
            continue  # the list of many is cut: what lies beyond its end may be in it or not
        moved = [i for i in ones["left_out"]["first"] if i < len(examples) and i not in set(there)]
        lines += [f"    {what}: {examples.where(i)}" for i in moved[:MOST_TOLD]]
    if now["left_out"] == then["left_out"] and now["sizes"] != then["sizes"]:
        lines.append("  sizes of samples: others than they were; images or videos have changed")
    return lines


def write_flushed(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def parts_of(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The keys, as many at a time as have `MOST_BYTES` together, or just more."""
    part: list[str] = []
    bytes_of_part = 0
    for key, size in sizes.items():
        part.append(key)
        bytes_of_part += size
        if bytes_of_part >= MOST_BYTES:
            yield part
            part = []
            bytes_of_part = 0
    if part:
        yield part


class TensorReader(FileSystemReader):
    """Reads a checkpoint's tensors. DCP unpickles its own `.metadata` freely; this admits only its classes."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_in_parts(self, keys: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors in CPU memory, on however many ranks they were saved; a few at a time are there."""
        saved = self.read_metadata().state_dict_metadata
        for names in parts_of({key: saved[key].size.numel() * saved[key].properties.dtype.itemsize for key in keys}):
            part = {key: torch.empty(saved[key].size, dtype=saved[key].properties.dtype) for key in names}
            dcp.load(part, storage_reader=self, no_dist=True)
            yield from part.items()


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        own = getattr(dcp.metadata, name, None) if module == dcp.metadata.__name__ else None
        is_own_class = isinstance(own, type) and own.__module__ == module
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_own_class or is_dtype or (module, name) in ADMITTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's metadata must not name {module}.{name}; the file is not ours")
