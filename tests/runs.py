"""Small runs of the training scripts, as several tests make and compare them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def settings(model: Path, directory: Path, **changes) -> dict:
    """Config fields of a run on the CPU in small pictures; the showcase, unless `changes` name other data."""
    common = {
        "model": str(model), "device": "cpu", "dtype": "float32", "epochs": 9, "global_batch_size": 8,
        "learning_rate": 1e-3, "max_pixels": 28 * 28 * 16, "min_pixels": 3136, "video_max_frames": 4,
        "num_workers": 0, "output_dir": str(directory),
    }  # fmt: skip
    return {**common, **changes}


def flags(config: dict) -> list[str]:
    """The same as words of a command line."""
    return [text for name, value in config.items() for text in (f"--{name}", str(value))]


def log(run: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def metrics(run: str | Path, key: str = "loss") -> list:
    """One value of each line that has it."""
    return [line[key] for line in log(run) if key in line]


def losses(run: str | Path) -> list[tuple[int, float]]:
    """(step, loss) of every step."""
    return [(line["step"], line["loss"]) for line in log(run) if "loss" in line]


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    """The final weights; of a run with adapters these."""
    plain, adapter = Path(run) / "model.safetensors", Path(run) / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else plain)


def same_run(run: Path, whole: Path) -> None:
    """Bit for bit the same weights, and every step once in the log with the same loss."""
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run) == losses(whole)
