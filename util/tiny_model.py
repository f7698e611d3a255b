"""`tiny`, the embedded default: a small real Qwen2-VL checkpoint, made on the spot.

It is a `Qwen2VLForConditionalGeneration` of about a million random parameters with a real processor, saved in the
published format and loaded through the path that an official checkpoint takes. Its vocabulary is a byte-level BPE
trained on the conversations of `train_data/data.json`. The same sources give the same bytes.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from util.run_folder import ROOT

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
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages and messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nDEFAULT_SYSTEM_MESSAGE<|im_end|>\\n' -}}
{%- endif -%}
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
""".replace("DEFAULT_SYSTEM_MESSAGE", DEFAULT_SYSTEM_MESSAGE)


def make_tiny_model(directory: Path | None = None, seed: int = 0) -> Path:
    """Write the tiny checkpoint, unless this version of it is there already, and return its directory."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    directory = Path(directory or ROOT / "train_output" / "tiny_model")
    sources = Path(__file__).read_bytes() + TEXTS.read_bytes() + f"{transformers.__version__} {seed}".encode()
    stamp = hashlib.sha256(sources).hexdigest()
    stamp_file = directory / "made_from.txt"
    if stamp_file.exists() and stamp_file.read_text(encoding="utf-8") == stamp:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".tiny_model_", dir=directory.parent))
    processor = make_processor(conversation_texts(TEXTS))
    processor.save_pretrained(unfinished)
    make_model(processor.tokenizer, seed).save_pretrained(unfinished)
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


def make_processor(texts: list[str], vocabulary_size: int = 768):
    """A Qwen2VLProcessor whose tokenizer is a byte-level BPE of `vocabulary_size` tokens trained on `texts`."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

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
    size = {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer, seed: int):
    """A Qwen2VLForConditionalGeneration of about a million parameters with random weights."""
    import torch
    from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(make_config(tokenizer))
    stop_tokens = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=stop_tokens, pad_token_id=stop_tokens[1])
    return model


def make_config(tokenizer):
    """The Qwen2VLConfig of `tiny`."""
    from transformers import Qwen2VLConfig

    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
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
        },
        vision_config={
            "depth": 3,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 4,
            "mlp_ratio": 4,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
