"""What a run of Qwen2.5-VL or Qwen3-VL leaves, whole or as adapters: plain transformers and peft open it and compute the
same; and which models are refused by name."""

import filecmp
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import finetune
from tests import runs
from tests.conftest import ROOT
from tests.official import official_config
from tests.test_lora import has_bitsandbytes
from util.adapters import lora
from util.command_line import UserError
from util.config import Config
from util.dataset import load_examples
from util.family import FAMILIES, new_model
from util.model import load_config, load_processor, load_weights
from util.publish.export import export
from util.publish.hub_files import family_tag
from util.publish.merge_lora import merge_run
from util.publish.published_files import published_config
from util.publish.save_model import write_published
from util.results import evaluate
from util.results.evaluate import Answerer, QuestionSamples, questions_of
from util.tiny_model import make_tiny_model
from util.vision import Budget

peft = pytest.importorskip("peft", reason="adapters need peft (pip install peft)")
CPU = torch.device("cpu")
NEW = ["qwen2_5_vl", "qwen3_vl"]
LONGEST = 12  # tokens of an answer
KINDS = {
    "lora": {"lora_rank": 4},
    "dora": {"lora_rank": 4, "lora_vision": True, "lora_dora": True},
    "qlora": {"lora_rank": 4, "quantize": "nf4"},
}
# config.json of https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct and https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct
PUBLISHED: dict[str, dict] = {
    "qwen2_5_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 2048, "image_token_id": 151655,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000,
        "max_window_layers": 70, "model_type": "qwen2_5_vl", "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "video_token_id": 151656, "vision_end_token_id": 151653,
        "vision_start_token_id": 151652, "vision_token_id": 151654, "vocab_size": 151936,
        "vision_config": {
            "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "hidden_size": 1280,
            "in_chans": 3, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2,
            "window_size": 112,
        },
    },
    "qwen3_vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
            "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560,
            "initializer_range": 0.02, "intermediate_size": 9728, "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text", "num_attention_heads": 32, "num_hidden_layers": 36,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936,
        },
        "tie_word_embeddings": True, "video_token_id": 151656, "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096,
            "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    },
}  # fmt: skip
QLORA = pytest.param("qlora", marks=pytest.mark.skipif(not has_bitsandbytes(), reason="NF4 needs bitsandbytes"))


def side(model_type: str) -> int:
    """Of a visual token, in pixels."""
    return 2 * FAMILIES[model_type].patch


@pytest.fixture(scope="module", params=NEW)
def model_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(model_type, tmp_path_factory) -> Path:
    """A tiny model with weights so large that other inputs get other answers."""
    path = make_tiny_model(tmp_path_factory.mktemp(model_type) / "base", model_type=model_type)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(base, model_type, tmp_path_factory):
    """A function name -> a run of two steps with these settings, made when it is first asked for."""
    folder = tmp_path_factory.mktemp(f"{model_type}_runs")
    made = {}

    def train(name: str, **changes) -> Path:
        if name not in made:
            pixels = side(model_type) ** 2
            small = {"max_pixels": 64 * pixels, "min_pixels": 4 * pixels, "max_steps": 2, "epochs": 1}
            settings = runs.settings(base, folder / name.replace(" ", "_"), **{**small, "save_every": 1, **changes})
            made[name] = Path(finetune.train(Config(**settings)))
        return made[name]

    return train


@pytest.fixture(scope="module")
def run(trained) -> Path:
    """All weights, in small steps."""
    return trained("whole", learning_rate=1e-5)


def adapters(trained, kind: str) -> Path:
    """In large ones, so that the adapters do something."""
    return trained(kind, learning_rate=1e-2, **KINDS[kind])


