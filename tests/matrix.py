"""The matrix of settings: short runs of the tiny models in which every setting meets every other, and what each must leave.

A run is a dict of settings (SETTINGS names them, DEFAULTS fills in). `Workshop.train` trains runs together with what
they are compared with; each `check_...` proves one thing of a trained run by something that is not the code under test:
plain transformers and peft, the same run unstopped, and the float32 run of one process. Everything begins from a model
that has learned, and the data hold texts of more than a thousand tokens, so that positions matter.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import covertable
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from tests import families, runs
from tests.matrix_runs import GRADIENTS, NO_NUMBER_AT, REFUSED, STEPS, STOPPED_AT, outcome_file
from tests.test_loss import transformers_inputs
from util.command_line import UserError
from util.config import Config
from util.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = dict(
    family=families.MODEL_TYPES,
    dtype=["float32", "bfloat16"],
    ranks=[1, 2, 4],
    sharding=["full", "gradients", "optimizer", "none", "groups of 2"],
    trains=["everything", "LoRA", "LoRA and vision", "DoRA", "QLoRA"],
    freeze=["nothing", "vision", "merger", "language_model", "vision merger"],
    activation_checkpointing=["none", "selective", "full"],
    compile=["off", "on"],
    evaluation=["none", "loss", "answers"],
    saves=["off", "steps", "minutes"],
    stopped=["never", "alone", "with its workers"],
    data=["packed video", "images", "text", "a bad sample"],
    num_workers=[0, 2],
)
# Not crossed with each other: what single runs beside the pairs are made for.
BESIDE = {"split": "nothing", "optimizer": "adamw", "no_number": False, "breaks": False, "fault": None}
DEFAULTS = {**{name: values[0] for name, values in SETTINGS.items()}, **BESIDE}
# How a run computes, not what: set back to these, the run is the plain one that it must follow.
PLAIN = ("dtype", "ranks", "split", "sharding", "activation_checkpointing", "compile", "evaluation", "saves", "stopped",
         "num_workers", "optimizer", "breaks", "fault")  # fmt: skip
ADAPTERS = {
    "everything": {},
    "LoRA": {"lora_rank": 4},
    "LoRA and vision": {"lora_rank": 4, "lora_vision": True},
    "DoRA": {"lora_rank": 4, "lora_dora": True},
    "QLoRA": {"lora_rank": 4, "quantize": "nf4"},
}
BREAKS = "4.png"  # a picture that comes soon after the run went on
# What is split over all ranks of a run, which then work on the same samples.
SPLITS = {"nothing": None, "rows": "context_parallel_size", "matrices": "tensor_parallel_size",
          "layers": "pipeline_parallel_size"}  # fmt: skip
LEARNING_STEPS = 12
MOST_SECONDS = 1800  # for all runs of a number of ranks; the tests' own runs take a tenth of it
SIGNALS = {"alone": "SIGINT", "with its workers": "SIGTERM"}


# ---- all pairs ------------------------------------------------------------------------------------------------------


def config_of(run: dict) -> dict:
    """The Config fields of a run, its model, data and folder left out."""
    run = {**DEFAULTS, **run}
    grouped = run["sharding"] == "groups of 2"
    return {
        "dtype": run["dtype"],
        "sharding": "full" if grouped else run["sharding"],
        "shard_group_size": 2 if grouped else None,
        "freeze": [] if run["freeze"] == "nothing" else run["freeze"].split(),
        "activation_checkpointing": run["activation_checkpointing"],
        "compile": run["compile"],
        "eval_data": [] if run["evaluation"] == "none" else ["held_out.json"],
        "eval_samples": 3 if run["evaluation"] == "answers" else 0,
        "eval_every": 2,
        "save_every": {"off": "0", "steps": "2", "minutes": "1min"}[run["saves"]],
        "keep": 9,
        "num_workers": run["num_workers"],
        "on_bad_sample": "skip" if run["data"] == "a bad sample" else "stop",
        "micro_batch_size": {"images": 1, "text": 2}.get(run["data"]),
        "optimizer": run["optimizer"],
        "device": "cpu" if run["optimizer"] == "adamw" else "auto",
        "global_batch_size": 4,
        "learning_rate": 1e-3 if run["trains"] == "everything" else 2e-3,
        "max_steps": STEPS,
        **pixels_of(run["family"]),
        **ADAPTERS[run["trains"]],
        **({} if run["split"] == "nothing" else {SPLITS[run["split"]]: run["ranks"]}),
    }


def is_allowed(run: dict) -> bool:
    """Whether Config takes these settings, and whether they all mean something: the rest of a run may be open."""
    try:
        Config(**config_of(run))
    except UserError:
        return False
    shards = run.get("sharding", "full") in ("full", "groups of 2")
    if "ranks" in run and not shards and run["ranks"] == 1:
        return False
    if "ranks" in run and run.get("sharding") == "groups of 2" and run["ranks"] != 4:
        return False
    return (run.get("stopped"), run.get("num_workers")) != ("with its workers", 0)


def pairs_of(run: dict) -> set[tuple]:
    """Every two settings of a run as ((name, value), (name, value))."""
    return set(combinations([(name, run[name]) for name in SETTINGS], 2))


def possible_pairs() -> set[tuple]:
    every = ((name, value) for name, values in SETTINGS.items() for value in values)
    pairs = (pair for pair in combinations(every, 2) if pair[0][0] != pair[1][0])
    return {pair for pair in pairs if is_allowed(dict(pair))}


@cache
def all_pairs() -> list[dict]:
    """Few runs in which every possible pair of settings comes at least once; the same ones each time."""
    known = cache(lambda *pair: is_allowed(dict(pair)))

    def rule(one: str, other: str) -> dict:
        return {
            "operator": "fn",
            "requires": [one, other],
            "evaluate": lambda row: known((one, row[one]), (other, row[other])),
        }

    rules = [rule(*names) for names in combinations(SETTINGS, 2)]
    found = covertable.make(
        SETTINGS, constraints=rules, salt="3"
    )  # the salt that gave the fewest runs of eight tried in November 2026
    return [{name: row[name] for name in SETTINGS} for row in found]


def covered(found: list[dict]) -> set[tuple]:
    return set().union(*map(pairs_of, found))


def name_of(run: dict) -> str:
    """What of a run is not as usual, as the name of a folder."""
    run = {**DEFAULTS, **run}
    changed = {name: value for name, value in run.items() if value != DEFAULTS[name]}
    told = [value if isinstance(value, str) else f"{name} {value}" for name, value in changed.items()]
    return ", ".join(told).replace("_", " ") or "plain"


def plain_of(run: dict) -> dict:
    """The float32 run of one process with the same settings."""
    return {**DEFAULTS, **run, **{name: DEFAULTS[name] for name in PLAIN}}


def in_one_process(run: dict) -> dict:
    """The plain run in the run's own precision."""
    return {**plain_of(run), "dtype": {**DEFAULTS, **run}["dtype"]}


