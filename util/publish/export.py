"""A checkpoint as a model that plain transformers opens:

    python -m util export train_output/my_run/checkpoints/step_000100 my_model

Reads checkpoints of any number of ranks and any sharding, without a GPU.
"""

import argparse
import atexit
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, PreTrainedModel

from util import family
from util.adapters import lora, new_tokens
from util.adapters.new_tokens import NewTokens
from util.adapters.settings import LoraSettings
from util.checkpoint import TensorReader, read_state, verify
from util.command_line import UserError, command_parser
from util.model import choose_dtype, load_config, load_processor, set_budget
from util.publish.save_model import write_published
from util.run_folder import SETTINGS, read_settings
from util.tensors import trained_parameters
from util.vision import Budget

# Before a weight's name in a checkpoint: `model.` of all weights, then the name under which PackedLoss has the model
PREFIX = "model.model."


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a complete checkpoint of a run."""
    return (Path(path) / "state.json").is_file() and (Path(path) / ".metadata").is_file()


def export(checkpoint: Path, out: Path) -> None:
    """Write the model or adapter that the run would have saved if it had ended at this checkpoint into a new folder.

    The run's training_config.json goes with it: from that the test scripts know the base model and the pixel budget.
    UserError: there is no checkpoint, it is damaged or of another model, or the folder `out` is in use.
    """
    checkpoint = checkpoint.resolve()
    settings = settings_of(checkpoint)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a folder that does not")
    try:
        verify(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint}: damaged ({error}); export another checkpoint of that run") from None
    tokens = tokens_of(checkpoint, settings["model"])
    model = empty_model(settings["model"], tokens)
    dtype = choose_dtype(settings["dtype"], torch.device("cpu"))
    if settings.get("lora_rank"):  # the checkpoint holds the adapters alone, and they stay in the precision of training
        lora.add_adapters(model, SimpleNamespace(**{**vars(LoraSettings()), **settings}))  # a younger flag: its default
        dtype = torch.promote_types(dtype, torch.float32)
        if tokens:
            new_tokens.train_rows(model, tokens)
    weights = read_weights(checkpoint, dtype)
    wanted = {name: tuple(parameter.shape) for name, parameter in trained_parameters(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if different := sorted(set(wanted.items()) ^ set(found.items())):
        name, shape = different[0]
        raise UserError(f"{checkpoint}: these are not the weights of {settings['model']}, which it says it was trained "
                        f"from: {name} {shape} is in one of the two only")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(checkpoint.parent.parent / SETTINGS, out / SETTINGS)
    processor = load_processor(settings["model"])
    if tokens:
        new_tokens.add(processor.tokenizer, tokens.texts)
    set_budget(processor, Budget.of(settings, model.config.model_type))
    write_published(model, weights, processor, out)


def settings_of(checkpoint: Path) -> dict:
    """The settings of the run that a checkpoint lies in. UserError: there is no checkpoint, or no settings."""
    if not is_checkpoint(checkpoint):
        raise UserError(f"{checkpoint}: no checkpoint there (it is a folder checkpoints/step_... of a run)")
    run = checkpoint.resolve().parent.parent
    with suppress(OSError, ValueError):
        if settings := read_settings(run):
            return settings
    raise UserError(f"{checkpoint}: {run / SETTINGS} is not there or not readable; it says what model this is")


def tokens_of(checkpoint: Path, path: str) -> NewTokens | None:
    """The new tokens that a checkpoint names, for the model in `path`; None of a run without any."""
    entries = [new_tokens.Entry(text, str(checkpoint)) for text in read_state(checkpoint).get("new_tokens", [])]
    return new_tokens.plan(tuple(entries), path) if entries else None


def empty_model(path: str, tokens: NewTokens | None) -> PreTrainedModel:
    """The model as training has it, but without memory for weights. `path`: a model's folder or its name on the hub."""
    config = load_config(path)
    if tokens:
        config.text_config.vocab_size = tokens.rows
    model = family.bare_model(config)
    model.config.use_cache = False
    with suppress(OSError):  # not every model has a generation config
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def read_weights(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint in CPU memory and in `dtype`, by the names that the model's parameters have.

    Each is whole, on however many ranks it was saved.
    """
    reader = TensorReader(checkpoint)
    names = [key for key in reader.read_metadata().state_dict_metadata if key.startswith(PREFIX)]
    return {key.removeprefix(PREFIX): tensor.to(dtype) for key, tensor in reader.read_in_parts(names)}


def exported(path: str) -> str:
    """The folder of a model: `path` itself, or where that is a checkpoint, what is exported of it.

    That is removed when this process ends.
    """
    if not is_checkpoint(path):
        return path
    run = Path(path).resolve().parent.parent
    folder = Path(tempfile.mkdtemp(prefix=".exported_", dir=run))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    out = folder / Path(path).resolve().name  # the name under which answers and reports show it
    export(Path(path), out)
    return str(out)


def parser() -> argparse.ArgumentParser:
    made = command_parser("export", __doc__)
    made.add_argument("checkpoint", type=Path, help="a checkpoint: train_output/RUN/checkpoints/step_...")
    made.add_argument("out", type=Path, help="folder to write; must not exist")
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    export(given.checkpoint, given.out)
    print(f"{given.out}: as a finished run leaves it; try it: python test_on_trained_model.py {given.out}")
