"""How the layers are cut into the stages of a pipeline, so that each has about as much to do: by the floating-point
operations of the samples that are trained on.
"""

from dataclasses import dataclass

import torch

from util.command_line import UserError
from util.config import Config
from util.cost import flops, layouts, memory
from util.cost.sizes import Sizes
from util.steps import Steps

UNEVEN = 1.1  # the first stage has so many times its equal part


@dataclass(frozen=True)
class Stage:
    """The first stage has the vision tower, the merger and the embedding, too; the last one the norm and the head."""

    layers: range  # of the language model
    share: float  # of all floating-point operations


def stages_of(model_config, config: Config, sizes: Sizes) -> list[Stage]:
    """The stages of `--pipeline_parallel_size`, the first one first. The same on every rank.

    Raises UserError where there are too few layers.
    """
    stages = config.pipeline_parallel_size
    depth = model_config.text_config.num_hidden_layers
    refuse_too_few_layers(model_config, stages)
    work = flops.epoch_work(model_config, sizes, sizes.usable, config)
    a_layer = work["language_model"] / depth
    before = work["vision"] + work["merger"]
    of_first = layouts.layers_with_the_tower(model_config)
    counts = layouts.cut_stages(depth, stages, before, a_layer, work["head"], of_first)
    loads = [count * a_layer for count in counts]
    loads[0] += before
    loads[-1] += work["head"]
    found = []
    begin = 0
    for count, load in zip(counts, loads, strict=True):
        found.append(Stage(range(begin, begin + count), load / (sum(loads) or 1.0)))
        begin += count
    return found


def cut_of(model_config, config: Config, sizes: Sizes) -> tuple[int, ...]:
    """How many layers each stage has."""
    if config.pipeline_parallel_size == 1:
        return (model_config.text_config.num_hidden_layers,)
    return tuple(len(stage.layers) for stage in stages_of(model_config, config, sizes))


def forecast(
    model_config,
    counts: dict,
    config: Config,
    dtype: torch.dtype,
    steps: Steps,
    shards: int,
    device: torch.device,
    cut: tuple[int, ...] | None = None,
) -> memory.Forecast:
    """Bytes by part for a run's steps; where there are several stages, on a rank of the one that needs most.

    `cut`: how many layers each stage has (`cut_of`), for who asks more than once: it takes the work of all samples.
    """
    survey = steps.survey
    if config.pipeline_parallel_size == 1:
        return memory.forecast(
            model_config, counts, config, dtype, survey.heaviest, shards, survey.most, device, survey.largest_picture
        )
    shape = layouts.Shape(
        steps.dealing.ranks, config.pipeline_parallel_size, config.context_parallel_size, config.tensor_parallel_size,
        config.sharding, shards, config.activation_checkpointing, survey.most, config.sequence_parallel,
    )  # fmt: skip
    cut = cut or cut_of(model_config, config, steps.sizes)
    loads, largest = survey.heaviest, survey.largest_picture
    return layouts.run_forecast(model_config, config, dtype, shape, cut, loads, device, largest)[1]


def refuse_too_few_layers(model_config, stages: int) -> None:
    depth = model_config.text_config.num_hidden_layers
    of_first = layouts.layers_with_the_tower(model_config)
    most = max(1, depth - of_first + 1)
    if stages <= most:
        return
    needed = "each stage needs one"
    if of_first > 1:
        needed = (
            f"the first stage needs {of_first}, since the tower's visual tokens are added after each of these "
            "(deepstack), and every other stage one"
        )
    raise UserError(
        f"--pipeline_parallel_size {stages}: the language model has {depth} layers, and {needed}; give at most "
        f"--pipeline_parallel_size {most}"
    )


def bubble_of(stages: int, rows: float) -> float:
    """The share of a step in which a stage waits for the first row to come or the last one to go (arXiv 2104.04473,
    section 2.2, there over the time that is worked)."""
    return (stages - 1) / (rows + stages - 1)


def in_words(model_config, config: Config, sizes: Sizes, steps: Steps) -> dict[str, str]:
    """Lines of the plan: which stage has what, and what of the ranks' time is lost by that; {} of one stage."""
    if config.pipeline_parallel_size == 1:
        return {}
    stages = stages_of(model_config, config, sizes)
    rows = steps.survey.passes / max(1, len(steps))
    facts = [waiting_in_words(stages, rows)]
    if config.sharding in ("full", "gradients"):
        facts.append(f"--sharding {config.sharding} gathers weights for every row, --sharding optimizer once a step")
    facts += what_cannot_pay(model_config, config, sizes, stages)
    return {"stages": stages_in_words(stages), "pipeline": "; ".join(facts)}


def stages_in_words(stages: list[Stage]) -> str:
    """`0: tower, merger, embedding, layers 0 to 2 (51 %); 1: layers 3 to 8, norm, head (49 %)`."""
    parts = []
    for number, stage in enumerate(stages):
        first, last = stage.layers[0], stage.layers[-1]
        parts_of_stage = [f"layers {first} to {last}" if first < last else f"layer {first}"]
        if number == 0:
            parts_of_stage = ["tower, merger, embedding", *parts_of_stage]
        if number == len(stages) - 1:
            parts_of_stage += ["norm, head"]
        parts.append(f"{number}: {', '.join(parts_of_stage)} ({100 * stage.share:.0f} %)")
    return "; ".join(parts)


def waiting_in_words(stages: list[Stage], rows: float) -> str:
    """The bubble and the imbalance, and what both leave. `rows`: of a step, on average."""
    others = len(stages) - 1
    bubble = bubble_of(len(stages), rows)
    slowest = max(stage.share for stage in stages) * len(stages)
    return (
        f"{100 * bubble:.0f} % of a step is its bubble, {others} / ({rows:.1f} rows + {others}); the slowest stage has "
        f"{slowest:.2f} times the mean; so at most {len(stages) * (1 - bubble) / slowest:.1f} times as fast as one rank"
    )


def what_cannot_pay(model_config, config: Config, sizes: Sizes, stages: list[Stage]) -> list[str]:
    """A text where the vision tower, which is not cut, is more than its stage's part: how many layers it is worth."""
    is_even = stages[0].share * len(stages) < UNEVEN
    # what is more than its part beside a layer that could be another stage's is this layer, which cannot be cut, either
    if is_even or len(stages[0].layers) > layouts.layers_with_the_tower(model_config):
        return []
    work = flops.epoch_work(model_config, sizes, sizes.usable, config)
    depth = model_config.text_config.num_hidden_layers
    worth = (work["vision"] + work["merger"]) / (work["language_model"] / depth)
    most = 1 / stages[0].share
    return [
        f"SO MANY STAGES CANNOT PAY: on this data tower and merger, which are not cut, are worth {worth:.0f} of the "
        f"{depth} layers, so that no number of stages is more than {most:.1f} times as fast as one. Give each rank "
        "samples of its own (--pipeline_parallel_size 1), or take smaller pictures (--max_pixels)"
    ]
