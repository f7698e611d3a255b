"""`tiny`, the embedded default: a small real Qwen2-VL checkpoint, made on the spot; and one of each other family.

Each is a model of about a million random parameters with a real processor, saved in the published format and loaded
through the path that an official checkpoint takes. Its vocabulary is a byte-level BPE trained on the conversations of
`train_data/data.json`. The same sources give the same bytes.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from util.family import FAMILIES, QWEN2_VL, new_model
from util.run_folder import ROOT

TINY_MODELS = {"tiny": "qwen2_vl", "tiny-qwen2.5-vl": "qwen2_5_vl", "tiny-qwen3-vl": "qwen3_vl"}  # values of --model
TEXTS = ROOT / "train_data" / "data.json"

# The special tokens of Qwen2-VL in their published order (tokenizer_config.json of Qwen/Qwen2-VL-2B-Instruct).
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

# About 1 / sqrt(hidden size), so that signals keep their size from layer to layer. The published 0.02 suits widths of
# thousands; at a width of 128 it left the model blind to its images for 400 steps (loss 0.54 against 0.13).
INITIALIZER_RANGE = 0.08

DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."

# Written for this project; behaves as the published template does (tests compare the two).
DEFAULT_SYSTEM_TURN = """\
{%- if messages and messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nDEFAULT_SYSTEM_MESSAGE<|im_end|>\\n' -}}
{%- endif -%}
"""
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
DEFAULT_SYSTEM_TURN
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
{%- set seen.images = seen.images + 1 -%}
{{- ('Picture ' ~ seen.images ~ ': ' if add_vision_id else '') + '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif item.type == 'video' or 'video' in item -%}
{%- set seen.videos = seen.videos + 1 -%}
{{- ('Video ' ~ seen.videos ~ ': ' if add_vision_id else '') + '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in item -%}
{{- item.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_tiny_model(directory: Path | None = None, seed: int = 0, model_type: str = QWEN2_VL) -> Path:
    """Write the tiny checkpoint of a family, unless this version of it is there already, and return its directory."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = "tiny_model" if model_type == QWEN2_VL else f"tiny_{model_type}"
    directory = Path(directory or ROOT / "train_output" / name)
    sources = Path(__file__).read_bytes() + TEXTS.read_bytes() + f"{transformers.__version__} {seed}".encode()
    stamp = hashlib.sha256(sources).hexdigest()
    stamp_file = directory / "made_from.txt"
    if stamp_file.exists() and stamp_file.read_text(encoding="utf-8") == stamp:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".tiny_model_", dir=directory.parent))
    processor = make_processor(conversation_texts(TEXTS), model_type)
    processor.save_pretrained(unfinished)
    make_model(processor.tokenizer, seed, model_type).save_pretrained(unfinished)
    (unfinished / "made_from.txt").write_text(stamp, encoding="utf-8")
    if directory.exists():
        shutil.rmtree(directory)
    try:
        os.rename(unfinished, directory)  # complete or absent
    except OSError:  # another process was faster and wrote the same bytes
        shutil.rmtree(unfinished)
    return directory


def conversation_texts(data_file: Path) -> list[str]:
    """The words that the template puts around the messages of a data file, and their texts; of samples with tools or
    box items, which say little about the demonstration's words, there is none: with them the vocabulary and all figures
    measured with it would be others."""
    texts = []
    for example in json.loads(data_file.read_text(encoding="utf-8")):
        roles = [message["role"] for message in example["messages"]]
        texts += roles if "system" in roles else ["system", DEFAULT_SYSTEM_MESSAGE, *roles]
        items: list[dict] = []
        for message in example["messages"]:
            content = message["content"]
            items += [{"text": content}] if isinstance(content, str) else content
        if "tools" not in example and not any(item.get("type") == "box" for item in items):
            texts += [item["text"] for item in items if "text" in item]
    return texts


def make_processor(texts: list[str], model_type: str = QWEN2_VL, vocabulary_size: int = 768):
    """A processor of a family, whose tokenizer is a byte-level BPE of `vocabulary_size` tokens trained on `texts`."""
    import transformers
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    tokenizer = make_tokenizer(texts, vocabulary_size)
    system = FAMILIES[model_type].default_system
    turn = DEFAULT_SYSTEM_TURN.replace("DEFAULT_SYSTEM_MESSAGE", system) if system else ""
    template = CHAT_TEMPLATE.replace("DEFAULT_SYSTEM_TURN\n", turn)
    size = {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}
    image: dict = {"size": size}
    video: dict = {"size": size}
    video_kind = Qwen2VLVideoProcessor
    if model_type == "qwen3_vl":
        half = [0.5, 0.5, 0.5]
        image = {
            "patch_size": 16,
            "size": {"shortest_edge": 256**2, "longest_edge": 4096**2},
            "image_mean": half,
            "image_std": half,
        }
        video = {"size": {"shortest_edge": 64**2, "longest_edge": 24576 * 32**2}}
        video_kind = Qwen3VLVideoProcessor
    return getattr(transformers, FAMILIES[model_type].processor)(
        image_processor=Qwen2VLImageProcessor(**image),
        tokenizer=tokenizer,
        video_processor=video_kind(**video),
        chat_template=template,
    )


def make_tokenizer(texts: list[str], vocabulary_size: int):
    """A byte-level BPE of `vocabulary_size` tokens trained on `texts`, and Qwen2-VL's special tokens."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    rules = Qwen2Tokenizer()._tokenizer  # Qwen2's own normaliser and pre-tokeniser around an empty vocabulary
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rules.train_from_iterator(texts, trainer)
    trained = json.loads(rules.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL_TOKENS})
    return tokenizer


def make_model(tokenizer, seed: int, model_type: str = QWEN2_VL):
    """A model of about a million parameters with random weights."""
    import torch
    from transformers import GenerationConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(make_config(tokenizer, model_type))
    stop_tokens = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=stop_tokens, pad_token_id=stop_tokens[1])
    return model


def make_config(tokenizer, model_type: str = QWEN2_VL):
    """The config of `tiny`, or of another family's tiny model."""
    from transformers import CONFIG_MAPPING

    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,  # a multiple of 64, as published ones are
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "initializer_range": INITIALIZER_RANGE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    text, tower = WITH_TOWER[model_type](text)
    return CONFIG_MAPPING[model_type](
        text_config=text,
        vision_config={**tower, "num_heads": 4, "initializer_range": INITIALIZER_RANGE},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def sizes_of_2(text: dict) -> tuple[dict, dict]:
    return text, {"depth": 3, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 4}


def sizes_of_2_5(text: dict) -> tuple[dict, dict]:
    tower = {"depth": 4, "hidden_size": 64, "intermediate_size": 160, "out_hidden_size": 128, "tokens_per_second": 2}
    return text, {**tower, "window_size": 112, "fullatt_block_indexes": [1, 3]}


def sizes_of_3(text: dict) -> tuple[dict, dict]:
    """As in the published ones a head is wider than the hidden size over the heads."""
    rotation = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [8, 8, 8], "mrope_interleaved": True}
    tower: dict = {"depth": 4, "hidden_size": 64, "intermediate_size": 256, "out_hidden_size": 128}
    tower |= {"num_position_embeddings": 16**2, "deepstack_visual_indexes": [1, 2]}
    return {**text, "head_dim": 48, "rope_parameters": rotation}, tower


WITH_TOWER = {"qwen2_vl": sizes_of_2, "qwen2_5_vl": sizes_of_2_5, "qwen3_vl": sizes_of_3}
