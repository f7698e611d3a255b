"""Models on the Hugging Face hub (`--push_to_hub`), pushed by a running training or later:

    python -m util push train_output/my_run my-model                          # the run's final model
    python -m util push train_output/my_run/checkpoints/step_000100 my-model

What belongs to the model is sent in one commit, with a model card; paths and names of this machine are left out. A
process beside the training does it.
"""

import argparse
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from fnmatch import fnmatch
from pathlib import Path, PurePath

from util.command_line import UserError, command_parser
from util.config import Config
from util.publish.beside import Beside, Training
from util.publish.settings import HubSettings, TrackerSettings, invalid_hub_settings
from util.run_folder import METRICS, complete_checkpoints, read_metrics, read_settings, step_of

PATIENCE = float(
    os.environ.get("HUB_TIMEOUT", 60)
)  # seconds for one answer; between attempts a share or multiple of it
ATTEMPTS = 4  # each of which repeats most requests by itself
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
PUBLISHED = (*WEIGHTS, "adapter_model.safetensors", "adapter_config.json", "config.json", "generation_config.json",
             "tokenizer*.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
             "*processor_config.json", "chat_template.*", "training_config.json", "metrics.jsonl",
             "loss.png")  # fmt: skip
WORDS_OF_A_TOKENIZER = ("tokenizer.json", "vocab.json")  # in which a "/" is a token
PERSONAL = ("launched_by", "cache_dir", "resume", "output_dir")  # settings that say nothing about the model


def check_token(config, say: Callable[[str], None]) -> None:
    """Before training: UserError where the hub does not know who pushes; a hub that cannot be reached is only said."""
    if not config.push_to_hub:
        return
    found: list[BaseException | dict] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            found.append(HfApi().whoami())
        except Exception as error:
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE / 4)
    answer = found[0] if found else TimeoutError(f"no answer within {PATIENCE / 4:g} s")
    advice = "make a token that may write at https://huggingface.co/settings/tokens, then run: hf auth login"
    if isinstance(answer, BaseException):
        if type(answer).__name__ == "LocalTokenNotFoundError":
            raise UserError(f"--push_to_hub {config.push_to_hub}: there is no token of the hub here; {advice}")
        if status_of(answer) in (401, 403):
            raise UserError(f"--push_to_hub {config.push_to_hub}: the hub rejects the token that is here; {advice}")
        say(f"--push_to_hub {config.push_to_hub}: the hub cannot be asked now ({reason(answer)}); training goes on")
    elif answer.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub {config.push_to_hub}: the token that is here may only read; {advice}")


def start(config, directory: Path, say: Callable[[str], None]) -> list[Beside]:
    """With --push_every_save: a process that sends each checkpoint which is the newest when it gets to it."""
    if not config.push_every_save:
        return []
    return [Beside("push", [*arguments(config, directory), "--follow"], directory / "push.log", say, patience=0)]


def push_at_end(config, directory: Path, say: Callable[[str], None]) -> None:
    """Send the final model and wait for it. Where that fails it is said, and how to do it later."""
    shutil.rmtree(directory / ".pushing", ignore_errors=True)  # of the process above, which has been ended
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
    private = "--private" if config.hub_private else "--no-private"
    return [str(directory.resolve()), config.push_to_hub, private]


def later(path: Path, name: str) -> str:
    return f"python -m util push {path} {name}"


# ---- what is sent ---------------------------------------------------------------------------------------------------


