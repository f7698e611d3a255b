"""The command line: every flag, every kind of wrong flag, and data that cannot be: one clear message, exit code 2."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from tests.official import official_config
from util import run_folder
from util.command_line import COMMON_NAMES, UserError, harmless_settings, run_command, settings_parser
from util.config import Config, parse_arguments
from util.cost.flops import forward_flops, shares, shares_in_words, training_flops, work_by_part
from util.cost.memory import count_parameters
from util.dataset import Size
from util.optimizer import parameter_groups
from util.vision import Grid

ROOT = Path(__file__).resolve().parent.parent
GOOD = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


def refused(capsys, *arguments: str) -> str:
    """Run the training script in this process; it must end with exit code 2. Returns its message."""
    with pytest.raises(SystemExit) as ended:
        run_command(finetune.train, parse_arguments("test", list(arguments)))
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in message
    return message


def test_help_names_every_flag_and_imports_nothing_heavy():
    """On a quiet machine it answers in a fifth of a second; a busy one is no fault of ours."""
    command = [sys.executable, "-X", "importtime", "finetune.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy", "PIL", "av", "torchvision", "matplotlib", "tqdm"}
    for item in dataclasses.fields(Config):
        assert f"--{item.name}" in done.stdout, item.name
        assert item.metadata["help"].split()[0] in done.stdout


def test_help_begins_with_what_everybody_sets():
    """In 80 columns and 24 lines --model and --data are seen; then the groups follow in their order."""
    printed = settings_parser(Config, "Trains.").format_help().splitlines()
    first_screen = "\n".join(printed[:24])
    assert "--model MODEL" in first_screen
    assert "--data [DATA ...]" in first_screen
    titles = [line.rstrip(":") for line in printed if line and not line.startswith((" ", "usage", "Trains"))]
    assert titles == ["options", "essentials", "data", "model", "run", "optimizer", "memory and speed", "evaluation",
                      "saving", "adapters", "many GPUs", "remote media", "tracking and hub"]  # fmt: skip
    assert all(item.metadata["group"] in titles for item in dataclasses.fields(Config))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--lr", "--learning_rate"), ("--learning-rate", "--learning_rate"), ("--epoch", "--epochs"),
     ("--batch_size", "--global_batch_size"), ("--max_token", "--max_tokens"), ("--lora-rank", "--lora_rank"),
     ("--no-check-memory", "--no-check_memory"), ("--gradient_checkpointing", "--activation_checkpointing")],
)  # fmt: skip
def test_a_wrong_flag_names_the_one_that_was_meant(typed, meant, capsys):
    assert f"unknown flag {typed}; did you mean {meant}?" in refused(capsys, typed, "3")


def test_a_flag_like_no_other_names_the_list(capsys):
    assert "unknown flag --telescope; --help lists them all" in refused(capsys, "--telescope", "3")


def test_every_common_name_leads_to_a_flag():
    known = {f"--{item.name}" for item in dataclasses.fields(Config)}
    assert set(COMMON_NAMES.values()) <= known
    assert not set(COMMON_NAMES) & known


AT_LEAST_ONE = ("fetch_concurrency", "epochs", "max_steps", "global_batch_size", "micro_batch_size", "max_tokens",
                "min_pixels", "max_pixels", "video_max_tokens", "keep", "shard_group_size", "pipeline_parallel_size", "context_parallel_size", "tensor_parallel_size", "lora_alpha", "logit_rows")  # fmt: skip
NOT_NEGATIVE = ("fetch_retries", "learning_rate", "vision_learning_rate", "merger_learning_rate", "weight_decay",
                "max_grad_norm", "eval_every", "eval_samples", "stop_after", "num_workers", "lora_rank", "lora_dropout",
                "warmup_ratio")  # fmt: skip
ABOVE_ZERO = ("video_fps", "fetch_timeout", "cache_max_gib")
WSD = {"decay_ratio": {"schedule": "wsd"}}  # what a setting needs beside it


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [*((name, 0, "at least 1") for name in AT_LEAST_ONE), *((name, -1, "at least 0") for name in NOT_NEGATIVE[:-2]),
     *((name, 0, "above 0") for name in ABOVE_ZERO), ("video_max_frames", 3, "at least 4"),
     ("warmup_ratio", 1.5, "between 0 and 1"), ("warmup_ratio", -0.5, "between 0 and 1"),
     ("lora_dropout", 1.0, "at least 0 and below 1"), ("lora_dropout", -0.1, "at least 0 and below 1"),
     ("decay_ratio", 0, "above 0 and at most 1"), ("decay_ratio", 1.5, "above 0 and at most 1"),
     ("min_learning_rate_ratio", 1.0, "at least 0 and below 1"), ("weight_decay", math.nan, "at least 0")],
)  # fmt: skip
def test_every_number_has_its_range(name, value, rule):
    with pytest.raises(UserError, match=rf"(?m)--{name} {value}: must be {rule}$"):
        Config(**{name: value})
    if not math.isnan(value):
        inside = {"at least 1": 1, "at least 0": 0, "above 0": 0.5, "at least 4": 4}.get(rule, 0.5)
        Config(**{name: inside, **WSD.get(name, {})})


def test_what_a_resumed_run_may_change():
    """Where and how it computes, not what: written by hand, so that a new setting is thought about."""
    assert harmless_settings(Config) == {
        "output_dir", "micro_batch_size", "max_tokens", "on_bad_sample", "device", "attention",
        "activation_checkpointing", "compile", "check_memory", "memory_budget", "memory_budget_may_change_optimizer", "logit_rows", "check_disk", "eval_data", "eval_every", "eval_samples",
        "eval_metrics", "stop_after", "final", "save_every", "keep", "sharding", "shard_group_size", "pipeline_parallel_size", "context_parallel_size", "tensor_parallel_size", "sequence_parallel", "resume", "resume_anyway", "num_workers",
        "fetch_concurrency", "fetch_retries", "fetch_timeout", "cache_dir", "cache_max_gib", "keep_features", "report_to", "project",
        "run_name", "push_to_hub", "push_every_save", "hub_private",
    }  # fmt: skip


def test_the_commands_are_listed_and_a_wrong_one_is_named(capsys):
    from util.__main__ import COMMANDS, main

    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in (
        "show",
        "check",
        "convert",
        "chartqa",
        "export",
        "push",
        "merge",
        "compare",
        "report",
        "track",
        "agent",
    ):
        assert re.search(rf"^  {name} +\w.{{20}}", printed, re.MULTILINE), name
    assert len(COMMANDS) == 11
    with pytest.raises(SystemExit) as ended:
        main(["exprot"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "python -m util: unknown command 'exprot'; did you mean export?\n"


@pytest.mark.parametrize(
    ("typed", "rate"),
    [("", 1e-5), ("--lora_rank 16", 1e-4), ("--lora_rank 16 --quantize nf4", 1e-4), ("--lora_rank 0", 1e-5),
     ("--lora_rank 16 --learning_rate 1e-5", 1e-5), ("--learning_rate 0", 0.0),
     ("--lora_rank 16 --lora_vision --vision_learning_rate 3e-6", 1e-4)],
)  # fmt: skip
def test_the_learning_rate_that_is_not_given(typed, rate):
    """1e-5 for weights, 1e-4 for adapters; what is given stays, also where it is the other default or 0."""
    config = parse_arguments("test", typed.split())
    assert config.learning_rate == rate
    peaks = {group["peak"] for group in parameter_groups(small_model(), config)}
    assert peaks == {rate, 3e-6} if "vision_learning_rate" in typed else {rate}


def small_model():
    """Parameters of each part, by names as training has them."""
    import torch

    model = torch.nn.Module()
    model.visual = torch.nn.Linear(2, 2)
    model.visual.merger = torch.nn.Linear(2, 2)
    model.language_model = torch.nn.Linear(2, 2)
    return model


def test_defaults_survive_the_command_line():
    assert parse_arguments("test", []) == Config()


def test_every_flag_reaches_its_setting():
    config = parse_arguments("test", ["--freeze", "vision", "merger", "--epochs", "7", "--compile", "--no-check_memory",
                                      "--learning_rate", "3e-4", "--data", "a.json", "b.jsonl", "--model", "tiny"])  # fmt: skip
    assert config == Config(freeze=["vision", "merger"], epochs=7, compile="on", check_memory=False, learning_rate=3e-4,
                            data=["a.json", "b.jsonl"], model="tiny")  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "choice"),
    [("", "auto"), ("--compile", "on"), ("--no-compile", "off"), ("--compile on", "on"), ("--compile off", "off"),
     ("--compile auto", "auto"), ("--compile --epochs 2", "on"), ("--compile=off", "off")],
)  # fmt: skip
def test_compile_is_a_choice_and_a_switch(typed, choice):
    assert parse_arguments("test", typed.split()).compile == choice


@pytest.mark.parametrize(("kept", "choice"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_a_run_that_knew_no_auto_is_gone_on_with(kept, choice):
    """The settings of a checkpoint from before `--compile auto` hold true or false."""
    assert Config(compile=kept).compile == choice


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--compile perhaps", ["--compile perhaps: must be one of auto, on, off"]),
        ("--learning-rate 1", ["unknown flag --learning-rate"]),
        ("--epoch 3", ["unknown flag --epoch"]),
        ("--epochs three", ["--epochs three: must be a whole number"]),
        ("--learning_rate fast", ["--learning_rate fast: must be a number"]),
        ("--dtype float16", ["--dtype float16: must be one of auto, bfloat16, float32, float64"]),
        ("--freeze eyes", ["--freeze eyes: must be one of vision, merger, language_model"]),
        ("--epochs 0", ["--epochs 0: must be at least 1"]),
        ("--learning_rate nan", ["--learning_rate nan: must be at least 0"]),
        ("--warmup_ratio 2", ["--warmup_ratio 2.0: must be between 0 and 1"]),
        ("--min_pixels 9000 --max_pixels 4000", ["--min_pixels 9000 is above --max_pixels 4000"]),
        ("--micro_batch_size 16", ["--micro_batch_size 16 is above --global_batch_size 8"]),
        ("--freeze vision merger language_model", ["nothing is left to train"]),
        ("--freeze vision --vision_learning_rate 1e-5", ["--vision_learning_rate is given, but --freeze vision"]),
        ("--schedule wsd --warmup_ratio 0.5 --decay_ratio 0.6", ["0.5 and --decay_ratio 0.6 are more than all steps"]),
        ("--final best", ["--final best needs --eval_data"]),
        ("--final first", ["--final first: must be one of best, last"]),
        ("--stop_after 3", ["--stop_after 3 needs --eval_data, and an --eval_every that is not 0"]),
        ("--stop_after 3 --eval_data a.json --eval_every 0", ["--stop_after 3 needs --eval_data, and an --eval_every"]),
        ("--early_stopping_patience 3", ["did you mean --stop_after?"]),
        ("--decay_ratio 0.2", ["--decay_ratio 0.2 needs --schedule wsd"]),
        ("--schedule constant --min_learning_rate_ratio 0.1", ["with --schedule constant the learning rate does not"]),
        ("--min_lr_ratio 0.1", ["did you mean --min_learning_rate_ratio?"]),
        ("--attention varlen --device cpu", ["--attention varlen needs a GPU"]),
        ("--optimizer adamw_8bit --device cpu", ["--optimizer adamw_8bit needs a GPU"]),
        ("--epochs", ["expected one argument"]),
        ("stray", ["'stray' belongs to no flag"]),
        ("--video_max_frames 2 --keep 0 --lr 1 --epochs x", ["--video_max_frames 2", "--keep 0", "--lr", "--epochs x"]),
    ],
)
def test_a_wrong_command_line_is_named_in_one_message(arguments, said, capsys):
    message = refused(capsys, *arguments.split())
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ["data.json: no such data file"]),
        ("[]", ["no samples"]),
        ("", ["no samples"]),
        ("{", ["data.json, line 1: not valid JSON"]),
        (json.dumps(GOOD * 2 + [{"messages": GOOD[0]["messages"][:1]}]), ["sample 2", "nothing is supervised"]),
        (json.dumps([{"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]},
                                   {"role": "assistant", "content": "x"}]}]),
         ["sample 0", "message 0", "no such file 'gone.png'", "tried"]),
    ],
)  # fmt: skip
def test_data_that_cannot_be_is_named_and_nothing_is_written(content, said, capsys, tmp_path, tiny_path):
    file, output = tmp_path / "data.json", tmp_path / "run"
    if content is not None:
        file.write_text(content)
    message = refused(capsys, "--data", str(file), "--model", str(tiny_path), "--output_dir", str(output))
    for words in said:
        assert words in message
    assert not output.exists()


def test_an_unreadable_image_is_named(capsys, tmp_path, tiny_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    content = [{"type": "image", "image": "broken.png"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    (tmp_path / "data.json").write_text(json.dumps([*GOOD, {"messages": messages}]))
    message = refused(capsys, "--data", str(tmp_path / "data.json"), "--model", str(tiny_path))
    assert "sample 1" in message
    assert "broken.png: not a readable image" in message


def test_an_image_whose_pixels_end_early_is_named_by_the_data_worker(capsys, tmp_path, tiny_path):
    """Its header is fine, so only the worker sees it: the message still names the sample, without a traceback."""
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    content = [{"type": "image", "image": "cut.jpg"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages}]))
    message = refused(capsys, "--data", str(tmp_path / "data.json"), "--model", str(tiny_path), "--num_workers", "1",
                      "--output_dir", str(tmp_path / "run"))  # fmt: skip
    assert "sample 0" in message
    assert "cut.jpg" in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no/such/folder"], "--model no/such/folder"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "toaster"], "--device toaster: not a device"),
        (["--resume", "nowhere"], "--resume nowhere: no checkpoint there"),
        # the model of a run is looked for when it is known that there is a run
        (["--resume", "nowhere", "--model", "no/such/folder"], "--resume nowhere: no checkpoint there"),
        (["--max_tokens", "20"], "above --max_tokens 20"),
    ],
)
def test_settings_that_only_the_machine_can_refuse(arguments, said, capsys, tmp_path, tiny_path):
    (tmp_path / "data.json").write_text(json.dumps(GOOD))
    common = ["--data", str(tmp_path / "data.json"), "--model", str(tiny_path), "--output_dir", str(tmp_path / "run")]
    assert said in refused(capsys, *common, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_family_is_refused_by_name(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    message = refused(capsys, "--model", str(tmp_path))
    assert "is a llama model" in message
    assert "qwen2_vl" in message


def test_memory_that_cannot_fit_is_said_before_weights_are_loaded(capsys, tmp_path, tiny_path, monkeypatch):
    """2B in full on a device of 24 GiB: the forecast names its parts, and settings that fit."""
    from util import model
    from util.cost import memory

    for file in tiny_path.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    official_config("2b").save_pretrained(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(GOOD))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 24 * 2**30)
    monkeypatch.setattr(model, "load_weights", lambda *arguments: pytest.fail("weights were loaded"))
    message = refused(capsys, "--data", str(tmp_path / "data.json"), "--model", str(tmp_path), "--device", "cpu")
    assert "24.0 GiB are free" in message
    told = "2,208,985,600 weights of 4 bytes; 1,543,714,304 of them, as there is no picture, with 4 + 8 bytes more"
    assert "weights 8.23, moments 11.50, gradients 5.75" in message, told
    assert "Settings that fit" in message
    assert "No setting fits" not in message


@pytest.mark.parametrize(("size", "count"), [("2b", 2_208_985_600), ("7b", 8_291_375_616)])
def test_official_parameter_counts(size, count):
    """The numbers of the published checkpoints (2B with its head tied, 7B without)."""
    counts = count_parameters(official_config(size), Config())
    assert sum(counts[part] for part in ("vision", "merger", "language_model")) == count


@pytest.mark.parametrize(
    ("size", "language", "quadratic", "head"), [("2b", 2.620e9, 86016, 0.467e9), ("7b", 13.051e9, 200704, 1.090e9)]
)
def test_work_is_counted_as_calculated_by_hand(size, language, quadratic, head):
    """The figures of a 1,000-token sample with one image of 5,476 patches, from the sizes of the published models."""
    grid = Grid(1, 74, 74)
    work = forward_flops(official_config(size), Size(tokens=1000, supervised=10, grids=[grid]))
    assert work["language_model"] == pytest.approx(language * 1000 + quadratic * 1000**2, rel=1e-3)
    assert work["head"] == pytest.approx(head * 10, rel=1e-3)
    assert work["vision"] == pytest.approx(1.2613e9 * 5476 + 163840 * 5476**2, rel=1e-3)


def test_work_of_a_part_that_is_frozen_trained_or_beside_adapters():
    """Factors by hand: 3 with weights that learn, 2 where gradients only pass, 1 where none do."""
    config, size = official_config("2b"), Size(tokens=1000, supervised=10, grids=[Grid(1, 74, 74)])
    forward = forward_flops(config, size)
    cases = {
        "all": ({}, (3, 3, 3, 3)),
        "tower frozen": ({"freeze": ["vision"]}, (1, 3, 3, 3)),
        "tower and merger frozen": ({"freeze": ["vision", "merger"]}, (1, 1, 3, 3)),
        "language model frozen": ({"freeze": ["language_model"]}, (3, 3, 2, 2)),
        "adapters": ({"lora_rank": 8}, (1, 1, 2, 2)),
    }
    for name, (changes, factors) in cases.items():
        work = work_by_part(config, [size], Config(**changes))
        for part, factor in zip(("vision", "merger", "language_model", "head"), factors, strict=True):
            assert work[part] == pytest.approx(factor * forward[part]), f"{name}: {part}"
        assert training_flops(config, [size], Config(**changes)) == pytest.approx(sum(work.values()))
    # 8 x (in + out) of each of the 7 matrices of 28 layers, 6 operations for each of them and token
    adapters = 8 * 28 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert work["adapters"] == pytest.approx(6 * adapters * 1000)


def test_work_in_words_and_shares():
    """2B on 448 x 448: 1,024 patches and 300 tokens, of which 20 are supervised; shares by design's numbers."""
    work = work_by_part(official_config("2b"), [Size(tokens=300, supervised=20, grids=[Grid(1, 32, 32)])], Config())
    vision = 1.2613e9 * 1024 + 163840 * 1024**2
    merger = 2 * (5120 * 5120 + 5120 * 1536) * 256
    language = 2.620e9 * 300 + 86016 * 300**2
    total = vision + merger + language + 0.467e9 * 20
    assert shares(work)["vision"] == pytest.approx(vision / total, rel=1e-3)
    assert sum(shares(work).values()) == pytest.approx(1)
    assert shares_in_words(work) == "64 % vision tower, 35 % language model, 1 % merger"
    assert shares({"vision": 0.0}) == {}


