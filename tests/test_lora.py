"""Adapters (LoRA, DoRA, QLoRA): against sums by hand, plain peft, and plain transformers."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLForConditionalGeneration

import finetune
from tests import runs, warm
from tests.official import official_config
from util.adapters import lora
from util.checkpoint import TensorReader
from util.collator import Collator
from util.command_line import UserError
from util.config import Config
from util.cost import flops, memory
from util.dataset import Samples, Size, load_examples
from util.mixed_adamw import exact_value
from util.model import build_model, load_config, load_processor, load_weights
from util.optimizer import build_optimizer
from util.publish import merge_lora
from util.publish.export import export
from util.publish.merge_lora import merge_run
from util.results.evaluate import Answerer, ask
from util.vision import Budget, Grid

peft = pytest.importorskip("peft", reason="adapters need peft (pip install peft)")
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DATA = ROOT / "train_data" / "data.json"
KINDS = {
    "lora": {"lora_rank": 4},
    "lora in the tower": {"lora_rank": 4, "lora_vision": True},
    "dora": {"lora_rank": 4, "lora_dora": True},
    "rslora": {"lora_rank": 4, "lora_rslora": True, "learning_rate": 1e-2},
    "dora with rslora": {"lora_rank": 4, "lora_dora": True, "lora_rslora": True, "learning_rate": 1e-2},
    "qlora": {"lora_rank": 4, "quantize": "nf4"},
}


def needs_bitsandbytes(kind: str):
    return pytest.param(kind, marks=[]) if "quantize" not in KINDS[kind] else pytest.param(
        kind, marks=pytest.mark.skipif(not has_bitsandbytes(), reason="NF4 needs bitsandbytes"))  # fmt: skip


def has_bitsandbytes() -> bool:
    try:
        lora.import_bitsandbytes()
    except UserError:
        return False
    return True


ALL_KINDS = [needs_bitsandbytes(kind) for kind in KINDS]


def settings(tiny_path: Path, directory: Path, **changes) -> dict:
    own = {"data": [str(DATA)], "max_steps": 4, "learning_rate": 2e-2, "max_pixels": 28 * 28 * 8}
    return runs.settings(tiny_path, directory, **{**own, **changes})


@pytest.fixture(scope="module")
def trained(tiny_path, tmp_path_factory) -> dict[str, Path]:
    """A short run of each kind, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}

    def train(kind: str) -> Path:
        if kind not in made:
            changes = {**KINDS[kind], "save_every": 2}
            made[kind] = Path(finetune.train(Config(**settings(tiny_path, folder / kind.replace(" ", "_"), **changes))))
        return made[kind]

    return train


@pytest.fixture(scope="module")
def batch(processor):
    """A packed batch of the showcase: pictures, videos and texts."""
    samples = Samples(load_examples([str(DATA)], processor), processor, Budget(3136, 28 * 28 * 8))
    return Collator()([samples[index] for index in range(0, len(samples), 3)])


def logits(model, processor) -> torch.Tensor:
    """Of one picture and a question, by transformers' own forward pass: (1, T, vocabulary)."""
    from PIL import Image

    image = Image.effect_mandelbrot((112, 84), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the triangle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with torch.no_grad():
        return model.eval()(**processor(text=[text], images=[image], return_tensors="pt")).logits


# ---- what is adapted, and how many numbers that is ------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [("2b", 1_089_536), ("7b", 2_523_136)])
def test_rank_8_on_q_and_v_of_the_published_models(size, expected):
    """8 x (1536 + 1536) + 8 x (1536 + 256) in each of 28 layers; 8 x (3584 + 3584) + 8 x (3584 + 512) likewise."""
    settings = Config(lora_rank=8, lora_targets=["q_proj", "v_proj"], lora_dropout=0.05)
    model_config = official_config(size)
    assert sum(lora.count_adapters(model_config, settings).values()) == expected
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(model_config)
        lora.add_adapters(model, settings)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("changes", [{}, {"lora_vision": True}, {"lora_dora": True, "lora_vision": True, "freeze": ["merger"]},
                                     {"lora_vision": True, "freeze": ["language_model"]}])  # fmt: skip
def test_counted_adapters_are_those_that_peft_makes(tiny_path, changes):
    settings, model_config = Config(lora_rank=3, **changes), load_config(str(tiny_path))
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(model_config)
        lora.add_adapters(model, settings)
    made = dict.fromkeys(("vision", "merger", "language_model"), 0)
    for name, parameter in model.named_parameters():
        part = "merger" if "merger" in name else "vision" if "visual" in name else "language_model"
        made[part] += parameter.numel() if parameter.requires_grad else 0
    assert lora.count_adapters(model_config, settings) == made


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_adapters_alone_have_gradients_and_optimizer_state(tiny_path, processor, batch, kind):
    config = Config(model=str(tiny_path), device="cpu", dtype="float32", **KINDS[kind])
    model = build_model(config, str(tiny_path), processor, CPU)
    model(batch).backward()
    optimizer = build_optimizer(model, config)
    optimizer.step()
    adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapters
    assert {name for name, p in model.named_parameters() if p.grad is not None} == adapters
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state) == len(adapters)
    quantised = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and not hasattr(m, "lora_A")]
    assert len(quantised) == (7 * load_config(str(tiny_path)).text_config.num_hidden_layers if kind == "qlora" else 0)


