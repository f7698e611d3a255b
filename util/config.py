"""Every setting of a training run: one dataclass, and the command line made from it.

Only the standard library is imported here, so that `--help` and a wrong flag answer at once.
"""

import re
from dataclasses import dataclass
from typing import Literal

from util import hub, lora, trackers
from util.bad_samples import SampleSettings
from util.cache import CacheSettings
from util.command_line import UserError, parse, run_command, run_training, setting
from util.fetch import FetchSettings
from util.going_on import own_settings
from util.hub import HubSettings
from util.lora import LoraSettings
from util.metrics import MetricSettings
from util.trackers import TrackerSettings

__all__ = ["OFFICIAL_MODEL", "Config", "UserError", "parse_arguments", "run_command", "run_training"]

OFFICIAL_MODEL = "Qwen/Qwen2-VL-2B-Instruct"


@dataclass
class Config(FetchSettings, CacheSettings, SampleSettings, MetricSettings, LoraSettings, TrackerSettings, HubSettings):
    # fmt: off
    model: str | None = setting(None, f"checkpoint directory, hub name or `tiny`; default: {OFFICIAL_MODEL} on a GPU, tiny without one")
    data: list[str] = setting(["train_data/data.json"], "training data, .json or .jsonl, one or several files")
    output_dir: str | None = setting(None, "run directory; default: train_output/<date-time>")
    epochs: int = setting(3, "passes over the data")
    max_steps: int | None = setting(None, "stop after this many optimizer steps (the schedule ends there too)")
    global_batch_size: int = setting(8, "samples per optimizer step: the only dial that changes the mathematics")
    micro_batch_size: int | None = setting(None, "at most this many samples per forward pass (memory only)")
    max_tokens: int = setting(20480, "at most this many tokens per forward pass (memory only)")
    learning_rate: float = setting(1e-5, "peak learning rate of the language model, and of what has none of its own")
    vision_learning_rate: float | None = setting(None, "peak learning rate of the vision tower")
    merger_learning_rate: float | None = setting(None, "peak learning rate of the merger between tower and language model")
    weight_decay: float = setting(0.01, "decoupled weight decay; norms and biases have none")
    warmup_ratio: float = setting(0.03, "share of the steps in which the learning rate rises linearly")
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "how the learning rate falls after the warm-up")
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0 does not clip")
    freeze: list[Literal["vision", "merger", "language_model"]] = setting([], "parts that are not trained")
    min_pixels: int | None = setting(None, "fewest pixels of an image or video frame; default: 3136 (image), 100352 (frame)")
    max_pixels: int | None = setting(None, "most pixels of an image or video frame; default: 1003520 (image), 602112 (frame)")
    video_fps: float = setting(2.0, "frames sampled per second of video")
    video_max_frames: int = setting(768, "most frames sampled from a video")
    video_max_tokens: int = setting(16384, "most tokens a video may cost; beats every other video setting")
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = setting("auto", "precision of compute; auto: bfloat16 on a GPU that has it, else float32")
    device: str = setting("auto", "cuda, cuda:1, cpu; auto: the GPU where there is one")
    attention: Literal["auto", "varlen", "sdpa", "flash_attn"] = setting("auto", "packed attention; auto: varlen on a GPU, sdpa without one")
    activation_checkpointing: Literal["none", "full"] = setting("none", "full: recompute each layer in the backward pass (less memory, a third more compute)")
    optimizer: Literal["adamw", "adamw_8bit"] = setting("adamw", "adamw_8bit: moments in 8 bits (needs a GPU and bitsandbytes)")
    compile: bool = setting(False, "torch.compile each layer")
    check_memory: bool = setting(True, "stop before loading weights when the forecast does not fit the device")
    check_disk: bool = setting(True, "stop before loading weights when the model, or one checkpoint, will not fit the disk")
    eval_data: list[str] = setting([], "held-out data for the evaluation loss")
    eval_every: int = setting(100, "steps between evaluations, when there is --eval_data; 0: only at the end")
    eval_samples: int = setting(0, "held-out questions also answered and scored in each evaluation; 0: the loss alone")
    save_every: str | int = setting("0", "steps between checkpoints, or minutes (`15min`); the last step makes one too; 0: only the final model")
    keep: int = setting(2, "newest checkpoints kept, and beside them the one with the lowest evaluation loss")
    sharding: Literal["full", "gradients", "optimizer", "none"] = setting("full", "several GPUs: what is sharded, ZeRO 3, 2, 1 or plain data parallelism")
    shard_group_size: int | None = setting(None, "several GPUs: shard inside groups of this many, replicate between; default: over all")
    resume: str = setting("none", "none, auto (newest checkpoint of --output_dir or of the latest run), or the directory of a run or checkpoint; settings that are not given are then that run's own")
    resume_anyway: bool = setting(False, "go on from a checkpoint with settings that change what the rest of the run computes")
    seed: int = setting(0, "seed of the data order and of every random choice")
    num_workers: int | None = setting(None, "data worker processes; default: up to 8 with a GPU, 1 without one")
    # fmt: on

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise UserError("\n".join(problems))

    def problems(self) -> list[str]:
        """Every setting that cannot be, each with the rule it breaks."""
        found = []
        at_least_one = ("fetch_concurrency", "epochs", "max_steps", "global_batch_size", "micro_batch_size", "max_tokens", "min_pixels",
                        "max_pixels", "video_max_tokens", "keep", "shard_group_size")  # fmt: skip
        not_negative = ("fetch_retries", "learning_rate", "vision_learning_rate", "merger_learning_rate", "weight_decay",
                        "max_grad_norm", "eval_every", "eval_samples", "num_workers")  # fmt: skip
        for names, least in ((at_least_one, 1), (not_negative, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= least:
                    found.append(f"--{name} {value}: must be at least {least}")
        if not re.fullmatch(r"\d+(min)?", str(self.save_every)):
            found.append(f"--save_every {self.save_every}: must be a number of steps, or of minutes such as 15min")
        if not self.data:
            found.append("--data: name at least one file")
        if not 0 <= self.warmup_ratio <= 1:
            found.append(f"--warmup_ratio {self.warmup_ratio}: must be between 0 and 1")
        if not self.video_fps > 0:
            found.append(f"--video_fps {self.video_fps}: must be above 0")
        for name in ("fetch_timeout", "cache_max_gib"):
            if not getattr(self, name) > 0:
                found.append(f"--{name} {getattr(self, name)}: must be above 0")
        if self.video_max_frames < 4:
            found.append(f"--video_max_frames {self.video_max_frames}: must be at least 4")
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
        if not self.eval_metrics:
            found.append("--eval_metrics: name at least one")
        if self.eval_samples and not self.eval_data:
            found.append(f"--eval_samples {self.eval_samples} needs --eval_data")
        on_cpu = self.device == "cpu"
        if self.attention in ("varlen", "flash_attn") and (on_cpu or self.dtype in ("float32", "float64")):
            found.append(f"--attention {self.attention} needs a GPU and --dtype bfloat16; use --attention sdpa")
        if self.optimizer == "adamw_8bit" and on_cpu:
            found.append("--optimizer adamw_8bit needs a GPU; use --optimizer adamw")
        return found + lora.problems(self) + trackers.problems(self) + hub.problems(self)


def parse_arguments(description: str, arguments: list[str] | None = None) -> Config:
    """The command line of a training script; what it does not say of a run it goes on with is as that run has it."""
    return parse(Config, description, arguments, own_settings)
