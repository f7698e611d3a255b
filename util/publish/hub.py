"""Models on the Hugging Face hub (`--push_to_hub`), pushed by a running training or later:

    python -m util push train_output/my_run my-model                          # the run's final model
    python -m util push train_output/my_run/checkpoints/step_000100 my-model

One commit brings the files of the model and a model card, without paths and names of this machine. A training leaves
this to a process of its own, so that neither the hub nor the network can stop it.
"""

import argparse
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from util.command_line import UserError, command_parser
from util.publish.beside import Beside, Training
from util.publish.hub_files import WEIGHTS, stage
from util.publish.settings import HubSettings, invalid_hub_settings
from util.run_folder import SETTINGS, complete_checkpoints, step_of

PATIENCE = float(os.environ.get("HUB_TIMEOUT", 60))  # seconds to wait for one answer
FIRST_PAUSE = PATIENCE / 6  # seconds between the first attempt and the second; each later pause is 3 times as long
ATTEMPTS = 4  # in each of which huggingface_hub repeats most requests by itself
MAY_PASS = (408, 409, 412, 429)  # timeout, conflict, changed meanwhile, too many requests: another attempt may help


# ---- what a training calls ------------------------------------------------------------------------------------------


def check_token(config, say: Callable[[str], None]) -> None:
    """Before training: UserError where the hub refuses the token that is here, or there is none.

    Where the hub cannot be asked, that is said, and the training starts.
    """
    if not config.push_to_hub:
        return
    from huggingface_hub.errors import LocalTokenNotFoundError

    flag = f"--push_to_hub {config.push_to_hub}"
    advice = "make a token that may write at https://huggingface.co/settings/tokens, then run: hf auth login"
    answer = ask_who_pushes()
    if isinstance(answer, LocalTokenNotFoundError):
        raise UserError(f"{flag}: there is no token of the hub here; {advice}")
    if isinstance(answer, Exception) and status_of(answer) in (401, 403):
        raise UserError(f"{flag}: the hub rejects the token that is here; {advice}")
    if isinstance(answer, Exception):
        say(f"{flag}: the hub cannot be asked now ({reason(answer)}); training goes on")
    elif answer.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{flag}: the token that is here may only read; {advice}")


def ask_who_pushes() -> dict | Exception:
    """What the hub says of the token that is here, or the error that came instead."""
    seconds = PATIENCE / 4
    found: list[dict | Exception] = [TimeoutError(f"no answer within {seconds:g} s")]

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            found.append(HfApi().whoami())
        except Exception as error:
            found.append(error)

    # A thread can be left behind. A time limit of the request would not cover looking up the hub's address.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[-1]


def start(config, directory: Path, say: Callable[[str], None]) -> list[Beside]:
    """With --push_every_save: a process that sends the newest checkpoint, again and again while the run trains."""
    if not config.push_every_save:
        return []
    return [Beside("push", [*arguments(config, directory), "--follow"], directory / "push.log", say, patience=0)]


def push_at_end(config, directory: Path, say: Callable[[str], None]) -> None:
    """Send the final model and wait for it. Where that fails, say so, and the command that does it later."""
    # Left over where the process that `start` began was ended in the middle of a push
    shutil.rmtree(directory / ".pushing", ignore_errors=True)
    if not config.push_to_hub:
        return
    log = sys.stderr if sys.stderr.isatty() else directory / "push.log"
    otherwise = f"NOT PUSHED; later: {later(directory, config.push_to_hub)}"
    try:
        Beside("push", arguments(config, directory), log, say, None, otherwise).end()
    except KeyboardInterrupt:
        pass  # the training is complete
    except OSError as error:
        say(f"{otherwise} ({error})")


def arguments(config, directory: Path) -> list[str]:
    """Those of `python -m util push`."""
    private = "--private" if config.hub_private else "--no-private"
    return [str(directory.resolve()), config.push_to_hub, private]


def later(path: Path, name: str) -> str:
    """The command that pushes the same later."""
    return f"python -m util push {path} {name}"


# ---- sending --------------------------------------------------------------------------------------------------------