def unstopped(run: dict) -> dict:
    return {**DEFAULTS, **run, "stopped": "never", "breaks": False, "fault": None}


# ---- model and data -------------------------------------------------------------------------------------------------


def pixels_of(family: str) -> dict[str, int]:
    """The limits of a picture, 4 and 16 visual tokens, as Config fields."""
    token = (2 * families.PATCH[family]) ** 2
    return {"min_pixels": 4 * token, "max_pixels": 16 * token}


def picture(path: Path, rows: int, columns: int, seed: int, patch: int) -> str:
    """A picture of rows x columns tokens, each of four coloured squares, which no processor needs to resize."""
    squares = np.random.default_rng(seed).integers(0, 256, (2 * rows, 2 * columns, 3), dtype=np.uint8)
    Image.fromarray(squares.repeat(patch, 0).repeat(patch, 1)).save(path)
    return str(path)


def entry(question: str | list, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def with_media(answer: str, question: str, *media: str | list) -> dict:
    """A sample with pictures (paths) and videos (lists of paths) before its question."""
    items = [{"type": "video", "video": it} if isinstance(it, list) else {"type": "image", "image": it} for it in media]
    return entry([*items, {"type": "text", "text": question}], answer)


def text(seed: int, words: int) -> dict:
    """A list of words and the question for one of them: the answer is known from its place alone."""
    generator = random.Random(seed)
    listed = [generator.choice(("red", "blue", "green", "circle", "square", "left", "right")) for _ in range(words)]
    asked = generator.randrange(words)
    return entry(f"{' '.join(listed)}\nWhich word is number {asked}, and which is the next?",
                 f"{listed[asked]}, then {listed[(asked + 1) % words]}")  # fmt: skip


def unreadable(path: Path, patch: int) -> str:
    """A picture whose header is whole and whose pixels are not."""
    picture(path, 3, 4, 5, patch)
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 4
    content[middle : len(content) - 16] = bytes(len(content) - 16 - middle)
    path.write_bytes(content)
    return str(path)


def write_data(folder: Path, patch: int) -> None:
    """Eight samples of every kind of data, no two of like length, a long text among them, and some held-out ones."""
    folder.mkdir(parents=True)
    shapes = [(2, 3), (4, 2), (3, 3), (2, 2), (5, 2), (3, 4)]
    pictures = [picture(folder / f"{number}.png", *shape, number, patch) for number, shape in enumerate(shapes)]
    frames = [picture(folder / f"frame_{number}.png", 3, 3, 10 + number, patch) for number in range(8)]
    asked = [
        with_media(f"it is {word}" * (1 + number), "What is it?", pictures[number])
        for number, word in enumerate(("red", "blue", "green", "a circle", "a square", "left"))
    ]
    texts = [text(seed, words) for seed, words in enumerate((7, 12, 19, 27, 36, 44, 51))]
    long = text(99, 600)
    several = with_media("the second one is larger", "Which is larger?", *pictures[:2])
    videos = [with_media(f"it moves {way}", "Which way?", frames[begin:end])
              for begin, end, way in ((0, 4, "left"), (2, 8, "right"), (0, 8, "left, then right"))]  # fmt: skip
    bad = with_media("nobody will know", "What is this?", unreadable(folder / "bad.png", patch))
    kinds = {
        "packed video": [*videos, *texts[:3], asked[0], long],
        "images": [*asked[:4], several, *texts[:2], long],
        "text": [*texts, long],
        "a bad sample": [*asked[:5], bad, texts[0], long],
        "held_out": [asked[5], several, videos[0], text(50, 30), text(51, 300)],
    }
    for kind, entries in kinds.items():
        (folder / f"{kind}.json").write_text(json.dumps(entries))


class Workshop:
    """Where runs are trained: the data and the model that all of a family begin from, and a folder for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[str, str | None] = {}

    def tiny(self, family: str) -> Path:
        """A model that has learned nothing."""
        return make_tiny_model(self.folder / family / "tiny", model_type=family)

    def model(self, family: str) -> Path:
        return self.folder / family / "learned"

    def data(self, family: str) -> Path:
        return self.folder / family / "data"

    def directory(self, run: dict) -> Path:
        return self.folder / name_of(run)

    def output(self, run: dict) -> Path:
        return self.directory(run) / "run"

    def train(self, wanted: list[dict]) -> None:
        """Train runs and what they are compared with, as far as that is not done yet."""
        every = [made for run in wanted for made in (run, unstopped(run), plain_of(run), in_one_process(run))]
        named = {name_of(run): {**DEFAULTS, **run} for run in every}
        new_runs = [run for name, run in named.items() if name not in self.outcomes]
        met = sorted({run["family"] for run in new_runs})
        unlearned = [family for family in met if not self.model(family).exists()]
        for family in unlearned:
            write_data(self.data(family), families.PATCH[family])
        for ranks in SETTINGS["ranks"]:
            new = [self.job(run) for run in new_runs if run["ranks"] == ranks]
            if ranks == 1:
                new = [self.learning(family) for family in unlearned] + new
            self.perform(new, ranks)
        for family in unlearned:
            assert self.model(family).exists(), f"there is no {family} model that has learned: {self.outcomes}"

    def job(self, run: dict) -> dict:
        config = runs.settings(self.model(run["family"]), self.output(run), **config_of(run))
        data = self.data(run["family"])
        config |= {"data": [str(data / f"{run['data']}.json")], "max_tokens": 20480}
        config["eval_data"] = [str(data / name) for name in config["eval_data"]]
        stop = None
        if run["stopped"] != "never":
            stop = {"name": SIGNALS[run["stopped"]], "to_group": run["stopped"] == "with its workers"}
        breaks = None
        if run["breaks"]:  # of its own copies, as others go on with the originals
            config["data"], breaks = self.copy_of_data(run)
        return {"name": name_of(run), "directory": str(self.directory(run)), "ranks": run["ranks"], "config": config,
                "stop": stop, "breaks": breaks, **{name: run[name] for name in ("optimizer", "no_number", "fault")}}  # fmt: skip

    def copy_of_data(self, run: dict) -> tuple[list[str], str]:
        """The run's data with a picture of their own, and that picture."""
        folder, originals = self.directory(run), self.data(run["family"])
        folder.mkdir(parents=True)
        own, data = folder / "own.png", folder / "data.json"
        shutil.copyfile(originals / BREAKS, own)
        written = (originals / f"{run['data']}.json").read_text()
        data.write_text(written.replace(str(originals / BREAKS), str(own)))
        return [str(data)], str(own)

    def learning(self, family: str) -> dict:
        """The job that makes the model all runs of a family begin from: a tiny one, past the first of its learning. Its
        weights are in bf16, as the published ones are, so that no run begins by rounding them."""
        tiny, data = self.tiny(family), self.data(family)
        kinds = ("packed video", "images", "text")
        config = runs.settings(tiny, self.model(family), data=[str(data / f"{kind}.json") for kind in kinds],
                               dtype="bfloat16", max_steps=LEARNING_STEPS, learning_rate=2e-3, **pixels_of(family))  # fmt: skip
        name = f"{family} learning"
        return {"name": name, "directory": str(self.folder / name), "ranks": 1, "config": config,
                "stop": None, **BESIDE}  # fmt: skip

    def perform(self, jobs: list[dict], ranks: int) -> None:
        """Train one after another in one process group; where a run ends it, the rest in a new one."""
        while jobs:
            ended, said = start(jobs, ranks, self.folder)
            for job in jobs:
                found = [outcome_file(job["directory"], rank) for rank in range(ranks)]
                told = [json.loads(file.read_text()) for file in found if file.exists()]
                if len(told) < ranks:
                    told.append(f"the processes ended ({ended}): {said}")
                self.outcomes[job["name"]] = next(filter(None, told), None)
                if ranks > 1 and any(told):  # all end with it, those too that had told that the same went wrong
                    break
            jobs = jobs[jobs.index(job) + 1 :]


def start(jobs: list[dict], ranks: int, folder: Path) -> tuple[int | str, str]:
    """Train jobs in `ranks` processes: how they ended, and the last of what they said.

    One process too is started as users do: a fork of a test's helper loses the end of a data worker.
    """
    file = folder / f"jobs_{ranks}.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLLECTIVE_TIMEOUT": "900"}
    port = str(29500 + random.SystemRandom().randrange(2000))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "tests/matrix_runs.py", str(file)]
    with open(folder / f"said_{ranks}.txt", "w") as said:
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=MOST_SECONDS, stdout=said, stderr=said,
                                  check=False).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            done = f"after {MOST_SECONDS} s"
    return done, (folder / f"said_{ranks}.txt").read_text()[-3000:]