def test_untrained_adapters_change_nothing(tiny_path, processor, batch):
    with torch.no_grad():
        plain = build_model(Config(device="cpu", dtype="float64"), str(tiny_path), processor, CPU)(batch)
        for kind in ("lora in the tower", "dora"):
            config = Config(device="cpu", dtype="float64", **KINDS[kind])
            adapted = build_model(config, str(tiny_path), processor, CPU)(batch)
            torch.testing.assert_close(adapted, plain, rtol=1e-12, atol=0)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_run_learns_and_saves_adapters_only(trained, tiny_path, kind):
    run = trained(kind)
    losses = runs.metrics(run)
    assert losses[-1] < losses[0] - 0.5, f"the loss did not fall: {losses}"
    assert not (run / "model.safetensors").exists()
    assert all(".lora_" in name for name in load_file(run / "adapter_model.safetensors"))
    held = TensorReader(run / "checkpoints" / "step_000004").read_metadata().state_dict_metadata
    weights = {key for key in held if key.startswith("model.")}
    assert len(weights) >= 2 * 7 * load_config(str(tiny_path)).text_config.num_hidden_layers
    assert len(weights) == len(load_file(run / "adapter_model.safetensors"))
    assert all(".lora_" in key for key in weights), "a checkpoint holds adapters and no weight beside them"


@pytest.mark.parametrize("kind", ["lora", pytest.param("qlora", marks=ALL_KINDS[-1].marks)])
def test_resumed_with_dropout_it_is_the_same_run(tiny_path, tmp_path, kind):
    changes = {**KINDS[kind], "lora_dropout": 0.3, "save_every": 2, "lora_vision": True}
    whole = Path(finetune.train(Config(**settings(tiny_path, tmp_path / "whole", **changes))))
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for late in ("adapter_config.json", "adapter_model.safetensors", "checkpoints/step_000004"):
        path = part / late
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finetune.train(Config(**settings(tiny_path, part, **changes, resume="auto")))
    ours, theirs = (load_file(run / "adapter_model.safetensors") for run in (part, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert runs.losses(part) == runs.losses(whole)


def test_bf16_keeps_the_base_in_bf16_and_the_adapters_exact(tiny_path, tmp_path, trained, processor):
    config = Config(model=str(tiny_path), device="cpu", dtype="bfloat16", lora_rank=4)
    model = build_model(config, str(tiny_path), processor, CPU)
    widths = {(".lora_" in name): set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        widths[".lora_" in name].add(exact_value(parameter).dtype)
    assert widths == {True: {torch.float32}, False: {torch.bfloat16}}
    run = finetune.train(Config(**settings(tiny_path, tmp_path / "run", dtype="bfloat16", **KINDS["lora"])))
    torch.testing.assert_close(runs.metrics(run), runs.metrics(trained("lora")), rtol=0.05, atol=0)


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "lora in the tower", "dora", "rslora", "dora with rslora"])
def test_plain_peft_and_plain_transformers_open_it(tiny_path, trained, processor, kind):
    """The base model by transformers, the adapter by peft: the same logits as ours, and not the base's."""
    run = str(trained(kind))
    base = Qwen2VLForConditionalGeneration.from_pretrained(tiny_path, dtype=torch.float32)
    before = logits(base, processor)
    theirs = logits(peft.PeftModel.from_pretrained(base, run), processor)
    ours = logits(load_weights(run, torch.float32, CPU), processor)
    assert (ours - before).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if "lora_dora" not in KINDS[kind]:  # transformers 5.23 by itself leaves DoRA's magnitudes as they were made
        opened = AutoModelForImageTextToText.from_pretrained(run, dtype=torch.float32)
        torch.testing.assert_close(logits(opened, processor), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "scale"), [("lora in the tower", 16 / 4), ("rslora", 16 / 2)])
