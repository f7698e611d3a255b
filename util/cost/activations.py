"""What the layers keep of a forward pass for their backward pass, tensor by tensor.

Counted from the operations of util/packed_layers.py and util/loss.py: each term is named for the tensor it counts. That
PyTorch keeps just these was seen in its allocator's own record of a step, and is held by tests/test_memory.py and
tests/test_phantom.py. A row is a token in the language model, a patch in the tower.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch

from util.adapters import lora
from util.adapters.settings import targets, untrained_parts
from util.config import Config
from util.cost.shapes import Repeated, head_width, number_of_deeper, shapes_of
from util.loss import most_logit_rows
from util.steps import Load
from util.tensors import PARTS

FP32 = 4  # bytes of a number

# Of what a layer keeps, as large as what `selective` keeps: the outputs of matrix products and of attention. Queries,
# keys and values before they are turned are as wide as after.
PRODUCTS = (
    "queries, turned", "keys, turned", "values", "mixed", "after attention", "first product", "second product",
)  # fmt: skip
# And which of these are products themselves, so that there is nothing to make anew.
MADE_BY_PRODUCTS = ("queries and keys, for their norms", "mixed", "first product", "second product")


class Layer(NamedTuple):
    """Bytes per row of one of the repeated layers."""

    kept: float = 0  # from its forward pass on
    remade: float = 0  # by recomputing, once its backward pass has come
    working: float = 0  # gradients of activations, where its backward pass needs most, less what it has freed by then


class Divided(NamedTuple):
    """Among how many ranks of a tensor-parallel group a layer's tensors are divided."""

    matrices: int = 1  # whatever lies between two matrices: heads, and the MLP's inner width
    residual: int = 1  # what lies between layers: the rows of a decoder layer, in sequence parallelism


class Kept(NamedTuple):
    """Bytes of a packed micro-batch: what is kept of its whole forward pass, and what the passes need beside it."""

    text: float  # kept by all decoder layers
    decoder: Layer  # of one of them
    tower: float  # kept by all blocks of the tower and by its patch embedding
    block: Layer  # of one of them
    merger: float
    logits: float  # at the loss
    chunks: int  # that the loss is cut into
    frozen_tower: float  # what a block of the tower needs in passing, where none of it is kept

    @property
    def total(self) -> float:
        """Kept at the end of the forward pass, before the loss."""
        return self.text + self.tower + self.merger


