"""Trainings on a GPU that is not there, one after the other in this process (started by tests/test_phantom.py).

    run tests/phantom_runs.py runs.json      [[script, settings, step at which to resume or null], ...]
    run tests/phantom_runs.py step model_config.json '{"lora_rank": 8}'     one real-size step
    run tests/phantom_runs.py graphs model_config.json '{}'                 compiled: batches of many shapes

Prints one JSON line for each: what was counted in its steps. Every number that the device holds is meaningless there, so
what would be decided by one is decided here: answers end after a few tokens, and each is generated.
"""

import json
import random
import resource
import shutil
import sys
from importlib import import_module
from pathlib import Path

import phantom
import torch
from transformers import AutoConfig, GenerationMixin

from util import compilation, log, optimizer
from util.collator import Collator
from util.config import Config
from util.conversation import Encoded
from util.cost import memory
from util.dataset import Sample
from util.family import FAMILIES, new_model
from util.loss import PackedLoss
from util.model import choose_device, choose_dtype, prepare_model
from util.optimizer import build_optimizer
from util.results import evaluate
from util.vision import Grid, Medium

TOKENS_OF_AN_ANSWER = 3
counted: list[dict] = []  # of each step: {"passes": ..., "after": ...}


def bound_generation() -> None:
    """Greedy decoding would go on until the device says that an end token was found."""
    left = {"tokens": TOKENS_OF_AN_ANSWER}

    def goes_on(self, *unused, **also_unused) -> bool:
        left["tokens"] = (left["tokens"] or TOKENS_OF_AN_ANSWER + 1) - 1
        return left["tokens"] > 0

    GenerationMixin._has_unfinished_sequences = goes_on
    score = PackedLoss.score

    def never_likeliest(self, batch, visual=None):
        found = score(self, batch, visual)
        if visual is not None:  # Answerer.read: no answer is taken from the reference, all are generated
            found = found.cpu()
            found[1] = 0
        return found

    PackedLoss.score = never_likeliest
    # tokens from the device are any numbers; the tokenizer takes small ones
    evaluate.Answerer.text = lambda self, tokens: " ".join(str(token) for token in tokens)


def count_in_steps() -> None:
    """Count what CUDA is asked for in the passes of each step, and from clipping to the step's line in the log."""
    forward, clip, log_step = PackedLoss.forward, optimizer.clip_gradient, log.Run.log_step

    def begin(self, *batch, **changes):
        if torch.is_grad_enabled() and not begun:
            begun.append(True)
            phantom.reset()
        return forward(self, *batch, **changes)

    def end_of_passes(*arguments):
        counted.append({"passes": phantom.stats()})
        phantom.reset()
        return clip(*arguments)

    def end_of_step(*arguments):
        counted[-1]["after"] = phantom.stats()
        begun.clear()
        return log_step(*arguments)

    begun: list[bool] = []
    PackedLoss.forward, optimizer.clip_gradient, log.Run.log_step = begin, end_of_passes, end_of_step


def train(script: str, settings: dict, resume_at: int | None) -> dict:
    """A training; where `resume_at` is given, then again from its checkpoint of that step on."""
    counted.clear()
    module = import_module(script)
    run = Path(module.train(Config(**settings)))
    first, resumed = len(counted), 0
    if resume_at:
        for later in (run / "checkpoints").glob("step_*"):
            if int(later.name.removeprefix("step_")) > resume_at:
                shutil.rmtree(later)
        module.train(Config(**{**settings, "resume": "auto"}))
        resumed = len(counted) - first
    return {"steps": first, "resumed": resumed, "counted": counted, "files": sorted(p.name for p in run.iterdir())}