# ---- what each run must leave ---------------------------------------------------------------------------------------

PROCESSOR_FILES = {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja",
                   "preprocessor_config.json", "chat_template.json", "vocab.json", "merges.txt"}  # fmt: skip
WHOLE_FILES = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
OWN_FILES = {"training_config.json", "metrics.jsonl", "samples.jsonl", "loss.png", "final_model.json"}


def check_it_ended(shop: Workshop, run: dict) -> None:
    """Every step is logged once, in order, and every rank came to its end."""
    assert shop.outcomes[name_of(run)] is None, shop.outcomes[name_of(run)]
    steps = runs.losses(shop.output(run))
    assert [number for number, _ in steps] == list(range(1, STEPS + 1)), f"steps {steps}"
    lines = [line for line in runs.log(shop.output(run)) if "loss" in line]
    assert [number for number, loss in steps if loss is None] == [NO_NUMBER_AT] * run["no_number"], f"losses {steps}"
    if run["data"] == "a bad sample" and not run["breaks"]:
        assert sum(line.get("skipped", 0) for line in lines) == 2, "it is counted in both rounds through the data"


def check_plain_libraries_know_every_name(shop: Workshop, run: dict) -> None:
    """The official files; every tensor that transformers or peft would write, no other, each in its precision."""
    folder, tensors = shop.output(run), runs.weights(shop.output(run))
    adapts = run["trains"] != "everything"
    files = {path.name for path in folder.iterdir() if path.is_file()}
    of_family = {"video_preprocessor_config.json"} if run["family"] == "qwen3_vl" else set()
    assert files == PROCESSOR_FILES | of_family | OWN_FILES | (ADAPTER_FILES if adapts else WHOLE_FILES)
    wanted = torch.float32 if adapts else getattr(torch, run["dtype"])
    wrong = sorted(name for name, tensor in tensors.items() if tensor.dtype != wanted)
    assert not wrong, f"{len(wrong)} of {len(tensors)} tensors are not in {wanted}: {wrong[:4]}"
    if adapts:
        expected = {name: tuple(tensor.shape) for name, tensor in fresh_adapter(shop, run).items()}
        towers = any(".visual." in name for name in tensors)
        assert towers == (run["trains"] == "LoRA and vision" and run["freeze"] != "vision merger")
    else:
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in load_file(shop.tiny(run["family"]) / "model.safetensors").items()
        }
        assert json.loads((folder / "config.json").read_text())["dtype"] == run["dtype"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def fresh_adapter(shop: Workshop, run: dict) -> dict[str, torch.Tensor]:
    """The tensors of an untrained adapter with these settings, as peft by itself names them."""
    import peft

    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(shop.model(run["family"])))
        model = peft.get_peft_model(base, peft.PeftConfig.from_pretrained(shop.output(run)))
    return peft.get_peft_model_state_dict(model)


