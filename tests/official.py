"""The published sizes of the families, as configs without weights.

Qwen2-VL: config.json of Qwen/Qwen2-VL-2B-Instruct, -7B-Instruct and -72B-Instruct. Qwen2.5-VL: of Qwen/Qwen2.5-VL-3B-
Instruct and -7B-Instruct. Qwen3-VL: of Qwen/Qwen3-VL-2B-Instruct, -4B-Instruct and -8B-Instruct.
"""

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

SIZES = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "num_hidden_layers": 80},
}  # fmt: skip
SIZES_OF_2_5 = {
    "qwen2.5_3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "num_hidden_layers": 36},
    "qwen2.5_7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "num_hidden_layers": 28},
}  # fmt: skip
SIZES_OF_3 = {
    "qwen3_2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 28},
    "qwen3_4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36},
    "qwen3_8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36},
}
TIED = ("2b", "qwen2.5_3b", "qwen3_2b", "qwen3_4b")


def official_config(size: str) -> Qwen2VLConfig | Qwen2_5_VLConfig | Qwen3VLConfig:
    if size in SIZES:
        text = {"num_hidden_layers": 28, **SIZES[size]}
        tower = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": text["hidden_size"]}
        return config_of(Qwen2VLConfig, size, text, tower, {"rope_theta": 1e6, "mrope_section": [16, 24, 24]})
    if size in SIZES_OF_2_5:
        text = SIZES_OF_2_5[size]
        tower = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
        tower |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
        tower["out_hidden_size"] = text["hidden_size"]
        return config_of(Qwen2_5_VLConfig, size, text, tower, {"rope_theta": 1e6, "mrope_section": [16, 24, 24]})
    text = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, **SIZES_OF_3[size]}
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    if size == "qwen3_8b":
        tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    tower |= {"num_heads": 16, "num_position_embeddings": 48**2, "out_hidden_size": text["hidden_size"]}
    rotation = {"rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return config_of(Qwen3VLConfig, size, text, tower, rotation)


def config_of(kind: type, size: str, text: dict, tower: dict, rotation: dict):
    rope = {"rope_type": "default", **rotation}
    return kind(text_config={**text, "rope_parameters": rope}, vision_config=tower, tie_word_embeddings=size in TIED)