def files_of(run: Path, model: Path, step: int | None, repository: str) -> dict[str, Path | bytes]:
    """What is sent to `repository`, by its name there: files as they are, or the bytes of what is made or changed.

    `run`: the run directory, for settings and metrics. `model`: the folder of the model, often the same. `step`: the
    last step that counts; None: all of them.
    """
    found: dict[str, Path | bytes] = {}
    for path in sorted([*run.iterdir(), *model.iterdir()]):
        wanted = path.parent == model or path.name == METRICS
        if wanted and path.is_file() and any(fnmatch(path.name, pattern) for pattern in PUBLISHED):
            found[path.name] = path
    for name, path in found.items():
        if name.endswith(".json") and name not in WORDS_OF_A_TOKENIZER:
            told = json.loads(path.read_text(encoding="utf-8"))
            public = publishable(told)
            if public != told:
                found[name] = (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()
    lines = metrics_until(run, step)
    if step is not None and METRICS in found:
        found[METRICS] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    settings = read_settings(run)
    found["README.md"] = model_card(settings, lines, "adapter_config.json" in found, repository).encode()
    return found


def metrics_until(run: Path, step: int | None) -> list[dict]:
    return [line for line in read_metrics(run) if step is None or line["step"] <= step]


def publishable(value, key: str = ""):
    """A JSON value without what says where it was made: of a path on this machine only the last name is left."""
    if isinstance(value, dict):
        return {name: publishable(inner, name) for name, inner in value.items() if name not in PERSONAL}
    if isinstance(value, list):
        return [publishable(inner, key) for inner in value]
    if isinstance(value, str) and value and "\n" not in value:
        if key in ("model", "base_model_name_or_path") and (name := name_on_hub(value)):
            return name
        if key in ("data", "eval_data") or re.match(r"/\w|~|\.\.?/|[A-Za-z]:\\|file:/", value) or os.path.isdir(value):
            return PurePath(value.replace("\\", "/")).name
    return value


def name_on_hub(model: str) -> str | None:
    """OWNER/NAME of a model, also of one that lies in the hub's cache here; None for any other folder."""
    if cached := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", model):
        return "/".join(cached.groups())
    return model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists() else None


# ---- the model card -------------------------------------------------------------------------------------------------


def model_card(settings: dict, lines: list[dict], is_adapter: bool, repository: str) -> str:
    """README.md of a pushed model. `settings`: training_config.json; `lines`: of metrics.jsonl."""
    base = name_on_hub(settings["model"])
    base_name = base or PurePath(settings["model"]).name
    steps = [line for line in lines if line.get("loss") is not None]
    what = f"{'A LoRA adapter for' if is_adapter else 'All weights of'} {base_name}"
    what += f" (not trained: {', '.join(settings['freeze'])})" if settings.get("freeze") else ""
    if steps:
        what += f", after {steps[-1]['step']:,} steps of training on {sum(line['samples'] for line in steps):,} samples"
    front = {
        "base_model": base,
        "base_model_relation": ("adapter" if is_adapter else "finetune") if base else None,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["qwen2_vl", "lora" if is_adapter else "fine-tuned"],
    }
    own = differing(settings)
    return "\n".join([
        "---", *(line for key, value in front.items() if value for line in yaml(key, value)), "---", "",
        f"# {base_name}, fine-tuned on images and videos", "",
        f"{what}. Precision of compute: {settings['dtype']}.", "",
        "## Use", "", "```python", *loading(base or "path/to/" + base_name, is_adapter, repository), "```", "",
        "The processor holds the pixel budget of the training.", "",
        "## Data", "", *table(["file", "size", "used for"], data_rows(settings)), "",
        "## Scores", "", *scores(steps, lines), "",
        "## Settings", "", "Those that differ from the defaults; `training_config.json` has all of them.", "",
        *table(["setting", "value"], [[key, f"`{shown(value)}`"] for key, value in own.items()]), "",
        "To train it again:", "", "```bash",
        " ".join(["python finetune.py", *(flag(key, value) for key, value in own.items())]), "```", "",
        "## Versions", "", *table(["package", "version"], list(settings.get("versions", {}).items())), "",
    ])  # fmt: skip


def yaml(key: str, value: str | list[str]) -> list[str]:
    return [f"{key}: {value}"] if isinstance(value, str) else [f"{key}:", *(f"- {item}" for item in value)]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in lines] if rows else ["None."]


def loading(base: str, is_adapter: bool, repository: str) -> list[str]:
    """The lines of Python that open the model."""
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
    opened = base if is_adapter else repository
    lines.append(f'model = AutoModelForImageTextToText.from_pretrained("{opened}", dtype="auto")')
    if is_adapter:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'model = PeftModel.from_pretrained(model, "{repository}")')
    return [*lines, f'processor = AutoProcessor.from_pretrained("{repository}")']


def data_rows(settings: dict) -> list[list[str]]:
    """Name, size and use of each data file; its folder is nobody's business."""
    rows = []
    for use, key in (("training", "data"), ("evaluation", "eval_data")):
        for file in settings.get(key, []):
            path = Path(re.sub(r"\*[\d.]+$", "", file))
            size = f"{path.stat().st_size:,} bytes" if path.is_file() else "-"
            rows.append([f"`{publishable(file, key)}`", size, use])
    return rows


