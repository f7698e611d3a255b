"""The repeated layers on a packed row, written out on transformers' modules: the tower's blocks, the language model's.

Each is two functions with attention between them. What stands before attention and after it treats every row of
(T, D) for itself, so that one compiled graph serves rows of any length (compilation.py). Attention alone must know
where samples begin and end; it stays outside of the graphs, where it may look at every length and choose a kernel.

Letters in shapes: T rows (tokens, or patches of the tower), D the width, H heads, H_kv key-value heads, W a head's
width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from util.attention import Segments

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries (T, H, W), keys and values (T, H_kv, W)


@dataclass(frozen=True)
class Kind:
    """What all layers of the tower, or of the language model, have in common."""

    before: Callable[..., Heads]  # (layer, hidden (T, D), cos (T, W), sin (T, W))
    after: Callable[..., torch.Tensor]  # (layer, hidden (T, D), mixed (T, D)) -> hidden (T, D)
    until_last: Callable[..., tuple]  # the same, up to the last product: (hidden (T, D), what that product reads)
    attention: str  # the name of the attention in a layer
    after_attention: str  # the name of the matrix product after it
    last_product: str  # the name of the layer's last matrix product
    # `before` in two parts, where ranks that share a row send the queries while they make keys and values
    queries: Callable[..., Any] | None = None  # (layer, hidden, cos, sin) -> normed (T, D), queries
    keys_and_values: Callable[..., Any] | None = None  # (layer, normed, cos, sin)


def run_packed(layer: Any, kind: Kind, hidden: torch.Tensor, rotation: Any, segments: Segments) -> torch.Tensor:
    """One layer on a packed row: (T, D) -> (T, D). `rotation`: cos and sin of each row's angles, (T, W) each."""
    if layer.row_attention is not None and layer.row_attention.is_for(segments):
        mixed = layer.row_attention(layer, kind, hidden, rotation, segments)
    else:
        query, key, value = kind.before(layer, hidden, *rotation)
        mixed = attend(getattr(layer, kind.attention), query, key, value, segments)
    return kind.after(layer, hidden, mixed)


def attend(attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments):
    """Every segment's rows see each other: (T, H, W) and two of (T, H_kv, W) -> (T, H * W)."""
    packed_attention = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    # such functions take and give another order: (1, H, T, W) in, (1, T, H, W) out
    query, key, value = (rows.transpose(0, 1)[None] for rows in (query, key, value))
    mixed, _ = packed_attention(attention, query, key, value, None, scaling=attention.scaling, segments=segments)
    return mixed[0].flatten(1)


# ---- the vision tower -----------------------------------------------------------------------------------------------


