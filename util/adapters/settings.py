"""The flags of this room: which adapters are trained, over which weights, and which tokens are new.

Only the standard library is imported here, because settings are part of the command line.
"""

from dataclasses import dataclass
from typing import Literal

from util.command_line import setting

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The linear layers of the tower's blocks and of the mergers, as the ends of their names within these. No family has all
# of them: an MLP's are named as in Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
VISION_TARGETS = {
    "vision": [
        "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        "mlp.linear_fc1", "mlp.linear_fc2",
    ],
    "merger": ["merger.mlp.0", "merger.mlp.2", "linear_fc1", "linear_fc2"],
}  # fmt: skip

# Adapters begin at zero and are few: what moves weights well leaves them nearly where they began. Measured by
# benchmarks/lora_gain.py.
ADAPTER_LEARNING_RATE = 1e-4


@dataclass
class TokenSettings:
    """What the vocabulary gets beside the model's own tokens."""

    new_tokens: str | None = setting(
        None,
        "file of texts that become one token each, one a line: actions, classes, coordinates; their rows of embedding "
        "and head are trained with the weights, or alone beside adapters",
        group="model",
    )


@dataclass
class LoraSettings:
    """Adapters in place of the weights."""

    lora_rank: int = setting(
        0,
        "train adapters of this rank and no weight of the model (LoRA); 0: train the weights",
        group="adapters",
        least=0,
    )
    lora_alpha: int = setting(
        16, "what adapters add is multiplied by lora_alpha / lora_rank", group="adapters", least=1
    )
    lora_rslora: bool = setting(
        False, "multiply by lora_alpha / sqrt(lora_rank) instead, for large ranks (rsLoRA)", group="adapters"
    )
    lora_dropout: float = setting(
        0.0, "share of an adapter's inputs that is set to zero while training", group="adapters", least=0, below=1
    )
    lora_targets: list[Target] = setting(
        list(Target.__args__), "linear layers of the language model that get adapters", group="adapters"
    )
    lora_vision: bool = setting(
        False, "adapters in the linear layers of the vision tower and the merger, too", group="adapters"
    )
    lora_dora: bool = setting(False, "DoRA: adapt direction and length of the weights apart", group="adapters")
    quantize: Literal["none", "nf4"] = setting(
        "none", "nf4: QLoRA, the language model in 4 bits under the adapters", group="adapters"
    )


def invalid_adapter_settings(config) -> list[str]:
    """A message for each combination of adapter settings of a Config that makes no sense."""
    found = []
    if config.new_tokens and "language_model" in config.freeze:
        found.append(
            "--new_tokens and --freeze language_model: their rows would not be trained; leave one of the two out"
        )
    if not config.lora_rank:
        given = [name for name in ("lora_vision", "lora_dora", "lora_rslora") if getattr(config, name)]
        if config.quantize != "none":
            given.append("quantize nf4")
        return [*found, *(f"--{name} needs --lora_rank" for name in given)]
    adapted = targets(config)
    if not any(adapted.values()):
        found.append("--lora_rank: no layer is left to get adapters; see --lora_targets, --lora_vision and --freeze")
    for part in ("vision", "merger"):
        if getattr(config, f"{part}_learning_rate") is not None and not adapted[part]:
            found.append(f"--{part}_learning_rate is given, but no adapter is there: see --lora_vision and --freeze")
    if config.quantize == "nf4" and config.dtype == "float64":
        found.append("--quantize nf4 computes in bfloat16 or float32, not in float64")
    return found


def targets(config) -> dict[str, list[str]]:
    """The linear layers that get adapters, by part, as the ends of their names within it: those that the model has."""
    chosen = {
        "vision": VISION_TARGETS["vision"] if config.lora_vision else [],
        "merger": VISION_TARGETS["merger"] if config.lora_vision else [],
        "language_model": list(dict.fromkeys(config.lora_targets)),
    }
    for part in config.freeze:
        chosen[part] = []
    return chosen


def untrained_parts(config) -> list[str]:
    """The parts in which nothing is trained, neither weights nor adapters."""
    return [part for part, names in targets(config).items() if not names] if config.lora_rank else list(config.freeze)