def check_checkpoints_are_whole_and_wide(shop: Workshop, run: dict) -> None:
    """One after each step that asks for it, holding what is trained in float32, whatever computes."""
    found = sorted(shop.output(run).glob("checkpoints/step_*"))
    wanted = {"off": set(), "steps": {2, STEPS}, "minutes": set(range(1, STEPS + 1))}[run["saves"]]
    wanted |= {STOPPED_AT} if run["stopped"] != "never" else set()
    assert {int(path.name.removeprefix("step_")) for path in found} == wanted
    names = set(runs.weights(shop.output(run)))
    for path in found:
        held = FileSystemReader(path).read_metadata().state_dict_metadata
        weights = {name: entry for name, entry in held.items() if name.startswith("model.")}
        narrow = [name for name, entry in weights.items() if entry.properties.dtype != torch.float32]
        assert not narrow, f"{path.name}: {len(narrow)} of {len(weights)} weights are not float32: {narrow[:4]}"
        assert len(weights) == len(names), f"{path.name}: {len(weights)} weights, {len(names)} were exported"
        moments = {name for name in held if name.startswith("optimizer.") and not name.endswith(".step")}
        # under a frozen language model texts have no gradient, and so no moments
        learns = run["data"] != "text" or "language_model" not in run["freeze"]
        assert moments or not learns, f"{path.name}: {len(weights)} weights, and no moments of any"