def test_merged_weights_are_the_sum_by_hand(tiny_path, trained, tmp_path, kind, scale):
    """Rank 4: alpha / rank, and with rsLoRA alpha / sqrt(rank)."""
    run = trained(kind)
    merge_run(str(run), tmp_path / "merged")
    before, after = load_file(tiny_path / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    adapters = load_file(run / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    text, tower = load_config(str(tiny_path)).text_config, load_config(str(tiny_path)).vision_config
    in_the_tower = 4 * tower.depth + 2 if "lora_vision" in KINDS[kind] else 0
    assert len(adapters) == 2 * (7 * text.num_hidden_layers + in_the_tower), "A and B of every linear layer"
    published = {  # the names of modules in memory, and in the published files
        key.replace("base_model.model.model.language_model.", "model.").replace(
            "base_model.model.model.visual.", "visual."
        ): low
        for key, low in adapters.items()
    }
    for name, weight in before.items():
        low = published.pop(name.replace(".weight", ".lora_A.weight"), None)
        if low is not None:
            high = published.pop(name.replace(".weight", ".lora_B.weight"))
            weight = (weight.double() + scale * high.double() @ low.double()).float()
        torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-6, msg=f"{name} is not W + scale B A")
    assert not published, "adapters of no weight"


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_merged_and_adapter_answer_alike(trained, processor, tmp_path, kind):
    """To 1e-5, and plain transformers opens what was merged."""
    run = trained(kind)
    merge_run(str(run), tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = logits(load_weights(str(run), torch.float32, CPU), processor)
    torch.testing.assert_close(logits(merged, processor), ours, rtol=1e-5, atol=1e-5)
    saved = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert saved["max_pixels"] == 28 * 28 * 8, "the pixel budget of training goes along"


@pytest.mark.skipif(not has_bitsandbytes(), reason="NF4 needs bitsandbytes")
def test_four_bits_are_opened_as_four_bits(trained, tiny_path, processor):
    run = str(trained("qlora"))
    model = load_weights(run, torch.float32, CPU)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    plain = Qwen2VLForConditionalGeneration.from_pretrained(tiny_path, dtype=torch.float32)
    difference = (logits(model, processor) - logits(peft.PeftModel.from_pretrained(plain, run), processor)).abs().max()
    assert difference > 1e-3, "4 bits are not the weights themselves"


@pytest.mark.parametrize(
    "kind",
    [pytest.param("lora in the tower", marks=pytest.mark.slow), pytest.param("qlora", marks=ALL_KINDS[-1].marks)],
)
def test_the_test_script_opens_a_run_and_what_was_merged(trained, tmp_path, kind):
    """Both give the same answers through the command line's own functions."""
    merge_run(str(trained(kind)), tmp_path / "merged")
    answers = {}
    for name, path in (("run", trained(kind)), ("merged", tmp_path / "merged")):
        command = [sys.executable, "test_on_trained_model.py", str(path), "--data", "test_data/data.json", "--device", "cpu",
                   "--dtype", "float32", "--max_new_tokens", "4", "--output_dir", str(tmp_path / name)]  # fmt: skip
        done = warm.run(command)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "after.jsonl").read_text().splitlines()[1:]
        answers[name] = [json.loads(line)["answer"] for line in lines]
    assert len(answers["run"]) > 10
    assert answers["run"] == answers["merged"]


def test_the_last_lines_name_the_command_that_merges(tiny_path, tmp_path, capsys):
    """As it is printed, it makes a model of the run. The first ones say the rate of a run that names none."""
    run = tmp_path / "run"
    finetune.train(Config(**settings(tiny_path, run, **KINDS["lora"], max_steps=1, learning_rate=None)))
    said = capsys.readouterr().out
    assert "learning rate  0.0001, the default of adapters\n" in said
    assert json.loads((run / "training_config.json").read_text())["learning_rate"] == 1e-4
    line = next(line for line in said.splitlines() if "-m util merge" in line)
    words = shlex.split(line.rpartition(": ")[2])
    assert words[1:] == ["-m", "util", "merge", str(run), f"{run}_merged"]
    merge_lora.main(words[4:])
    assert (tmp_path / "run_merged" / "model.safetensors").exists()


def test_a_checkpoint_older_than_a_flag_of_adapters_is_exported(trained, tmp_path):
    """Its settings do not name --lora_rslora."""
    older = tmp_path / "older"
    shutil.copytree(trained("lora"), older)
    known = json.loads((older / "training_config.json").read_text())
    assert known.pop("lora_rslora") is False
    (older / "training_config.json").write_text(json.dumps(known))
    export(older / "checkpoints" / "step_000004", tmp_path / "out")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", older))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- forecasts ------------------------------------------------------------------------------------------------------


def test_work_and_memory_are_forecast(tiny_path):
    """7B: 133 GB of weights, gradients and moments; with adapters its weights in bf16, in 4 bits about a third of it."""
    model_config, sizes = official_config("7b"), [Size(1000, 20, [Grid(1, 40, 40)])]

    def parts(**changes) -> dict:
        config = Config(**changes)
        counts = memory.count_parameters(model_config, config)
        return memory.forecast(model_config, counts, config, torch.bfloat16, [(1000, 1600, 20)], passes=2)

    full, plain, small = parts(), parts(lora_rank=8), parts(lora_rank=8, quantize="nf4")
    gb = {name: sum(p[key] for key in ("weights", "gradients", "moments")) / 1e9 for name, p in
          (("full", full), ("lora", plain), ("qlora", small))}  # fmt: skip
    assert gb["full"] == pytest.approx(16 * 8.291375616)
    adapters = 8 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert gb["lora"] == pytest.approx(2 * 8.291375616 + 16 * adapters / 1e9)
    linear = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    four_bits = linear * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * (8_291_375_616 - linear)
    assert gb["qlora"] == pytest.approx((four_bits + 16 * adapters) / 1e9)
    work = {name: flops.training_flops(model_config, sizes, Config(**changes)) for name, changes in
            (("full", {}), ("lora", {"lora_rank": 8}), ("tower", {"lora_rank": 8, "lora_vision": True}))}  # fmt: skip
    assert work["lora"] < work["tower"] < work["full"]


@pytest.mark.skipif(not has_bitsandbytes(), reason="NF4 needs bitsandbytes")
def test_four_bits_take_what_the_forecast_says(tiny_path):
    """One layer of the 2B's width, its bytes counted in bitsandbytes' own tensors."""
    linear = torch.nn.Linear(1536, 8960, bias=False)
    functional = lora.import_bitsandbytes().functional
    packed, state = functional.quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held / linear.weight.numel() == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-3)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_rank": -1}, "--lora_rank -1: must be at least 0"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "--lora_dropout 1.0: must be at least 0 and below 1"),
        ({"lora_rank": 4, "lora_alpha": 0}, "--lora_alpha 0: must be at least 1"),
        ({"quantize": "nf4"}, "--quantize nf4 needs --lora_rank"),
        ({"lora_vision": True}, "--lora_vision needs --lora_rank"),
        ({"lora_rslora": True}, "--lora_rslora needs --lora_rank"),
        ({"lora_rank": 4, "freeze": ["language_model"]}, "no layer is left to get adapters"),
        ({"lora_rank": 4, "vision_learning_rate": 1e-5}, "--vision_learning_rate is given, but no adapter is there"),
        ({"lora_rank": 4, "quantize": "nf4", "dtype": "float64"}, "not in float64"),
    ],
)
def test_settings_that_cannot_be(changes, told):
    with pytest.raises(UserError) as caught:
        Config(**changes)
    assert told in str(caught.value)