MODEL_PATHS = [  # as it is typed, and what is said of it
    ("/data/qwen2vl", "no such folder; what there is of its path is /"),
    ("./x", "no such folder"),
    ("../x", "no such folder"),
    ("~/surely/not/here", "no such folder"),
    ("models/qwen/2b", "no such folder"),
    ("qwen2vl/", "no such folder"),
    ("C:\\models\\qwen", "no such folder; '\\' is the separator of Windows"),
    ("FOLDER/file", "a file; name the folder that holds config.json"),
    ("FOLDER/empty", "no model in this folder (config.json is missing)"),
    ("FOLDER/cache", "there is one in FOLDER/cache/snapshots/1a2b"),
    ("FOLDER/run", "a run that did not end: go on with it by --resume FOLDER/run, or make a model of it: "
     "python -m util export FOLDER/run/checkpoints/step_000007 OUT"),
    ("FOLDER/run/checkpoints/step_000003", "a checkpoint: go on with it by --resume FOLDER/run/checkpoints/step_000003, or"),
    ("FOLDER/adapter", "is an adapter; first make a model of it: python -m util merge FOLDER/adapter OUT"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "said"), MODEL_PATHS)
def test_a_model_that_is_a_path_is_no_hub_name(typed, said, tmp_path, monkeypatch):
    """The hub is not asked, and its answer is not what the user reads."""
    import torch
    from transformers import AutoConfig

    from util.adapters import lora
    from util.model import find_model, load_config

    for file in ("file", "empty/a.txt", "cache/snapshots/1a2b/config.json", "run/checkpoints/step_000003/state.json",
                 "run/checkpoints/step_000007/state.json", "adapter/adapter_config.json"):  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()

    def ask(*_):
        raise AssertionError("the hub is asked")

    monkeypatch.setattr(AutoConfig, "from_pretrained", ask)
    monkeypatch.setattr(lora, "is_adapter_on_hub", ask)
    with pytest.raises(UserError) as error:
        load_config(find_model(typed.replace("FOLDER", str(tmp_path)), torch.device("cpu")))
    message = str(error.value)
    assert said.replace("FOLDER", str(tmp_path)) in message
    assert message.startswith(f"--model {os.path.expanduser(typed.replace('FOLDER', str(tmp_path)))}")
    assert "hub" not in message
    assert "\n" not in message