def text(words: str) -> dict:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def questions(model_type, tmp_path_factory, picture, write_video) -> list[list[dict]]:
    """The items of eight questions: words, pictures of several sizes, which no processor resizes, and a video."""
    folder = tmp_path_factory.mktemp("media")

    def image(seed: int, height: int, width: int) -> dict:
        path = folder / f"{seed}.png"
        Image.fromarray(picture(height * side(model_type), width * side(model_type), seed)).save(path)
        return {"type": "image", "image": str(path)}

    frames = [picture(6 * side(model_type), 8 * side(model_type), seed) for seed in (7, 7, 8, 9)]
    video = {"type": "video", "video": write_video(folder / "video.mp4", frames, fps=2)}
    return [
        [text("What is two and two?")],
        [text("Name a colour that you like, and one that you do not.")],
        [image(1, 3, 5), text("What is it?")],
        [image(2, 6, 4), text("What is it?")],
        [image(3, 2, 2), image(4, 5, 7), text("Which one is larger?")],
        [text("Look at this: "), image(5, 4, 4), text(" and say what you see.")],
        [video, text("Which way does it move?")],
        [text("Here: "), video],
    ]


@pytest.fixture(scope="module")
def prompts(run, model_type, questions, tmp_path_factory) -> list:
    """The same as this project reads them."""
    data = tmp_path_factory.mktemp("questions") / "data.json"
    answer = {"role": "assistant", "content": "?"}
    data.write_text(json.dumps([{"messages": [{"role": "user", "content": items}, answer]} for items in questions]))
    processor = load_processor(str(run))
    budget = Budget(side(model_type) ** 2, 64 * side(model_type) ** 2, model_type=model_type)
    found = QuestionSamples(questions_of(load_examples([str(data)], processor)), processor, budget)
    return [found[number][0] for number in range(len(questions))]