def push(path: Path, name: str, private: bool, training: Training, is_followed: bool = False) -> bool:
    """Send the model of a run directory or checkpoint and tell how that went. Whether it is on the hub now.

    `is_followed`: it is sent beside a running training; once that has ended, there is no further attempt.
    """
    try:
        with folder_of(path) as (run, model, step):
            where = in_attempts(lambda: send(run, model, step, name, private), training, is_followed)
    except Exception as error:
        advice = "training goes on" if is_followed else f"later: {later(path, name)}"
        training.tell(f"NOT PUSHED: {path.name} to {name} ({reason(error)}); {advice}")
        return False
    training.tell(f"pushed {path.name} to {where}")
    return True


def in_attempts(action: Callable[[], str], training: Training, is_followed: bool) -> str:
    """What `action` returns. After a failure it is tried again, with growing pauses, unless that cannot help."""
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            if attempt == ATTEMPTS or is_final(error) or (is_followed and training.has_ended):
                raise
        if is_followed:
            training.wait(pause)
        else:
            time.sleep(pause)
        pause *= 3
    raise AssertionError("the last attempt returns or raises")


def send(run: Path, model: Path, step: int | None, name: str, private: bool) -> str:
    """Send all files in one commit. The address of the repository, with how much it got and how long that took."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_session

    began = time.monotonic()
    get_session().timeout = PATIENCE  # the client would wait for ever
    api = HfApi()
    address = api.create_repo(name, private=private, exist_ok=True)
    message = f"Model of {run.name}" if step is None else f"Model of {run.name}, step {step}"
    # Beside an exported checkpoint: where this process is killed, both are removed together.
    with TemporaryDirectory(dir=None if step is None else model.parent) as temporary:
        folder = Path(temporary)
        stage(run, model, step, address.repo_id, folder)
        # Of a model in another number of files, pushed before, nothing may be left: it would be loaded with this one's.
        has_weights = any(folder.glob(WEIGHTS[0]))
        # These are one commit: huggingface_hub splits only folders of hundreds of files, or above 20 after a failure.
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(WEIGHTS) if has_weights else None,
        )
        size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{address} ({size / 2**20:,.1f} MiB, {time.monotonic() - began:.0f} s)"


@contextmanager
def folder_of(path: Path) -> Iterator[tuple[Path, Path, int | None]]:
    """(run directory, folder of the model, step) of a run or a checkpoint; the step of a finished run is None.

    A checkpoint is exported as a model, which is removed at the end. UserError: there is no model in `path`.
    """
    if not (path / "state.json").exists():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{path}: no model in it; name a finished run or a checkpoint")
        if not (path / SETTINGS).exists():
            raise UserError(f"{path}: there is no {SETTINGS} in it, which says how it was trained; name a run")
        yield path, path, None
        return
    from util.publish.export import export  # torch, which a push of a finished run does not need

    run = path.parent.parent
    shutil.rmtree(run / ".pushing", ignore_errors=True)
    try:
        export(path, run / ".pushing" / path.name)
        yield run, run / ".pushing" / path.name, step_of(path)
    finally:
        shutil.rmtree(run / ".pushing", ignore_errors=True)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error is about, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_final(error: BaseException) -> bool:
    """Whether another attempt cannot help: the hub refuses, or what is to be sent is not here."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    final = (UserError, FileNotFoundError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)
    if isinstance(error, final):
        return True
    status = status_of(error)
    return status is not None and 400 <= status < 500 and status not in MAY_PASS


def reason(error: BaseException) -> str:
    """What an error says, in one line of at most about 300 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:300] + " ..."


def follow(run: Path, name: str, private: bool, training: Training) -> None:
    """Send the newest checkpoint whenever there is a new one, until the training ends."""
    os.nice(5)  # the training goes first
    tried = None
    while not training.wait(1.0):
        newest = (complete_checkpoints(run) or [None])[-1]
        if newest and newest != tried:
            tried = newest
            push(newest, name, private, training, is_followed=True)


def parser() -> argparse.ArgumentParser:
    made = command_parser("push", __doc__)
    made.add_argument("run", type=Path, help="run directory, or one of its checkpoints")
    made.add_argument("name", help="repository on the hub: NAME, or OWNER/NAME")
    made.add_argument("--private", action=argparse.BooleanOptionalAction, default=True, help="if it has to be made")
    made.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)  # beside a training
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    found = invalid_hub_settings(HubSettings(push_to_hub=given.name))
    if found:
        raise UserError(found[0])
    training = Training()
    if given.follow:
        follow(given.run, given.name, given.private, training)
    elif not push(given.run.resolve(), given.name, given.private, training):
        os._exit(1)