def check_the_last_evaluation_comes_again(shop: Workshop, run: dict) -> None:
    """The saved model, opened and evaluated by transformers and peft alone, in float32, one sample at a time."""
    if run["evaluation"] == "none":
        return
    lines = [line for line in runs.log(shop.output(run)) if "eval_loss" in line]
    # one that a signal broke off is made when the run goes on
    assert [line["step"] for line in lines] == [2, STEPS]
    if run["evaluation"] == "answers":
        assert {line["eval_questions"] for line in lines} == {3}
    found = held_out_loss(shop, opened(shop, run), run["family"])
    told, bound = min(line["eval_loss"] for line in lines), 1e-5 if run["dtype"] == "float32" else 3e-3
    assert abs(found / told - 1) < bound, f"told {told}, of the saved model {found}"


def opened(shop: Workshop, run: dict):
    """The saved model in float32; under adapters its base as the run kept it."""
    if run["trains"] == "everything":
        model, report = AutoModelForImageTextToText.from_pretrained(
            shop.output(run), dtype="auto", output_loading_info=True
        )
        assert model.dtype == getattr(torch, run["dtype"])
        assert not any(report.values()), report
        return model.float().eval()
    import peft

    four_bits = {}
    if run["trains"] == "QLoRA":
        four_bits["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["model.visual", "lm_head"],
        )  # fmt: skip
    base = AutoModelForImageTextToText.from_pretrained(shop.model(run["family"]), dtype=torch.float32, **four_bits)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a kernel that rounds to bf16 in evaluation
            module.support_avx512bf16_for_cpu = False
    return peft.PeftModel.from_pretrained(base, shop.output(run)).eval()


