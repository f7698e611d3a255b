"""How much each answer is learned: `train` and `weight` of a message, `weight` of a sample, and `--train_on`.

A weight multiplies the cross-entropies of an answer's tokens and their share of the divisor, so that the loss stays a
mean. An answer of weight 0 is read as part of the conversation and not learned.
"""

import math
import re

from util.data.lines import DataError

OWN_KEYS = ("train", "weight")
# What other trainers call them: LLaMA-Factory loss_weight, ms-swift loss and loss_scale, axolotl training and train.
OTHER_KEYS = ("loss", "loss_weight", "loss_scale", "training", "trainable", "learn", "supervised")
LEARNING_KEYS = frozenset((*OWN_KEYS, *OTHER_KEYS))
NUMBER = re.compile(r"\d{1,7}(\.\d{1,7})?", re.ASCII)
LEAST, MOST = 1e-6, 1e6  # of a weight that is not 0; beyond them a float32 sum would lose the others


def read_weight(key: str, value: object, where: str) -> float:
    """The weight that a key's value says: that of a truth value is 0 or 1. DataError for what is no weight."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if key == "train" and value not in (True, False):
        raise DataError(f"{where}train must be true or false, is {value!r:.40}; a number is a 'weight'")
    is_number = isinstance(value, (bool, int, float)) and math.isfinite(value)
    if not is_number or not (value == 0 or LEAST <= value <= MOST):
        rule = f"must be a number, 0 or from {LEAST} to {MOST:,.0f}"
        raise DataError(f"{where}{key} {rule}, is {value!r:.40}; correct it or take it out")
    return float(value)


def weight_of(holder: dict, keys: tuple[str, ...], where: str) -> float:
    """The weight of an answer or a sample: the product of what these of its keys say, 1.0 where it has none."""
    weight = 1.0
    for key in keys:
        if holder.get(key) is not None:
            weight *= read_weight(key, holder[key], where)
    return weight


def of_answer(message: dict, sample_weight: float, where: str) -> dict:
    """{"weight": ...} for the checked form of an assistant message in this project's format; {} where it is 1."""
    weight = sample_weight * weight_of(message, OWN_KEYS, where)
    return {} if weight == 1 else {"weight": weight}


def plain_weight(holder: dict, where: str) -> dict:
    """The keys by which this project says what an answer of any trainer's data file says of its learning."""
    weight = weight_of(holder, tuple(sorted(LEARNING_KEYS)), where)
    if weight == 0:
        return {"train": False}
    return {} if weight == 1 else {"weight": weight}


def plain_sample_weight(entry: dict) -> dict:
    """The same of a sample as a whole. DataError where nothing of it is to be learned."""
    weight = plain_weight(entry, ": ")
    if "train" in weight:
        raise DataError(": nothing of it is to be learned; take the sample out")
    return weight


def check_learning(key: str, value: object, role: object, where: str) -> bool:
    """Whether a key of LEARNING_KEYS of a message (or of a sample, role "sample") has no effect on training.

    DataError where it asks for what is not done, or has a name that this project does not know.
    """
    if role in ("assistant", "sample"):
        weight = read_weight(key, value, where)
        if key in (OWN_KEYS if role == "assistant" else ("weight",)):
            return False
        if weight == 1:
            return True
        fix = f"'weight': {weight:g}" if weight else "'train': false"
        if role == "sample" and not weight:
            raise DataError(f"{where}{key} {value!r:.40}: nothing of it is to be learned; take the sample out")
        raise DataError(f"{where}{key} {value!r:.40} is written {fix} here, as python -m util convert does")
    if isinstance(value, (bool, int, float)) and value == 0:
        return True
    raise DataError(f"{where}{key} {value!r:.40}, but only assistant messages are learned; take the key out")


def check_any_learned(messages: list[dict], setting: str = "") -> None:
    """DataError where no answer of checked messages is learned; `setting`: what made it so, for the message."""
    if not any(message.get("weight", 1.0) for message in messages if message["role"] == "assistant"):
        raise DataError(f": none of its answers is to be learned{setting}; take the sample out")


def last_alone(messages: list[dict]) -> list[dict]:
    """Checked messages of which the last answer alone is learned. DataError where that one is not to be."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    messages = list(messages)
    for place in answers[:-1]:
        messages[place] = {**messages[place], "weight": 0.0}
    check_any_learned(messages, " with --train_on last")
    return messages