def test_an_adapter_is_no_model_to_train(trained):
    with pytest.raises(UserError, match=r"is an adapter; first make a model of it: python -m util merge"):
        load_config(str(trained("lora")))


def test_what_cannot_be_merged_is_named(trained, tiny_path, tmp_path):
    with pytest.raises(UserError, match="no adapter there"):
        merge_run(str(tiny_path), tmp_path / "out")
    with pytest.raises(UserError, match="holds a model already"):
        merge_run(str(trained("lora")), tiny_path)
    broken = tmp_path / "broken"
    shutil.copytree(trained("lora"), broken)
    (broken / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="its adapter weights cannot be read"):
        merge_run(str(broken), tmp_path / "out")
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"its adapter_config\.json cannot be read"):
        merge_run(str(broken), tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(trained("lora"), other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "r": 8}))
    with pytest.raises(UserError, match="its adapters do not fit"):
        merge_run(str(other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_config_names_a_base_that_others_find(trained, tiny_path):
    assert AutoConfig.from_pretrained(lora.base_of(str(trained("lora")))).model_type == "qwen2_vl"


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_the_lines_of_the_page_open_it(tiny_path, tmp_path, kind):
    """Run as a user would, in a process that knows nothing of this project; the answer is ours."""
    changes = {**KINDS["lora"], "max_steps": 2, "learning_rate": 2e-3}  # so little that it still answers something
    run = Path(finetune.train(Config(**settings(tiny_path, tmp_path / "run", **changes))))
    if kind == "merged":
        merge_run(str(run), tmp_path / "merged")
        run = tmp_path / "merged"
    lines = (ROOT / "docs" / "serving.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'run = "train_output/latest"' in lines
    (tmp_path / "lines.py").write_text(lines.replace('"train_output/latest"', repr(str(run))))
    done = subprocess.run(
        [sys.executable, tmp_path / "lines.py"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    picture = {"type": "image", "image": str(ROOT / "test_data" / "media" / "0000_colour_0.png")}
    question = [{"role": "user", "content": [picture, {"type": "text", "text": "What colour is it?"}]}]
    own = load_processor(str(run))
    answerer = Answerer.load(str(run), own, CPU, torch.float32)
    ours = ask(answerer, question, Budget(3136, 28 * 28 * 8), 64)
    assert ours
    assert done.stdout == own.tokenizer.decode(own.tokenizer(ours).input_ids, skip_special_tokens=True) + "\n"
