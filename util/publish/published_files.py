"""The small files of a saved model as Qwen's own repository has them.

transformers 5 opens that layout, but writes another one: it puts the language model's settings one level down in
config.json, as Qwen3-VL's repository alone has them, renames keys of it and of tokenizer_config.json, and no longer
writes the vocabulary, the merges, the processors' settings and the chat template as files of their own. Programs that
were written for the published files look for them there: older transformers, and what converts a model or serves it
without transformers.
"""

import json
from pathlib import Path

from util.family import FAMILIES, model_type_of_processor

# Said by how the tokenizer was opened, not by what it is
OF_THIS_MACHINE = ("is_local", "local_files_only")


def write_as_published(folder: Path, processor) -> None:
    """Rewrite what transformers has just saved into `folder`, and add the files that it left out.

    `folder`: holds what `save_pretrained` of the processor wrote and, unless it is an adapter, of the model.
    """
    tokenizer = processor.tokenizer
    config = folder / "config.json"
    if config.exists():
        published = published_config(read(config))
        if "<|vision_pad|>" in tokenizer.get_vocab():
            published.setdefault("vision_token_id", tokenizer.convert_tokens_to_ids("<|vision_pad|>"))
        write(config, published)
    settings = folder / "tokenizer_config.json"
    write(settings, published_tokenizer(read(settings), tokenizer.added_tokens_decoder))
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    kind = type(processor).__name__
    image = json.loads(processor.image_processor.to_json_string())
    write(folder / "preprocessor_config.json", published_image_processor(image, kind))
    if FAMILIES[model_type_of_processor(kind)].nested_files:
        video = json.loads(processor.video_processor.to_json_string())
        write(folder / "video_preprocessor_config.json", {**video, "processor_class": kind})
    write(folder / "chat_template.json", {"chat_template": processor.chat_template})


def published_config(saved: dict) -> dict:
    """A config.json of transformers 5 in the published layout, from which transformers 5 makes the same config."""
    text = dict(saved["text_config"])
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    if FAMILIES[saved["model_type"]].nested_files:
        text["rope_scaling"] = rope
        if saved["tie_word_embeddings"]:  # who reads the language model's settings alone would make a head of its own
            text["tie_word_embeddings"] = True
        return {**saved, "text_config": dict(sorted(text.items()))}
    del text["model_type"]  # that of the language model alone
    text.pop("dtype", None)  # that of the whole model stands beside it
    kind = rope.pop("rope_type")
    # In the published layout "mrope" is what transformers 5 calls the default rotation with sections
    rope["type"] = "mrope" if kind == "default" else kind
    text["rope_scaling"] = rope
    # transformers 5 forgets the width of a window that is not used; the published file has the longest context there
    text["sliding_window"] = text["sliding_window"] or text["max_position_embeddings"]
    vision = dict(saved["vision_config"])
    vision.setdefault("in_chans", vision["in_channels"])
    vision.setdefault("spatial_patch_size", vision["patch_size"])
    published = {key: value for key, value in saved.items() if key != "text_config"}
    published |= {**text, "vision_config": vision, "torch_dtype": saved["dtype"]}
    return dict(sorted(published.items()))


def published_tokenizer(saved: dict, added: dict) -> dict:
    """A tokenizer_config.json of transformers 5 under the published keys. `added`: the added tokens by id.

    transformers before 5 takes the list under its new name for a dictionary, and fails.
    """
    published = {key: value for key, value in saved.items() if key not in OF_THIS_MACHINE}
    published["additional_special_tokens"] = published.pop("extra_special_tokens", [])
    tokens = sorted(added.items())
    published["added_tokens_decoder"] = {str(number): described(token) for number, token in tokens}
    return dict(sorted(published.items()))


def described(token) -> dict:
    """An added token as tokenizer_config.json describes it."""
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {key: getattr(token, key) for key in keys}


def published_image_processor(saved: dict, processor_class: str) -> dict:
    """The image processor's settings under the published keys, beside those of transformers 5."""
    size = saved["size"]
    edges = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return {**saved, **edges, "processor_class": processor_class}


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
