"""A saved model's small files are those of Qwen's own repository, which programs of many ages read; and transformers
of today reads them as its own."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers import Qwen2VLForConditionalGeneration as Plain

import finetune
from tests import runs
from util.config import Config
from util.publish.published_files import published_config
from util.publish.save_model import write_published

# config.json of Qwen/Qwen2-VL-2B-Instruct, read there by name by programs that know no `text_config`
FLAT = {
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "image_token_id",
    "initializer_range", "intermediate_size", "max_position_embeddings", "max_window_layers", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "torch_dtype", "use_cache", "use_sliding_window", "video_token_id",
    "vision_config", "vision_end_token_id", "vision_start_token_id", "vision_token_id", "vocab_size",
}  # fmt: skip
FLAT_VISION = {
    "depth", "embed_dim", "hidden_size", "in_chans", "mlp_ratio", "num_heads", "patch_size", "spatial_merge_size",
    "spatial_patch_size", "temporal_patch_size",
}  # fmt: skip
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}


def read(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("published") / "run"
    return Path(finetune.train(Config(**runs.settings(tiny_path, folder, max_steps=1, epochs=1))))


@pytest.fixture(scope="session")
def reference(official_processor) -> Path:
    """The folder of the published files."""
    return Path(official_processor.tokenizer.name_or_path)


def test_every_flat_key_is_there(run):
    config = read(run / "config.json")
    assert FLAT - set(config) == set()
    assert FLAT_VISION - set(config["vision_config"]) == set()
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [4, 6, 6]}
    assert (config["rope_theta"], config["torch_dtype"]) == (1e6, "float32")
    assert (config["hidden_size"], config["num_hidden_layers"]) == (128, 4)  # tiny's
    assert "text_config" not in config, "transformers before 4.52 takes it for a stranger, and a copy can disagree"
    assert config["use_cache"] is True, "training does without, answering does not"


def test_plain_transformers_reads_the_same_config_and_gives_the_same_logits(run, tiny_path, tmp_path):
    """The base was written by transformers itself, in its own layout."""
    ours, base = AutoConfig.from_pretrained(run).to_dict(), AutoConfig.from_pretrained(tiny_path).to_dict()
    assert ours["text_config"]["rope_parameters"].pop("type") == "mrope"  # as the published file has it
    assert ours.pop("vision_token_id") == AutoTokenizer.from_pretrained(run).convert_tokens_to_ids("<|vision_pad|>")
    assert ours["vision_config"].pop("in_chans") == 3
    assert ours["vision_config"].pop("spatial_patch_size") == 14
    for config in (ours, base):  # where it was read, and in which precision the weights are
        config["dtype"] = config["text_config"]["dtype"] = config["vision_config"]["dtype"] = None
        config["_name_or_path"] = None
    assert ours == base
    opened, problems = AutoModelForImageTextToText.from_pretrained(run, dtype="auto", output_loading_info=True)
    assert not any(problems.values()), problems
    nested = tmp_path / "nested"
    nested.mkdir()
    shutil.copyfile(tiny_path / "config.json", nested / "config.json")
    shutil.copyfile(run / "model.safetensors", nested / "model.safetensors")
    same = AutoModelForImageTextToText.from_pretrained(nested, dtype="auto").eval()
    ids = torch.randint(0, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(opened.eval()(ids).logits, same(ids).logits)


def test_the_tokenizer_is_the_same_under_the_published_keys(run, tiny_path):
    settings = read(run / "tokenizer_config.json")
    ours, base = AutoTokenizer.from_pretrained(run), AutoTokenizer.from_pretrained(tiny_path)
    assert "extra_special_tokens" not in settings, "transformers before 5 fails on a list under this name"
    assert set(settings["additional_special_tokens"]) == set(
        read(tiny_path / "tokenizer_config.json")["extra_special_tokens"]
    )
    assert not {"is_local", "local_files_only"} & set(settings), "how it was opened here is nobody's business"
    special = settings["added_tokens_decoder"][str(base.convert_tokens_to_ids("<|image_pad|>"))]
    assert special == {"content": "<|image_pad|>", "lstrip": False, "normalized": False, "rstrip": False,
                       "single_word": False, "special": True}  # fmt: skip
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where is it? Ünïcode 你好<|im_end|>\n"
    assert ours(text).input_ids == base(text).input_ids
    assert ours.all_special_tokens == base.all_special_tokens
    assert ours.get_vocab() == base.get_vocab()
    model = read(run / "tokenizer.json")["model"]
    assert read(run / "vocab.json") == model["vocab"]
    merges = [line for line in (run / "merges.txt").read_text().splitlines() if not line.startswith("#version")]
    assert merges == [" ".join(pair) for pair in model["merges"]]


@pytest.mark.parametrize("name", ["config.json", "config.7b.json"])
def test_a_published_config_comes_back_as_it_was(reference, tmp_path, name):
    """Every key and value of 2B and 7B, through transformers' own saving; and from it the same config is made."""
    config = AutoConfig.from_pretrained(reference / name)
    config.save_pretrained(tmp_path)
    published = published_config(read(tmp_path / "config.json"))
    official = read(reference / name)
    vision = official.pop("vision_config")
    assert {key: published.get(key) for key in official} == official
    assert {key: published["vision_config"].get(key) for key in vision} == vision
    (tmp_path / "config.json").write_text(json.dumps(published))
    again = AutoConfig.from_pretrained(tmp_path)
    for either in (config, again):
        either.vision_config.dtype = None  # the published file says it once, for all
    assert again.to_dict() == {**config.to_dict(), "_name_or_path": again.name_or_path}


def test_a_model_in_the_published_layout_loses_no_file_and_no_key(reference, official_processor, tmp_path):
    """A small one with the published vocabulary; its numbers differ in size and precision alone."""
    official = read(reference / "config.json")
    small = {**official, **SMALL, "vision_config": {**official["vision_config"], **SMALL_VISION}}
    small["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(small))
    model = Plain(AutoConfig.from_pretrained(tmp_path / "base"))
    model.generation_config = GenerationConfig.from_pretrained(reference)
    write_published(model, dict(model.named_parameters()), official_processor, tmp_path / "out")
    for file in sorted(reference.glob("*.json")):
        if file.name != "config.7b.json":
            saved, published = read(tmp_path / "out" / file.name), read(file)
            assert set(published) - set(saved) == set(), f"{file.name}: keys are missing"
            if file.name not in ("config.json", "tokenizer.json"):
                assert {key: saved[key] for key in published} == published, file.name
    saved = read(tmp_path / "out" / "config.json")
    assert {key: saved[key] for key in small} == {**small, "torch_dtype": "float32"} | {
        "vision_config": saved["vision_config"]
    }
    assert {key: saved["vision_config"][key] for key in small["vision_config"]} == small["vision_config"]
    vocabulary = read(tmp_path / "out" / "vocab.json")
    assert vocabulary == read(reference / "tokenizer.json")["model"]["vocab"]


def test_an_adapter_has_no_config_but_the_processors_files(run, tmp_path):
    settings = runs.settings(run, tmp_path / "adapter", max_steps=1, epochs=1, lora_rank=2)
    adapter = Path(finetune.train(Config(**settings)))
    assert not (adapter / "config.json").exists()
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "preprocessor_config.json", "chat_template.json"):
        assert (adapter / name).read_text() == (run / name).read_text(), name
    assert re.search("image_pad", (adapter / "chat_template.json").read_text())