def plain_inputs(processor, items: list[dict], model_type: str, decode_all) -> dict:
    """What plain transformers' generate takes, by the saved processor. A video's text is put together by the released
    rules: transformers 5.24 doubles the vision marks of Qwen3-VL's pairs of frames."""
    words = processor.apply_chat_template(
        [{"role": "user", "content": items}], add_generation_prompt=True, tokenize=False
    )
    images = [Image.open(item["image"]) for item in items if item["type"] == "image"]
    videos = [torch.from_numpy(decode_all(item["video"])) for item in items if item["type"] == "video"]
    if not videos:
        return processor(text=[words], images=images or None, return_tensors="pt")
    frames = videos[0].permute(0, 3, 1, 2)
    found = processor.video_processor([frames], do_resize=False, do_sample_frames=False, return_tensors="pt")
    pairs, height, width = found["video_grid_thw"][0].tolist()
    pads = "<|video_pad|>" * (height * width // 4)
    if model_type == "qwen3_vl":  # four frames, two a second: the middle of each pair
        pair = f"<|vision_start|>{pads}<|vision_end|>"
        words = words.replace("<|vision_start|><|video_pad|><|vision_end|>", f"<0.2 seconds>{pair}<1.2 seconds>{pair}")
        more = {}
    else:
        words = words.replace("<|video_pad|>", pads * pairs)
        more = {"second_per_grid_ts": [1.0]}
    ids = processor.tokenizer([words], return_tensors="pt")
    is_video = ids["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return {**ids, **found, **more, "mm_token_type_ids": 2 * is_video.int()}


@pytest.fixture(scope="module")
def plain_answers(run, questions, model_type, decode_all) -> list[str]:
    """The greedy answers of plain transformers, one by one."""
    model, report = AutoModelForImageTextToText.from_pretrained(run, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    processor = AutoProcessor.from_pretrained(run)
    found = []
    for items in questions:
        inputs = plain_inputs(processor, items, model_type, decode_all)
        made = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ids = [number for number in made.tolist() if number not in model.generation_config.eos_token_id]
        found.append(processor.tokenizer.decode(ids))
    assert len(set(found)) >= 7, f"answers that are alike tell nothing: {found}"
    return found


# ---- a whole model --------------------------------------------------------------------------------------------------


def test_a_batch_is_answered_as_plain_transformers_answers_one_by_one(run, prompts, plain_answers, monkeypatch):
    """Prompts of eight lengths, with and without pictures, in one padded batch; and Qwen3-VL's pictures are in all of
    its first layers: without what these are given the answers are others."""
    answerer = Answerer.load(str(run), load_processor(str(run)), CPU, torch.float32)
    assert answerer.answers(prompts, LONGEST) == plain_answers
    monkeypatch.setattr(evaluate, "add_to_prompts", lambda layers, deeper: nullcontext())
    blind = answerer.answers(prompts, LONGEST)
    assert blind[:2] == plain_answers[:2], "words alone have nothing to add"
    changed = [ours != theirs for ours, theirs in zip(blind, plain_answers, strict=True)]
    assert sum(changed) >= 4 if answerer.collate.family.timestamps else not any(changed), changed


def test_answers_that_run_out_of_memory_leave_nothing_behind(run, prompts, plain_answers, monkeypatch):
    """In the midst of the first pass, after the first layer: the next batch is answered as if nothing had been."""
    answerer = Answerer.load(str(run), load_processor(str(run)), CPU, torch.float32)
    second = answerer.packed.model.model.language_model.layers[1]

    def fails(module, inputs):
        hook.remove()
        raise torch.OutOfMemoryError("planted")

    hook = second.register_forward_pre_hook(fails)
    with pytest.raises(torch.OutOfMemoryError):
        answerer.answers(prompts, LONGEST)
    assert answerer.answers(prompts[2:4], LONGEST) == plain_answers[2:4]


def test_greedy_is_the_likeliest_token_whatever_the_release_says(run, prompts, plain_answers):
    """Qwen2.5-VL's generation config has a penalty on repetition, which transformers takes for every `generate`. Here it
    is a reward, which no answer can miss."""
    answerer = Answerer.load(str(run), load_processor(str(run)), CPU, torch.float32)
    released = answerer.packed.model.generation_config
    released.repetition_penalty = 0.01
    assert answerer.answers(prompts, LONGEST) == plain_answers
    assert answerer.packed.model.generation_config is released, "it is saved with the model"
    answerer.generation.repetition_penalty = 0.01
    assert answerer.answers(prompts, LONGEST) != plain_answers, "one would have been seen"


def test_a_run_in_bf16_with_answers_goes_on_and_is_exported(trained, base, model_type, tmp_path):
    """All of it in one run; what is exported of its last checkpoint is its model, file by file."""
    evaluated = {"eval_data": [str(ROOT / "test_data" / "data.json")], "eval_samples": 3, "dtype": "bfloat16"}
    evaluated["max_pixels"] = 9 * side(model_type) ** 2
    run = trained("bf16", learning_rate=1e-4, final="last", **evaluated)
    part = tmp_path / "part"
    shutil.copytree(run, part)
    for late in ("config.json", "model.safetensors"):
        (part / late).unlink()
    shutil.rmtree(part / "checkpoints" / "step_000002")
    settings = json.loads((run / "training_config.json").read_text())
    known = {name: settings[name] for name in vars(Config()) if name in settings}
    finetune.train(Config(**{**known, "output_dir": str(part), "resume": "auto"}))
    runs.same_run(part, run)
    evaluations = [line for line in runs.log(run) if "eval_loss" in line]
    assert evaluations
    assert all("eval_exact_match" in line for line in evaluations), evaluations
    export(run / "checkpoints" / "step_000002", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert filecmp.cmp(file, run / file.name, shallow=False), file.name
    assert {tensor.dtype for tensor in load_file(run / "model.safetensors").values()} == {torch.bfloat16}


def test_a_published_config_comes_back_as_it_was(model_type, tmp_path):
    """Every key and value, through transformers' own saving."""
    official = PUBLISHED[model_type]
    (tmp_path / "config.json").write_text(json.dumps(official))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved.setdefault("dtype", "bfloat16")  # which is that of the weights beside it
    found = published_config(saved)
    for part in ("text_config", "vision_config"):
        if part in official:
            assert {key: found[part].get(key) for key in official[part]} == official[part]
    rest = {key: value for key, value in official.items() if key not in ("text_config", "vision_config")}
    assert {key: found.get(key) for key in rest} == rest


def test_the_small_files_are_those_of_the_published_repository(run, base, model_type):
    """https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct and https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct."""
    config = json.loads((run / "config.json").read_text())
    image = json.loads((run / "preprocessor_config.json").read_text())
    names = {path.name for path in run.iterdir()}
    assert {"chat_template.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"} <= names
    assert ("video_preprocessor_config.json" in names) == (model_type == "qwen3_vl")
    assert family_tag(run) == model_type, "by it the hub finds what can run the model"
    if model_type == "qwen2_5_vl":
        assert image["processor_class"] == "Qwen2_5_VLProcessor"
        assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [4, 6, 6]}
        assert (config["hidden_size"], config["rope_theta"], "text_config" in config) == (128, 1e6, False)
        assert config["vision_config"]["fullatt_block_indexes"] == [1, 3]
    else:
        text_config = config["text_config"]
        assert image["processor_class"] == "Qwen3VLProcessor"
        assert "rope_parameters" not in text_config
        assert text_config["rope_theta"] == 5e6
        rope = {"rope_type": "default", "mrope_section": [8, 8, 8], "mrope_interleaved": True}
        assert text_config["rope_scaling"] == rope
        video = json.loads((run / "video_preprocessor_config.json").read_text())
        assert (video["processor_class"], video["video_processor_type"]) == (
            "Qwen3VLProcessor",
            "Qwen3VLVideoProcessor",
        )
        assert video["size"] == AutoProcessor.from_pretrained(run).video_processor.size
    ours, theirs = AutoConfig.from_pretrained(run).to_dict(), AutoConfig.from_pretrained(base).to_dict()
    for part in ("text_config", "vision_config"):
        assert {key: ours[part].get(key) for key in theirs[part]} == {**theirs[part], "dtype": ours[part]["dtype"]} | (
            {"rope_parameters": ours[part]["rope_parameters"]} if part == "text_config" else {}
        )
    rope = {**ours["text_config"]["rope_parameters"]}
    assert {key: rope[key] for key in theirs["text_config"]["rope_parameters"]} == theirs["text_config"][
        "rope_parameters"
    ]


def test_what_is_written_is_still_there(base, tmp_path):
    """A save that fails is tried again with the same weights. An exported model was made here and not opened:
    transformers then takes what it has written out of what it is given."""
    model = new_model(load_config(str(base)))
    weights = dict(model.named_parameters())
    names = set(weights)
    write_published(model, weights, load_processor(str(base)), tmp_path)
    assert set(weights) == names


# ---- adapters -------------------------------------------------------------------------------------------------------


def adapted_by_part(model) -> dict[str, int]:
    """Numbers in adapters by part, and the linear layers that have one."""
    made = dict.fromkeys(("vision", "merger", "language_model"), 0)
    for name, parameter in model.named_parameters():
        part = "merger" if "merger" in name else "vision" if "visual" in name else "language_model"
        made[part] += parameter.numel() if ".lora_" in name else 0
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_vision": True},
        {"lora_targets": ["gate_proj"]},
        {"lora_targets": ["q_proj"], "lora_vision": True, "lora_dora": True},
        {"lora_vision": True, "freeze": ["vision"]},
        {"lora_vision": True, "freeze": ["language_model"]},
    ],
    ids=str,
)
def test_adapters_are_where_they_are_asked_for_and_counted(base, changes):
    """By the names of the parts alone: of a part with adapters in the tower or the merger every linear layer has one."""
    settings, model_config = Config(lora_rank=3, **changes), load_config(str(base))
    with torch.device("meta"):
        model = new_model(model_config)
        layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        lora.add_adapters(model, settings)
    expected = set()
    for name in layers - {"lm_head"}:
        if ".language_model." in name:
            chosen = "language_model" not in settings.freeze and name.rpartition(".")[2] in settings.lora_targets
        else:
            chosen = settings.lora_vision and ("merger" if "merger" in name else "vision") not in settings.freeze
        if chosen:
            expected.add(name)
    made = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert made == expected
    assert lora.count_adapters(model_config, settings) == adapted_by_part(model)


@pytest.mark.parametrize(
    ("model_type", "q_and_v", "vision", "merger"),
    [
        # 8 x (2048 + 2048) + 8 x (2048 + 256) in 36 layers; 4 matrices beside a gate in 32 blocks; 5120 -> 5120 -> 2048
        (
            "qwen2_5_vl",
            36 * 8 * (4096 + 2304),
            32 * 8 * ((1280 + 3840) + 2560 + 3 * (1280 + 3420)),
            8 * (10240 + 5120 + 2048),
        ),
        # queries are 32 x 128 wide, keys and values 8 x 128; 24 blocks; four mergers 4096 -> 4096 -> 2560
        (
            "qwen3_vl",
            36 * 8 * (2560 + 4096 + 2560 + 1024),
            24 * 8 * ((1024 + 3072) + 2048 + 2 * (1024 + 4096)),
            4 * 8 * (8192 + 4096 + 2560),
        ),
    ],
    ids=NEW,
)
def test_adapters_of_published_models_are_counted_as_by_hand(model_type, q_and_v, vision, merger):
    model_config = AutoConfig.for_model(**PUBLISHED[model_type])
    settings = Config(lora_rank=8, lora_targets=["q_proj", "v_proj"], lora_vision=True)
    expected = {"vision": vision, "merger": merger, "language_model": q_and_v}
    assert lora.count_adapters(model_config, settings) == expected


def test_those_of_qwen2_vl_keep_their_names_and_numbers():
    """The formulas of its config, which stood here before there were other families."""
    model_config = official_config("7b")
    shapes = lora.linear_layers(model_config)
    assert shapes["vision"] == {
        "attn.qkv": (1280, 3840, 32), "attn.proj": (1280, 1280, 32), "mlp.fc1": (1280, 5120, 32),
        "mlp.fc2": (5120, 1280, 32),
    }  # fmt: skip
    assert shapes["merger"] == {"merger.mlp.0": (5120, 5120, 1), "merger.mlp.2": (5120, 3584, 1)}
    assert shapes["language_model"] == {
        "q_proj": (3584, 3584, 28), "k_proj": (3584, 512, 28), "v_proj": (3584, 512, 28), "o_proj": (3584, 3584, 28),
        "gate_proj": (3584, 18944, 28), "up_proj": (3584, 18944, 28), "down_proj": (18944, 3584, 28),
    }  # fmt: skip
    with torch.device("meta"):
        model = new_model(model_config)
    lora.add_adapters(model, Config(lora_rank=8))
    assert model.peft_config["default"].target_modules == set(shapes["language_model"])


def logits(model, processor) -> torch.Tensor:
    """Of a picture and a question, by transformers' own forward pass: (1, T, vocabulary)."""
    image = Image.effect_mandelbrot((128, 96), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    content = [{"type": "image"}, text("What colour is the triangle?")]
    words = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with torch.no_grad():
        return model.eval()(**processor(text=[words], images=[image], return_tensors="pt")).logits


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_plain_peft_opens_adapters(trained, base, kind):
    """The base by transformers, the adapter by peft: the same logits as here, and not the base's."""
    run = adapters(trained, kind)
    saved = load_file(run / "adapter_model.safetensors")
    assert any(".visual." in name for name in saved) == ("lora_vision" in KINDS[kind])
    processor = AutoProcessor.from_pretrained(run)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    before = logits(model, processor)
    opened = peft.PeftModel.from_pretrained(model, str(run))
    assert {name for name in opened.state_dict() if ".lora_" in name} == {
        name.replace(".weight", ".default.weight").replace("magnitude_vector", "magnitude_vector.default.weight")
        for name in saved
    }
    theirs = logits(opened, processor)
    ours = logits(load_weights(str(run), torch.float32, CPU), processor)
    assert (ours - before).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_new_tokens_beside_adapters(trained, base, tmp_path):
    """The rows of two new tokens, in unused rows of the vocabulary, are trained and saved as peft opens them."""
    (tmp_path / "tokens.txt").write_text("<move_left>\n<move_right>\n")
    samples = [
        {"messages": [{"role": "user", "content": f"Go {way}."}, {"role": "assistant", "content": f"<move_{way}>"}]}
        for way in ("left", "right")
    ]
    (tmp_path / "moves.json").write_text(json.dumps(samples))
    data = {"data": [str(tmp_path / "moves.json")], "new_tokens": str(tmp_path / "tokens.txt")}
    run = trained("new tokens", learning_rate=1e-2, lora_rank=4, **data)
    tokenizer = AutoProcessor.from_pretrained(run).tokenizer
    inputs = tokenizer("Go <move_left>, then <move_right>!", return_tensors="pt")
    (row,) = tokenizer("<move_left>").input_ids
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    pieces = AutoProcessor.from_pretrained(base).tokenizer("<move_left>").input_ids
    began = model.get_input_embeddings().weight[pieces].mean(0)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, str(run)).eval()(**inputs).logits
        ours = load_weights(str(run), torch.float32, CPU)
        torch.testing.assert_close(ours.eval()(**inputs).logits, theirs, rtol=1e-4, atol=1e-4)
        trained_row = load_file(run / "adapter_model.safetensors")
    (rows,) = (tensor for name, tensor in trained_row.items() if ".lora_" not in name)
    assert rows.shape == (2, began.shape[0])
    assert (rows[0] - began).abs().max() > 1e-3, "it was trained"
    merge_run(str(run), tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged.get_input_embeddings().weight[row], rows[0])
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**inputs).logits, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", QLORA])
def test_merged_and_adapters_compute_the_same(trained, kind, tmp_path):
    """And plain transformers opens what was merged."""
    run = adapters(trained, kind)
    merge_run(str(run), tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = load_weights(str(run), torch.float32, CPU)
    in_four_bits = [
        name for name, module in ours.named_modules() if hasattr(getattr(module, "weight", None), "quant_state")
    ]
    layers = {name.removesuffix(".base_layer") for name in in_four_bits}
    assert len(layers) == (7 * 4 if kind == "qlora" else 0)
    torch.testing.assert_close(logits(merged, processor), logits(ours, processor), rtol=1e-4, atol=1e-4)


def test_adapters_of_a_checkpoint_are_exported(trained, tmp_path):
    run = adapters(trained, "dora")
    export(run / "checkpoints" / "step_000002", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert filecmp.cmp(file, run / file.name, shallow=False), file.name


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "qwen2_5_omni"}, "is a qwen2_5_omni model: it hears and speaks"),
        ({"model_type": "qwen3_omni_moe"}, "is a qwen3_omni_moe model: it hears and speaks"),
        ({"model_type": "qwen3_vl_moe"}, "is a qwen3_vl_moe model: its layers are mixtures of experts"),
        ({"model_type": "qwen3_5"}, "is a qwen3_5 model: its layers have gated DeltaNet"),
        ({"model_type": "qwen3_5_moe"}, "is a qwen3_5_moe model: its layers have gated DeltaNet"),
        ({"model_type": "qwen2"}, "is a qwen2 model"),
        ({"model_type": "qwen9_vl"}, "its config.json is of no known model"),
    ],
)
def test_other_models_are_refused_by_name(config, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path))
    message = str(caught.value)
    assert told in message
    assert config["model_type"] in message
    trained_here = "this project trains Qwen2-VL (qwen2_vl), Qwen2.5-VL (qwen2_5_vl), Qwen3-VL (qwen3_vl)"
    assert message.endswith(trained_here), message


@pytest.mark.parametrize("kind", ["awq", "gptq", "fp8", "bitsandbytes"])
def test_a_release_of_rounded_weights_is_refused(base, kind, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": kind}}))
    with pytest.raises(UserError, match=rf"is quantised already \({kind}\).*take the release that is not"):
        load_config(str(tmp_path))