def scores(steps: list[dict], lines: list[dict]) -> list[str]:
    """Loss of training, and what was evaluated: last, and where the evaluation loss was lowest."""
    text = [f"Loss of the last training step, per supervised token: {shown(steps[-1]['loss'])}."] if steps else []
    evaluated = [line for line in lines if line.get("eval_loss") is not None]
    if evaluated:
        best = min(evaluated, key=lambda line: line["eval_loss"])
        columns = list({line["step"]: line for line in (best, evaluated[-1])}.values())
        keys = [key for key in evaluated[-1] if key.startswith("eval_")]
        rows = [
            [key.removeprefix("eval_").replace("_", " "), *(shown(line.get(key)) for line in columns)] for key in keys
        ]
        heads = [f"step {line['step']}" + " (lowest loss)" * (line is best) for line in columns]
        text += ["", "On held-out data:", "", *table(["", *heads], rows)]
    return text or ["None."]


def differing(settings: dict) -> dict:
    """The settings that are not the defaults, fit to be published."""
    found, elsewhere = {}, {item.name for item in (*fields(TrackerSettings), *fields(HubSettings))}
    for item in fields(Config):
        default = item.default if item.default is not MISSING else item.default_factory()
        if item.name in settings and settings[item.name] != default and item.name not in {*PERSONAL, *elsewhere}:
            found[item.name] = publishable(settings[item.name], item.name)
    return found


def shown(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flag(key: str, value) -> str:
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{key}"
    return f"--{key} {value if isinstance(value, float) else shown(value)}"


# ---- sending --------------------------------------------------------------------------------------------------------


def push(path: Path, name: str, private: bool, training: Training, is_followed: bool = False) -> bool:
    """Send the model of a run directory or checkpoint, in several attempts. Whether it is there now; both are told."""
    try:
        with folder_of(path) as (run, model, step):
            for attempt in range(ATTEMPTS):
                try:
                    began = time.monotonic()
                    url, size = send(run, model, step, name, private)
                    training.tell(
                        f"pushed {path.name} to {url} ({size / 2**20:,.1f} MiB, {time.monotonic() - began:.0f} s)"
                    )
                    return True
                except Exception as error:
                    if attempt == ATTEMPTS - 1 or is_final(error) or (training.has_ended and is_followed):
                        raise
                    training.wait(PATIENCE / 6 * 3**attempt) if is_followed else time.sleep(PATIENCE / 6 * 3**attempt)
    except Exception as error:
        text = f"NOT PUSHED: {path.name} to {name} ({reason(error)})"
        training.tell(text + ("; training goes on" if is_followed else f"; later: {later(path, name)}"))
        return False


def send(run: Path, model: Path, step: int | None, name: str, private: bool) -> tuple[str, int]:
    """One commit with all files. The address of the repository, and how many bytes it has of them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import get_session

    get_session().timeout = PATIENCE  # the client would wait for ever
    api = HfApi()
    address = api.create_repo(name, private=private, exist_ok=True)
    repository = address.repo_id
    files = files_of(run, model, step, repository)
    operations = [CommitOperationAdd(file_name, content) for file_name, content in files.items()]
    size = sum(operation.upload_info.size for operation in operations)
    # Of a model in another number of files, pushed before, nothing may be left: it would be loaded with this one's.
    if any(fnmatch(file_name, WEIGHTS[0]) for file_name in files):
        there = api.list_repo_files(repository)
        left = [old for old in there if old not in files and any(fnmatch(old, pattern) for pattern in WEIGHTS)]
        operations += [CommitOperationDelete(old) for old in sorted(left)]
    message = f"Model of {run.name}" + (f", step {step}" if step is not None else "")
    api.create_commit(repository, operations, commit_message=message)
    return str(address), size


@contextmanager
def folder_of(path: Path) -> Iterator[tuple[Path, Path, int | None]]:
    """(run directory, folder of the model, step) of a run or checkpoint; the latter is exported for as long."""
    if not (path / "state.json").exists():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{path}: no model in it; name a finished run or a checkpoint")
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
    """Whether another attempt cannot help: the hub, or a file here, says no."""
    status = status_of(error)
    refused = status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429)
    named = type(error).__name__ in ("LocalTokenNotFoundError", "OfflineModeIsEnabled", "HFValidationError")
    return refused or named or isinstance(error, UserError | FileNotFoundError)


def reason(error: BaseException) -> str:
    """One line of what an error says."""
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
