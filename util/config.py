"""Every setting of a training run: one dataclass, and the command line made from it.

Each field says its default, its line in `--help`, its group there, its range, and whether a resumed run may change it.
Only the standard library is imported here, so that `--help` and a wrong flag answer at once.
"""

import re
from dataclasses import dataclass
from typing import Literal

from util.adapters.settings import ADAPTER_LEARNING_RATE, LoraSettings, TokenSettings, invalid_adapter_settings
from util.command_line import UserError, out_of_range, parse, setting
from util.cost.settings import MemorySettings, invalid_memory_settings
from util.data.settings import CacheSettings, FetchSettings, SampleSettings
from util.parallel.settings import ParallelSettings, invalid_parallel_settings
from util.publish.settings import (
    FinalSettings,
    HubSettings,
    TrackerSettings,
    invalid_final_settings,
    invalid_hub_settings,
    missing_trackers,
)
from util.results.settings import MetricSettings, invalid_metric_settings
from util.run_folder import own_settings

OFFICIAL_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
LEARNING_RATE = 1e-5


@dataclass
class Config(
    SampleSettings,
    FetchSettings,
    CacheSettings,
    MemorySettings,
    MetricSettings,
    LoraSettings,
    FinalSettings,
    TokenSettings,
    TrackerSettings,
    HubSettings,
    ParallelSettings,
):
    """The settings of a run: these, and those of what is optional, which stand in the settings.py of their rooms."""

    model: str | None = setting(
        None,
        "checkpoint directory, hub name, or a small model made here: tiny, tiny-qwen2.5-vl, tiny-qwen3-vl; default: "
        f"{OFFICIAL_MODEL} on a GPU, tiny without one",
        group="essentials",
    )
    data: list[str] = setting(
        ["train_data/data.json"], "training data, .json or .jsonl, one or several files", group="essentials"
    )
    output_dir: str | None = setting(
        None, "run directory; default: train_output/<date-time>", group="essentials", harmless=True
    )
    epochs: int = setting(3, "passes over the data", group="essentials", least=1)
    learning_rate: float = setting(
        None,  # where it is not given, __post_init__ puts a number
        "peak learning rate of the language model, and of what has none of its own; "
        f"default: {LEARNING_RATE:g}, with --lora_rank {ADAPTER_LEARNING_RATE:g}",
        group="essentials",
        least=0,
    )
    global_batch_size: int = setting(
        8,
        "samples per optimizer step: of the batch settings the only one that changes the result",
        group="essentials",
        least=1,
    )
    eval_data: list[str] = setting([], "held-out data for the evaluation loss", group="essentials", harmless=True)
    save_every: str | int = setting(
        "0",
        "steps between checkpoints, or minutes (`15min`); the last step makes one too; 0: only the final model",
        group="essentials",
        harmless=True,
    )
    resume: str = setting(
        "none",
        "none, auto (newest checkpoint of --output_dir or of the latest run), or the directory of a run or checkpoint; settings that are not given are then that run's own",
        group="essentials",
        harmless=True,
    )

    min_pixels: int | None = setting(
        None, "fewest pixels of an image or video frame; default: 3136 (image), 100352 (frame)", group="data", least=1
    )
    max_pixels: int | None = setting(
        None, "most pixels of an image or video frame; default: 1003520 (image), 602112 (frame)", group="data", least=1
    )
    video_fps: float = setting(2.0, "frames sampled per second of video", group="data", above=0)
    video_max_frames: int = setting(768, "most frames sampled from a video", group="data", least=4)
    video_max_tokens: int = setting(
        16384, "most tokens a video may cost; beats every other video setting", group="data", least=1
    )
    num_workers: int | None = setting(
        None, "data worker processes; default: up to 8 with a GPU, 1 without one", group="data", least=0, harmless=True
    )

    freeze: list[Literal["vision", "merger", "language_model"]] = setting(
        [], "parts that are not trained", group="model"
    )
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = setting(
        "auto", "precision of compute; auto: bfloat16 on a GPU that has it, else float32", group="model"
    )
    attention: Literal[
        "auto", "varlen", "sdpa", "flash_attn", "dense", "dense_flash", "cudnn", "flash_3", "flash_4"
    ] = setting(
        "auto",
        "packed attention; auto: the quickest kernel for each call on an NVIDIA GPU, else sdpa",
        group="model",
        harmless=True,
    )
    device: str = setting("auto", "cuda, cuda:1, cpu; auto: the GPU where there is one", group="model", harmless=True)

    max_steps: int | None = setting(
        None, "stop after this many optimizer steps (the schedule ends there too)", group="run", least=1
    )
    seed: int = setting(0, "seed of the data order and of every random choice", group="run")

    vision_learning_rate: float | None = setting(
        None, "peak learning rate of the vision tower", group="optimizer", least=0
    )
    merger_learning_rate: float | None = setting(
        None, "peak learning rate of the merger between tower and language model", group="optimizer", least=0
    )
    weight_decay: float = setting(
        0.01, "decoupled weight decay; norms and biases have none", group="optimizer", least=0
    )
    warmup_ratio: float = setting(
        0.03, "share of the steps in which the learning rate rises linearly", group="optimizer", least=0, most=1
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine",
        "how the learning rate falls after the warm-up; wsd: it stays, and falls linearly in the last --decay_ratio",
        group="optimizer",
    )
    decay_ratio: float = setting(
        0.1, "share of the steps in which it falls with --schedule wsd", group="optimizer", above=0, most=1
    )
    min_learning_rate_ratio: float = setting(
        0.0, "the learning rate falls to this share of its peak, that of each part", group="optimizer", least=0, below=1
    )
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0 does not clip", group="optimizer", least=0)
    optimizer: Literal["adamw", "adamw_8bit", "adamw_flash"] = setting(
        "adamw",
        "adamw_8bit: moments in 8 bits (needs a GPU and bitsandbytes); adamw_flash: weights in 24 bits, too (flashoptim)",
        group="optimizer",
    )

    micro_batch_size: int | None = setting(
        None,
        "at most this many samples per forward pass (memory only)",
        group="memory and speed",
        least=1,
        harmless=True,
    )
    max_tokens: int = setting(
        20480,
        "at most this many tokens per forward pass (memory only, unless --on_long_sample goes by it)",
        group="memory and speed",
        least=1,
        harmless=True,
    )
    activation_checkpointing: Literal["none", "selective", "full"] = setting(
        "none",
        "selective: of each layer keep matrix products and attention, and make the rest anew in the backward pass "
        "(less memory, hardly more compute; a compiled layer does that anyway); full: keep nothing but its input "
        "(least memory, a third more compute)",
        group="memory and speed",
        harmless=True,
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "torch.compile for the layers and the loss; auto: on an NVIDIA GPU",
        group="memory and speed",
        harmless=True,
    )
    check_memory: bool = setting(
        True,
        "stop before loading weights when the forecast does not fit the device",
        group="memory and speed",
        harmless=True,
    )

    eval_every: int = setting(
        100,
        "steps between evaluations, when there is --eval_data; 0: only at the end",
        group="evaluation",
        least=0,
        harmless=True,
    )
    eval_samples: int = setting(
        0,
        "held-out questions also answered and scored in each evaluation; 0: the loss alone",
        group="evaluation",
        least=0,
        harmless=True,
    )

    keep: int = setting(
        2,
        "newest checkpoints kept, and beside them the one with the lowest evaluation loss",
        group="saving",
        least=1,
        harmless=True,
    )
    resume_anyway: bool = setting(
        False,
        "go on from a checkpoint with settings that change what the rest of the run computes",
        group="saving",
        harmless=True,
    )
    check_disk: bool = setting(
        True,
        "stop before loading weights when the model, or one checkpoint, will not fit the disk",
        group="saving",
        harmless=True,
    )

    @property
    def leaves(self) -> str:
        """Which model the run leaves: "best" or "last"."""
        return self.final or ("best" if self.eval_data else "last")

    def __post_init__(self) -> None:
        if isinstance(self.compile, bool):  # as runs have it that were begun before there was `auto`
            self.compile = "on" if self.compile else "off"
        if self.learning_rate is None:
            self.learning_rate = ADAPTER_LEARNING_RATE if self.lora_rank else LEARNING_RATE
        found = [*out_of_range(self), *self.invalid_combinations()]
        found += invalid_memory_settings(self)
        found += invalid_metric_settings(self)
        found += invalid_adapter_settings(self)
        found += invalid_final_settings(self)
        found += missing_trackers(self)
        found += invalid_hub_settings(self)
        found += invalid_parallel_settings(self)
        if found:
            raise UserError("\n".join(found))

    def invalid_combinations(self) -> list[str]:
        """A message for each setting, or pair of settings, that cannot be although each is in its range."""
        found = []
        if not re.fullmatch(r"\d+(min)?", str(self.save_every)):
            found.append(f"--save_every {self.save_every}: must be a number of steps, or of minutes such as 15min")
        if not self.data:
            found.append("--data: name at least one file")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            found.append(f"--min_pixels {self.min_pixels} is above --max_pixels {self.max_pixels}")
        if self.micro_batch_size and self.micro_batch_size > self.global_batch_size:
            found.append(
                f"--micro_batch_size {self.micro_batch_size} is above --global_batch_size {self.global_batch_size}"
            )
        if {"vision", "merger", "language_model"} <= set(self.freeze):
            found.append("--freeze vision merger language_model: nothing is left to train")
        for part in ("vision", "merger"):
            if part in self.freeze and getattr(self, f"{part}_learning_rate") is not None:
                found.append(f"--{part}_learning_rate is given, but --freeze {part} trains none of it")
        found += self.invalid_schedule()
        if self.eval_samples and not self.eval_data:
            found.append(f"--eval_samples {self.eval_samples} needs --eval_data")
        on_cpu = self.device == "cpu"
        if self.attention not in ("auto", "sdpa") and (on_cpu or self.dtype in ("float32", "float64")):
            found.append(f"--attention {self.attention} needs a GPU and --dtype bfloat16; use --attention sdpa")
        if self.optimizer != "adamw" and on_cpu:
            found.append(f"--optimizer {self.optimizer} needs a GPU; use --optimizer adamw")
        return found

    def invalid_schedule(self) -> list[str]:
        """The same of the settings that say how the learning rate falls."""
        found = []
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            found.append(
                f"--warmup_ratio {self.warmup_ratio} and --decay_ratio {self.decay_ratio} are more than all steps together"
            )
        if self.schedule != "wsd" and self.decay_ratio != Config.decay_ratio:
            found.append(f"--decay_ratio {self.decay_ratio} needs --schedule wsd")
        if self.schedule == "constant" and self.min_learning_rate_ratio:
            found.append(
                f"--min_learning_rate_ratio {self.min_learning_rate_ratio} is given, but with --schedule constant the "
                "learning rate does not fall"
            )
        return found


def parse_arguments(description: str, arguments: list[str] | None = None) -> Config:
    """The command line of a training script; what it does not say of a run it goes on with is as that run has it."""
    return parse(Config, description, arguments, own_settings)
