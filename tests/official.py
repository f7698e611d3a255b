"""The published sizes of Qwen2-VL (config.json of Qwen/Qwen2-VL-2B-Instruct, -7B-Instruct and -72B-Instruct), as configs without weights."""

from transformers import Qwen2VLConfig

SIZES = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "num_hidden_layers": 80},
}  # fmt: skip


def official_config(size: str) -> Qwen2VLConfig:
    text = SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    tower = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": text["hidden_size"]}
    return Qwen2VLConfig(
        text_config={"num_hidden_layers": 28, **text, "rope_parameters": rope},
        vision_config=tower,
        tie_word_embeddings=size == "2b",
    )
