"""Make a plain model of an adapter: the weights of its base model with the adapter added to them.

python -m util merge train_output/my_run merged              a run of --lora_rank, or any LoRA adapter of a family
python -m util merge train_output/my_run merged --dtype float32

The merged model opens in plain transformers, in vLLM, and as --model of a next training. The sum is computed in fp32.
An adapter that was trained over 4 bits (--quantize nf4) is added to the weights rounded to 4 bits, because these are
the weights it was trained with.
"""

import argparse
import shutil
from pathlib import Path

from util.command_line import UserError, command_parser
from util.run_folder import SETTINGS, read_settings


def parser() -> argparse.ArgumentParser:
    made = command_parser("merge", __doc__)
    made.add_argument("run", help="run directory or hub name of the adapter")
    made.add_argument("out", type=Path, help="folder to make; it must not hold a model")
    made.add_argument("--model", help="the base model; default: the one that the adapter names")
    made.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"),
                      help="of the weights written; auto: what the run computed in, else bfloat16")  # fmt: skip
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    merge_run(given.run, given.out, given.model, given.dtype)
    print(f"{given.out}: {given.run} merged; try it: python test_on_trained_model.py {given.out}")


def merge_run(run: str, out: Path, base: str | None = None, dtype: str = "auto") -> None:
    """Write the published format to `out`: weights, config, and the adapter's processor with its pixel budget.

    Raises UserError where `run` is no adapter, `out` is taken, or the base is not there.
    """
    import torch

    from util.adapters import lora
    from util.model import load_config, load_processor, load_weights
    from util.publish.save_model import write_published

    if not lora.is_adapter(run):
        raise UserError(f"{run}: no adapter there (adapter_config.json); a run with --lora_rank leaves one")
    if (out / "config.json").exists():
        raise UserError(f"{out}: holds a model already; name another folder")
    base = base or lora.base_of(run)
    load_config(base)
    if dtype == "auto":
        dtype = resolved_dtype(run)
    processor = load_processor(run if (Path(run) / "tokenizer_config.json").exists() else base)
    model = load_weights(base, getattr(torch, dtype), torch.device("cpu"))
    if lora.quantised_in_training(run):
        lora.round_to_nf4(model)
    lora.load_adapters(model, run)
    lora.merge(model)
    out.mkdir(parents=True, exist_ok=True)
    if (Path(run) / SETTINGS).exists():  # in it the test scripts find the base model and the pixel budget
        shutil.copyfile(Path(run) / SETTINGS, out / SETTINGS)
    write_published(model, dict(model.named_parameters()), processor, out)


def resolved_dtype(run: str) -> str:
    """The precision that a run computed in."""
    known = read_settings(run).get("dtype")
    return known if known in ("bfloat16", "float32") else "bfloat16"