def test_a_model_may_lie_below_the_home_folder(tmp_path, monkeypatch):
    """`--model=~/qwen`: no shell replaces that ~."""
    import torch

    from util.model import find_model

    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/qwen", torch.device("cpu")) == str(tmp_path / "qwen")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_out_of_memory_names_what_helps(device, capsys):
    import torch

    def train() -> None:
        if device == "cuda":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        torch.empty(2**45)

    with pytest.raises(SystemExit) as ended:
        run_command(train)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "--activation_checkpointing full" in said
    assert "--resume" not in said, "nothing is there to go on with"


# ---- going on with a run --------------------------------------------------------------------------------------------


def saved(run: Path, step: int, **settings) -> None:
    """What the command line reads of a checkpoint."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    body = json.dumps({"step": step, "settings": {**dataclasses.asdict(Config()), **settings}}, indent=2)
    (folder / "state.json").write_text(f"{body}\n00000000\n")


def test_what_is_not_given_is_as_the_run_has_it(tmp_path):
    run = tmp_path / "run"
    saved(run, 999_900, learning_rate=9.0)
    saved(run, 1_000_000, learning_rate=3e-4, data=["a.json", "b.jsonl*2"], freeze=["vision"], model="tiny",
          output_dir="another/name", resume="auto", resume_anyway=True, a_setting_that_is_gone=1)  # fmt: skip
    own = {"learning_rate": 3e-4, "data": ["a.json", "b.jsonl*2"], "freeze": ["vision"], "model": "tiny"}
    newest = run / "checkpoints" / "step_1000000"
    older = run / "checkpoints" / "step_999900"
    assert parse_arguments("", ["--resume", str(run)]) == Config(**own, resume=str(run))
    assert parse_arguments("", ["--resume", str(newest)]) == Config(**own, resume=str(newest))
    assert parse_arguments("", ["--resume", str(older)]) == Config(learning_rate=9.0, resume=str(older))
    auto = parse_arguments("", ["--resume", "auto", "--output_dir", str(run)])
    assert auto == Config(**own, resume="auto", output_dir=str(run))
    # what is given counts, also where it is the default
    given = parse_arguments("", ["--resume", str(run), "--learning_rate", "1e-5", "--freeze", "--num_workers", "3"])
    assert given == Config(**{**own, "learning_rate": 1e-5, "freeze": []}, num_workers=3, resume=str(run))
    (newest / "state.json").write_text("{half of it")
    assert parse_arguments("", ["--resume", str(run)]).learning_rate == 9.0, "the one before a damaged one"


def test_the_learning_rate_of_a_run_of_adapters_stays_its_own(tmp_path):
    """Also of one that was made while 1e-5 was the default of adapters, too."""
    run = tmp_path / "run"
    saved(run, 1, lora_rank=4, learning_rate=1e-5)
    assert parse_arguments("", ["--resume", str(run)]).learning_rate == 1e-5
    saved(run, 2, lora_rank=4, learning_rate=1e-4)
    assert parse_arguments("", ["--resume", str(run), "--lora_rank", "4"]).learning_rate == 1e-4


def test_without_a_checkpoint_the_defaults_hold(tmp_path):
    for resume in (["--resume", str(tmp_path)], ["--resume", "auto", "--output_dir", str(tmp_path)], []):
        assert parse_arguments("", resume).learning_rate == Config().learning_rate


def test_auto_goes_on_with_the_latest_run(tmp_path, monkeypatch):
    saved(tmp_path / "2026", 3, seed=7)
    (tmp_path / "latest").symlink_to("2026")
    monkeypatch.setattr(run_folder, "LATEST", tmp_path / "latest")
    assert parse_arguments("", ["--resume", "auto"]) == Config(seed=7, resume="auto")
    assert parse_arguments("", []) == Config()


@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_command_that_goes_on_survives_a_shell(elsewhere, tmp_path, monkeypatch):
    """Pasted where the user is, also where that is not the folder in which the run was started."""
    project = tmp_path / "it's a project; $HOME"
    project.mkdir()
    (project / "show.py").write_text("import os, sys; print(os.getcwd(), sys.argv[1:])")
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["show.py"])
    monkeypatch.setenv("STARTED_IN", str(tmp_path if elsewhere else project))
    told = run_folder.command(project / "my run")
    typed_in = tmp_path if elsewhere else project
    done = subprocess.run(["bash", "-c", told], cwd=typed_in, capture_output=True, text=True, check=True)
    assert done.stdout == f"{project} ['--resume', 'my run']\n"