def kept_by(
    model_config,
    config: Config,
    dtype: torch.dtype,
    load: Load,
    is_compiled: bool = False,
    divided: Divided = Divided(),
) -> Kept:
    """What a micro-batch of (tokens, patches, supervised tokens) keeps under these settings.

    `is_compiled`: whether the layers and the loss are compiled, which then keep less (util/compilation.py).
    """
    text = model_config.text_config
    tower = model_config.vision_config
    shapes = shapes_of(model_config)
    tokens, patches, supervised = map(int, load)
    compute = dtype.itemsize
    rows = most_logit_rows(config.logit_rows, is_compiled)
    learns = parts_that_learn(config)
    tower_learns = "vision" in learns and patches > 0
    merger_learns = tower_learns or ("merger" in learns and patches > 0)
    text_learns = merger_learns or "language_model" in learns
    decoder = block = Layer()
    if text_learns:
        decoder = scaled(decoder_layer(model_config, config, dtype, is_compiled, divided), tokens)
    pixels = 0.0
    if tower_learns:
        block = scaled(tower_block(model_config, config, dtype, is_compiled, divided), patches)
        pixels = compute * shapes.pixels * patches  # of a video; an image's patches, of one frame, are half as long
    merger = shapes.mergers * merger_bytes(shapes.block.width, compute, patches, divided) if merger_learns else 0
    return Kept(
        text=text.num_hidden_layers * decoder.kept,
        decoder=decoder,
        tower=tower.depth * block.kept + pixels,
        block=block,
        merger=merger,
        logits=min(supervised, rows) * text.vocab_size * bytes_of_a_logit(dtype, is_compiled),
        chunks=max(1, -(-supervised // rows)),
        frozen_tower=0 if tower_learns else compute * passing_numbers(shapes.block, model_config) * patches,
    )


def passing_numbers(block: Repeated, model_config) -> int:
    """Of a patch, while a block of a tower that keeps nothing works on it: the block's input, that of its MLP, and the
    MLP's first product with two more of its width while the activation is made; and what deepstack waits for."""
    return 2 * block.width + 3 * block.inner + number_of_deeper(model_config) * block.width


def merger_bytes(width: int, compute: int, patches: int, divided: Divided) -> float:
    """Of one: its input, normalised, after its first product, after GELU; four patches side by side are as wide as
    four. `width`: of the tower."""
    return (2 + 2 / divided.matrices) * compute * width * patches


def parts_that_learn(config: Config) -> set[str]:
    """The parts of the model in which something is trained: weights, or adapters beside them."""
    found = set(PARTS) - set(untrained_parts(config))
    return found | {"language_model"} if config.new_tokens else found


def scaled(layer: Layer, rows: int) -> Layer:
    return Layer(*(rows * size for size in layer))


def bytes_of_a_logit(dtype: torch.dtype, is_compiled: bool) -> int:
    """At the loss, for each number in the logits: its logarithm, and the gradients of that and of the logit, in fp32 at
    least. Compiled, one tensor is left, in the precision of compute."""
    return dtype.itemsize if is_compiled else 3 * max(FP32, dtype.itemsize)


def reads(part: str, names: set[str], config: Config) -> bool:
    """Whether one of these linear layers, or an adapter beside it, has trained weights and so keeps what it has read.

    Under dropout an adapter reads a copy of its own (`by_adapters`).
    """
    if config.lora_rank:
        return bool(names & set(targets(config)[part])) and not config.lora_dropout
    return part not in config.freeze


def decoder_layer(
    model_config, config: Config, dtype: torch.dtype, is_compiled: bool, divided: Divided = Divided()
) -> Layer:
    """A layer of the language model, per token."""
    text = model_config.text_config
    layer = shapes_of(model_config).layer
    width = layer.width / divided.residual
    gathered = layer.width  # what products read, and their gradients: on each rank all rows
    heads = layer.queries / divided.matrices
    key_value = layer.keys / divided.matrices
    inner = layer.inner / divided.matrices

    def read_by(*names: str) -> bool:
        return reads("language_model", set(names), config)

    whole = {
        "input": width,
        "normalised for attention": gathered * read_by("q_proj", "k_proj", "v_proj"),
        "queries and keys, for their norms": (heads + key_value) * layer.has_head_norms,
        "queries, turned": heads,
        "keys, turned": key_value,
        "values": key_value,
        "mixed": heads,  # attention's output
        "after attention": width,
        "normalised for the MLP": gathered * read_by("gate_proj", "up_proj"),
        "sent for attention": sent_for_attention(text, config) / divided.matrices,
    }
    mlp, of_mlp = gated_mlp(inner, read_by("down_proj"), config, is_compiled)
    kept, remade = split(whole | mlp, {*MADE_BY_PRODUCTS, "values"}, config, is_compiled)
    kept += between_graphs(config, is_compiled) * whole["normalised for attention"]
    working = gathered + of_mlp  # beside the MLP's, what comes from the next layer
    statistics = attention_statistics(text.num_attention_heads / divided.matrices, config, dtype, heads, key_value)
    if layer.has_head_norms:
        statistics += FP32 * (heads + key_value) / head_width(text)
    beside = by_adapters("language_model", model_config, config, dtype, is_compiled)
    return layer_of(dtype, config, kept, remade, working, statistics + beside)


def between_graphs(config: Config, is_compiled: bool) -> bool:
    """Whether `selective` keeps what queries, keys and values are made of: it lies between the graph of queries, which
    travel first (util/parallel/context.py), and that of keys and values."""
    is_selective = config.activation_checkpointing == "selective"
    return is_selective and is_compiled and config.context_parallel_size > 1


def sent_for_attention(text, config: Config) -> float:
    """Numbers per token that attention over a row in parts keeps beyond that over a whole row, on the fullest rank: its
    output before it is sent back, and heads that this rank has more than the mean (util/parallel/context.py)."""
    ranks = config.context_parallel_size
    if ranks == 1:
        return 0
    heads = text.num_attention_heads
    own = -(-heads // ranks)
    own_keys = -(-own // (heads // text.num_key_value_heads))
    more_keys = ranks * own_keys - text.num_key_value_heads
    return head_width(text) * (2 * ranks * own - heads + 2 * more_keys)


def tower_block(
    model_config, config: Config, dtype: torch.dtype, is_compiled: bool, divided: Divided = Divided()
) -> Layer:
    """A block of the tower, per patch; its residual is whole on every rank."""
    tower = model_config.vision_config
    block = shapes_of(model_config).block
    width = block.width
    heads = block.queries / divided.matrices
    inner = block.inner / divided.matrices
    *first, last = [name for name in block.matrices if name.startswith("mlp.")]

    def read_by(*names: str) -> bool:
        return reads("vision", set(names), config)

    whole = {
        "input": width,
        "normalised for attention": width * read_by("attn.qkv"),
        "queries, turned": heads,
        "keys, turned": heads,
        "values": heads,
        "mixed": heads,
        "after attention": width,
        "normalised for the MLP": width * read_by(*first),
    }
    if block.is_gated:
        mlp, of_mlp = gated_mlp(inner, read_by(last), config, is_compiled)
    else:
        mlp, of_mlp = plain_mlp(inner, read_by(last), tower.hidden_act, is_compiled)
    kept, remade = split(whole | mlp, MADE_BY_PRODUCTS, config, is_compiled)
    working = width + of_mlp
    statistics = attention_statistics(tower.num_heads / divided.matrices, config, dtype, heads, heads)
    beside = by_adapters("vision", model_config, config, dtype, is_compiled)
    return layer_of(dtype, config, kept, remade, working, statistics + beside)


def gated_mlp(inner: float, reads_last: bool, config: Config, is_compiled: bool) -> tuple[dict[str, float], float]:
    """An MLP whose activated product is multiplied by another one: its tensors, and what its backward pass needs
    beside them."""
    whole = {
        "first product": inner,
        "second product": inner,
        # compiled it is made anew from the first product, except beside DoRA's lengths
        "activated": 0 if is_compiled and not config.lora_dora else inner,
        "read by the last": inner * reads_last,
    }
    # of what the last reads, of the first product before and after its activation, and of the second
    return whole, inner * (2 if is_compiled else 3) - whole["read by the last"]


def plain_mlp(inner: float, reads_last: bool, activation: str, is_compiled: bool) -> tuple[dict[str, float], float]:
    """One of two matrices: the same."""
    is_written_out = activation == "quick_gelu"  # x * sigmoid(1.702 x), which keeps both factors; others are one kernel
    whole = {
        "first product": inner,
        "its sigmoid": inner * (is_written_out and not is_compiled),
        "read by the last": inner * reads_last,
    }
    if is_compiled:
        return whole, inner
    return whole, inner * (3 if is_written_out else 2) - whole["read by the last"]


def split(whole: dict[str, float], stay: Collection[str], config: Config, is_compiled: bool) -> tuple[float, float]:
    """(kept, remade) numbers per row under --activation_checkpointing.

    `stay`: what `selective` keeps and recomputing does not make once more.
    """
    everything = sum(whole.values())
    if config.activation_checkpointing == "full":
        return whole["input"], everything - whole["input"]
    if config.activation_checkpointing == "selective":
        kept = whole["input"] + sum(size for name, size in whole.items() if name in PRODUCTS)
        # a compiled graph makes the rest anew where it is read, and never holds all of it
        stays = sum(size for name, size in whole.items() if name in stay)
        return kept, 0 if is_compiled else everything - whole["input"] - stays
    return everything, 0


def layer_of(dtype: torch.dtype, config: Config, kept: float, remade: float, working: float, beside: float) -> Layer:
    """A Layer from numbers per row, and from bytes that are kept with what a layer keeps of itself."""
    if config.activation_checkpointing == "full":
        return Layer(dtype.itemsize * kept, dtype.itemsize * remade + beside, dtype.itemsize * working)
    return Layer(dtype.itemsize * kept + beside, dtype.itemsize * remade, dtype.itemsize * working)


def attention_statistics(heads: float, config: Config, dtype: torch.dtype, width: float, key_value: float) -> float:
    """Bytes per row of what attention keeps beside its inputs and output: the logarithm of each row's sum, in fp32.

    torch's dense attention, in which pieces of one length are stacked, also keeps its output in another order, and keys
    and values of shared heads as often as they are read.
    """
    stacked = config.attention == "sdpa" or (config.attention == "auto" and dtype != torch.bfloat16)
    copies = dtype.itemsize * (width + 2 * (width - key_value)) if stacked else 0
    return FP32 * heads + copies


def by_adapters(part: str, model_config, config: Config, dtype: torch.dtype, is_compiled: bool) -> float:
    """Bytes per row that a layer keeps of adapters alone, which is little unless something acts on each element."""
    if not config.lora_rank:
        return 0
    numbers = 0.0
    masks = 0
    for inputs, outputs, _ in lora.adapted_layers(model_config, config)[part].values():
        numbers += config.lora_rank  # between its two matrices
        if config.lora_dropout:  # the input without what was dropped, and where that was
            numbers += inputs
            masks += inputs
        if config.lora_dora:  # the outputs of weight and adapter, for the gradient of their length
            numbers += 2 * outputs
        elif config.activation_checkpointing == "selective" and not is_compiled:
            numbers += outputs  # a product like any other
    return dtype.itemsize * numbers + masks