def before_block_attention(block: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Heads:
    normed = read_by_products(block, block_norm(block.norm1, hidden), len(cos))
    joined = block.attn.qkv(normed).unflatten(1, (3, block.attn.num_heads, -1))  # (T, 3, H, W)
    query, key = rotate_patches(joined[:, 0], joined[:, 1], cos, sin)
    # A copy, as a view would keep the whole product of (T, 3, H, W) for the backward pass, with what is not needed.
    value = joined[:, 2].contiguous()
    return query, key, value


def after_block_attention(block: Any, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    hidden, inner = until_last_of_block(block, hidden, mixed)
    return hidden + last_product(block.mlp)(inner)


def until_last_of_block(block: Any, hidden: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden + block.attn.proj(mixed)
    normed = read_by_products(block, block_norm(block.norm2, hidden), len(mixed))
    return hidden, until_last_product(block.mlp, normed)


# The families name the parts of a block's MLP each in its own way, and Qwen2.5-VL's is gated as the language model's.


def until_last_product(mlp: Any, normed: torch.Tensor) -> torch.Tensor:
    if hasattr(mlp, "gate_proj"):  # Qwen2.5-VL
        return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    if hasattr(mlp, "linear_fc1"):  # Qwen3-VL
        return mlp.act_fn(mlp.linear_fc1(normed))
    return mlp.act(mlp.fc1(normed))


def last_product(mlp: Any) -> Any:
    if hasattr(mlp, "down_proj"):
        return mlp.down_proj
    return mlp.linear_fc2 if hasattr(mlp, "linear_fc2") else mlp.fc2


def block_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A norm of the tower: an RMSNorm in Qwen2.5-VL, else a LayerNorm."""
    return rms_norm(norm, hidden) if hasattr(norm, "variance_epsilon") else norm(hidden)


def rotate_patches(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower's rotation, in fp32 or in fp64 where the input is. query and key (T, H, W), cos and sin (T, W)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    cos = cos[:, None].to(wide)
    sin = sin[:, None].to(wide)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        return rotate(heads.to(wide), cos, sin).to(heads.dtype)

    return rotated(query), rotated(key)


# ---- the language model ---------------------------------------------------------------------------------------------


def before_layer_attention(layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Heads:
    normed, query = queries_of_layer(layer, hidden, cos, sin)
    key, value = keys_and_values_of_layer(layer, normed, cos, sin)
    return query, key, value


def queries_of_layer(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = read_by_products(layer, rms_norm(layer.input_layernorm, hidden), len(cos))
    query = layer.self_attn.q_proj(normed).unflatten(1, (-1, layer.self_attn.head_dim))
    if hasattr(layer.self_attn, "q_norm"):  # Qwen3-VL
        query = rms_norm(layer.self_attn.q_norm, query)
    return normed, rotate(query, cos[:, None], sin[:, None])


def keys_and_values_of_layer(
    layer: Any, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    width = layer.self_attn.head_dim
    key = layer.self_attn.k_proj(normed).unflatten(1, (-1, width))
    value = layer.self_attn.v_proj(normed).unflatten(1, (-1, width))
    if hasattr(layer.self_attn, "k_norm"):
        key = rms_norm(layer.self_attn.k_norm, key)
    return rotate(key, cos[:, None], sin[:, None]), value


def after_layer_attention(layer: Any, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    hidden, inner = until_last_of_layer(layer, hidden, mixed)
    return hidden + layer.mlp.down_proj(inner)


def until_last_of_layer(layer: Any, hidden: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden + layer.self_attn.o_proj(mixed)
    normed = read_by_products(layer, rms_norm(layer.post_attention_layernorm, hidden), len(mixed))
    return hidden, layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864): the first half of a head's width turned against the second."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads * cos + turned * sin


BLOCK = Kind(before_block_attention, after_block_attention, until_last_of_block, "attn", "attn.proj", "mlp.fc2")
GATED_BLOCK = replace(BLOCK, last_product="mlp.down_proj")
BLOCK_OF_3 = replace(BLOCK, last_product="mlp.linear_fc2")
LAYER = Kind(
    before_layer_attention,
    after_layer_attention,
    until_last_of_layer,
    "self_attn",
    "self_attn.o_proj",
    "mlp.down_proj",
    queries_of_layer,
    keys_and_values_of_layer,
)


def kind_of_block(block: Any) -> Kind:
    """Of the vision tower's blocks, by how their family names the MLP's last product."""
    if hasattr(block.mlp, "down_proj"):
        return GATED_BLOCK
    return BLOCK_OF_3 if hasattr(block.mlp, "linear_fc2") else BLOCK


# ---- in a model -----------------------------------------------------------------------------------------------------


def pack(layer: Any, kind: Kind, run: Callable[..., torch.Tensor] = run_packed) -> None:
    """Let a layer run packed rows by `run`, and what `generate` gives it by transformers' own code, as before."""
    layer.sharing = None  # of its products with other ranks
    layer.row_attention = None  # over rows of which other ranks have parts, too
    layer.forward = partial(packed_or_own, type(layer).forward, layer, kind, run)


def packed_or_own(own_forward: Callable, layer: Any, kind: Kind, run: Callable, hidden: torch.Tensor, **given):
    """A layer's forward. Only a packed row says where its samples begin: `segments`."""
    if "segments" not in given:
        return own_forward(layer, hidden, **given)
    return run(layer, kind, hidden, given["position_embeddings"], given["segments"])


def read_by_products(layer: Any, normed: torch.Tensor, rows: int) -> torch.Tensor:
    """What the products after a norm read: all `rows`, of which several ranks that share a layer's products
    (util/parallel/tensor.py) may each have a part."""
    return normed if layer.sharing is None else layer.sharing.enter(normed, rows)


def rms_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """An RMSNorm as one kernel on a GPU (F.rms_norm) where transformers' has five.

    It rounds once where transformers' rounds twice: in bf16 a value may differ in its last bit. It stays in the
    precision of its input, also in fp64, where transformers' rounds to fp32 on the way. Called by name, and not put in
    the place of each module's forward: dynamo would take every layer for another one, and compile it anew.
    """
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