def held_out_loss(shop: Workshop, model, family: str) -> float:
    """Mean cross-entropy of the held-out data's answers."""
    processor, total, tokens = AutoProcessor.from_pretrained(shop.tiny(family)), 0.0, 0
    for sample in json.loads((shop.data(family) / "held_out.json").read_text()):
        if family == "qwen2_vl":
            inputs = transformers_inputs(sample["messages"], processor)
        else:  # of times transformers' own processors have another view than the releases
            inputs, _ = families.reference_sample(sample["messages"], processor, family, {}, None)
        with torch.no_grad():
            loss = model(**inputs).loss.item()
        count = int((inputs["labels"][0, 1:] != -100).sum())
        total, tokens = total + loss * count, tokens + count
    return total / tokens


def check_stopping_changed_nothing(shop: Workshop, run: dict) -> None:
    """The run that was stopped and resumed is the one that was not: bit for bit in one process, else to 1e-6."""
    if run["stopped"] == "never" or run["breaks"]:
        return
    whole = unstopped(run)
    check_it_ended(shop, whole)
    bound = 0.0 if run["ranks"] == 1 else 1e-6
    kinds = {
        "losses": [
            {step: torch.tensor(loss or 0.0) for step, loss in runs.losses(shop.output(r))} for r in (run, whole)
        ],
        "gradients": [load_file(shop.directory(r) / GRADIENTS) for r in (run, whole)],
        "weights": [runs.weights(shop.output(r)) for r in (run, whole)],
    }
    for what, (ours, theirs) in kinds.items():
        assert ours.keys() == theirs.keys(), what
        gap = {name: distance(ours[name], theirs[name]) for name in ours}
        worst = max(gap, key=gap.get, default=None)
        assert worst is None or gap[worst] <= bound, f"{what} of {worst} differ by {gap[worst]:.1e} of themselves"


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of two tensors, as a share of the second's norm."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def check_a_sample_that_breaks_moves_no_other(shop: Workshop, run: dict) -> None:
    """Where a sample became unreadable while a run was stopped, every step has the samples it had, but for that one."""
    if not run["breaks"]:
        return
    ours, theirs = ({line["step"]: line for line in runs.log(shop.output(r)) if "loss" in line}
                    for r in (run, unstopped(run)))  # fmt: skip
    for step in range(1, STEPS + 1):
        one, other = ours[step], theirs[step]
        missing = other["samples"] - one["samples"]
        as_before = one["tokens"] == other["tokens"] if not missing else one["tokens"] < other["tokens"]
        assert missing in (0, 1), f"step {step}: {one['samples']} samples, were {other['samples']}"
        assert as_before, f"step {step}: {one['tokens']} tokens of {one['samples']} samples, were {other['tokens']}"
    refused = shop.directory(run) / REFUSED
    assert refused.exists(), "it went on without a word"
    assert "data.json, sample 4" in refused.read_text(), refused.read_text()


# What rounding makes of a run, as (loss, gradient of the first step; loss, gradient of the last; change of weights).
# Beside float32; and beside one process in the same precision, where up to the first update the sums have another
# order and nothing else. Rotary frequencies in bf16 change that loss by 3e-4 and that gradient by 2e-2.
# Where matrices are split, each part of a sum is rounded to bf16 by itself, which is as much as bf16 rounds otherwise.
BESIDE_FLOAT32 = {"float32": (1e-5, 2e-5, 1e-4, 1e-3, 1e-3), "bfloat16": (1e-2, 0.1, 5e-2, 0.6, 0.5)}
BESIDE_ONE_PROCESS = (2e-5, 1e-2, 5e-2, 0.6, 0.5)