def real_size_step(config_file: str, settings: dict) -> dict:
    """Three steps of a published size on one image and text; its weights are memory that nobody touched."""
    device, config = choose_device("cuda"), Config(**settings)
    dtype, model_config = choose_dtype(config.dtype, device), AutoConfig.from_pretrained(Path(config_file).parent)
    grid = Grid(1, 64, 64)
    text = Encoded([5] * (4096 - grid.tokens + 1), [False] * 2048 + [True] * (2049 - grid.tokens), [10])
    load = (4096, grid.patches, sum(text.supervised))
    counts = memory.count_parameters(model_config, config)
    forecast = memory.forecast(model_config, counts, config, dtype, [load], device=device)
    free = memory.free_bytes(device)
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    with torch.device("meta"):
        bare = new_model(model_config).to(kept)
    bare = bare.to_empty(device=device)
    bare.tie_weights()  # which giving them memory has undone
    model = prepare_model(bare, config, processor_of_pixels(), device)
    trained = build_optimizer(model, config)
    patches = blank_patches(grid, False, model_config.model_type)
    batch = Collator(model_config.model_type)(
        [Sample(text, [Medium(patches, grid, is_video=False)], "one image")]
    ).pin_memory()
    for _ in range(3):
        phantom.reset()
        loss = model(batch.to(device))
        loss.backward()
        passes = phantom.stats()
        phantom.reset()
        read = [optimizer.clip_gradient(model, trained, 1.0).item(), loss.item()]
        trained.step()
        trained.zero_grad()
        counted.append({"passes": passes, "after": phantom.stats(), "read": len(read)})
    peak = {"peak": memory.peak_bytes(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {"counted": counted, "forecast": sum(forecast.values()), "free": free, **peak}


def graphs_of_many_shapes(config_file: str, settings: dict) -> dict:
    """Two layers of each kind at a published size, compiled for a GPU: 50 batches of other shapes, and evaluation."""
    device, config = choose_device("cuda"), Config(compile="on", **settings)
    model_config = two_of_each(AutoConfig.from_pretrained(Path(config_file).parent))
    kept = choose_dtype(config.dtype, device) if config.lora_rank else torch.float32
    with torch.device("meta"):
        bare = new_model(model_config).to(kept)
    model = prepare_model(bare.to_empty(device=device), config, processor_of_pixels(), device)
    chance = random.Random(0)
    collate = Collator(model_config.model_type)
    shapes = set()
    for number in range(50):
        batch = collate([any_sample(chance, model_config.model_type) for _ in range(chance.randint(1, 6))])
        shapes.add((len(batch.input_ids), len(batch.image_patches), len(batch.video_patches), len(batch.target_ids)))
        if number % 5 == 4:
            with torch.no_grad():
                model.eval().score(batch.to(device))
        else:
            model.train()(batch.to(device)).backward()
            model.zero_grad()
    return {"shapes": len(shapes), "graphs": compilation.graphs_made(), "cannot": compilation.Compiled.cannot}


def two_of_each(model_config):
    """The config with two blocks, of Qwen2.5-VL the second one without windows, and two layers."""
    text, tower = model_config.text_config, model_config.vision_config
    text.num_hidden_layers = tower.depth = 2
    for part, name, value in (
        (text, "layer_types", ["full_attention"] * 2),
        (tower, "fullatt_block_indexes", [1]),
        (tower, "deepstack_visual_indexes", [0, 1]),
    ):
        if hasattr(part, name):
            setattr(part, name, value)
    return model_config


def blank_patches(grid: Grid, is_video: bool, model_type: str) -> torch.Tensor:
    return torch.zeros(grid.patches, (1 + is_video) * 3 * FAMILIES[model_type].patch ** 2, dtype=torch.uint8)


def any_sample(chance: random.Random, model_type: str) -> Sample:
    """Text alone, an image, or a video, of any size."""
    tokens, kind = chance.randint(2, 900), chance.choice(["text", "image", "video"])
    encoded = Encoded([5] * tokens, [0.0] * (tokens - tokens // 2) + [1.0] * (tokens // 2), [0][: kind != "text"])
    if kind == "text":
        return Sample(encoded, [], "text")
    grid = Grid(1 if kind == "image" else chance.randint(1, 4), 2 * chance.randint(1, 16), 2 * chance.randint(1, 16))
    patches = blank_patches(grid, kind == "video", model_type)
    return Sample(encoded, [Medium(patches, grid, kind == "video")], kind)


def processor_of_pixels():
    class Processor:
        class image_processor:
            image_mean, image_std = [0.5] * 3, [0.5] * 3

    return Processor()


def tell(found: dict) -> None:
    found["resident_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("COUNTED " + json.dumps(found), flush=True)


if __name__ == "__main__":
    kinds = {"step": real_size_step, "graphs": graphs_of_many_shapes}
    if sys.argv[1] in kinds:
        tell(kinds[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3])))
    else:
        bound_generation()
        count_in_steps()
        for wanted in json.loads(Path(sys.argv[1]).read_text()):
            tell(train(*wanted))