def check_it_follows_the_plain_run(shop: Workshop, run: dict) -> None:
    """Losses, gradients before clipping, and what became of the weights, beside float32 in one process."""
    compare(shop, run, plain_of(run), BESIDE_FLOAT32[run["dtype"]])


def check_it_follows_one_process(shop: Workshop, run: dict) -> None:
    """The same beside the plain run in its own precision."""
    if run["dtype"] != "float32":
        bounds = BESIDE_FLOAT32[run["dtype"]] if run["split"] == "matrices" else BESIDE_ONE_PROCESS
        compare(shop, run, in_one_process(run), bounds)


def compare(shop: Workshop, run: dict, plain: dict, bounds: tuple[float, ...]) -> None:
    if run["breaks"]:
        return
    check_it_ended(shop, plain)
    ours, theirs = (dict(runs.losses(shop.output(r))) for r in (run, plain))
    assert [step for step, loss in ours.items() if loss is None] == [s for s, loss in theirs.items() if loss is None]
    for step, bound in ((1, bounds[0]), (STEPS, bounds[2])):
        gap = abs(ours[step] / theirs[step] - 1)
        assert gap < bound, f"step {step}: the loss is off by {gap:.1e} of itself, rounding explains {bound:.0e}"
    check_gradients(*(load_file(shop.directory(r) / GRADIENTS) for r in (run, plain)), {1: bounds[1], STEPS: bounds[3]})
    if (left := step_of_the_model(shop, run)) == step_of_the_model(shop, plain):
        check_changes(shop, run, plain, bounds[4])
    else:  # the plain run has no evaluation, and leaves the last model
        evaluated = {line["step"]: line["eval_loss"] for line in runs.log(shop.output(run)) if "eval_loss" in line}
        assert left == min(evaluated, key=evaluated.get), f"the model is that of step {left}: {evaluated}"


def step_of_the_model(shop: Workshop, run: dict) -> int:
    """Of which step the model is that a run left."""
    return json.loads((shop.output(run) / "final_model.json").read_text())["step"]


def check_gradients(ours: dict, theirs: dict, bounds: dict[int, float]) -> None:
    """Each tensor's gradient, unless it is a hundredth of the whole or less; one that is missing counts as zeros."""
    for step, bound in bounds.items():
        names = [name for name in {**ours, **theirs} if name.startswith(f"{step} ")]
        total = sum(theirs[name].double().norm() ** 2 for name in names if name in theirs) ** 0.5
        for name in names:
            one, other = (them.get(name, torch.zeros(())) for them in (ours, theirs))
            gap = ((one.double() - other.double()).norm() / max(other.double().norm(), 0.01 * total + 1e-30)).item()
            assert gap < bound, (
                f"step {name}: its gradient is off by {gap:.1e} of itself, rounding explains {bound:.0e}"
            )


def check_changes(shop: Workshop, run: dict, plain: dict, bound: float) -> None:
    """What training added to the weights; of adapters their second matrix, which begins as zeros."""
    ours, theirs = (runs.weights(shop.output(r)) for r in (run, plain))
    start = {name: torch.zeros_like(tensor) for name, tensor in theirs.items() if "lora_B" in name}
    start = start or load_file(shop.model(run["family"]) / "model.safetensors")
    added, gap = 0.0, 0.0
    for name, before in start.items():
        added += (theirs[name].double() - before.double()).norm() ** 2
        gap += (ours[name].double() - theirs[name].double()).norm() ** 2
    assert gap**0.5 <= bound * added**0.5, f"the change of the weights is off by {(gap / added) ** 0.5:.1e} of itself"


CHECKS = [check_it_ended, check_plain_libraries_know_every_name, check_checkpoints_are_whole_and_wide,
          check_the_last_evaluation_comes_again, check_stopping_changed_nothing,
          check_a_sample_that_breaks_moves_no_other, check_it_follows_the_plain_run,
          check_it_follows_one_process]  # fmt: skip


def problem_of(shop: Workshop, run: dict) -> str | None:
    """The first thing that is wrong with a trained run, after the name of the check that saw it."""
    run = {**DEFAULTS, **run}
    for check in CHECKS:
        try:
            check(shop, run)
        except Exception as error:  # a file that is not there, or cannot be opened, is a finding too
            return f"{check.__name__.removeprefix('check_')}: {type(error).__name__}: {error}"
    return None
