"""What the layers keep of a forward pass for their backward pass, tensor by tensor.

Counted from the operations of util/packed_layers.py and util/loss.py: each term is named for the tensor it counts. That
PyTorch keeps just these was seen in its allocator's own record of a step, and is held by tests/test_memory.py and
tests/test_phantom.py. A row is a token in the language model, a patch in the tower.
"""

from typing import NamedTuple

import torch

from util.adapters import lora
from util.adapters.settings import targets, untrained_parts
from util.config import Config
from util.loss import most_logit_rows
from util.steps import Load
from util.tensors import PARTS

FP32 = 4  # bytes of a number


class Layer(NamedTuple):
    """Bytes per row of one of the repeated layers."""

    kept: float = 0  # from its forward pass on
    remade: float = 0  # by recomputing, once its backward pass has come
    working: float = 0  # gradients of activations, where its backward pass needs most, less what it has freed by then


class Divided(NamedTuple):
    """Among how many ranks of a tensor-parallel group a layer's tensors are divided."""

    matrices: int = 1  # whatever lies between two matrices: heads, and the MLP's inner width
    residual: int = 1  # what lies between layers, and norms: the rows of a decoder layer, in sequence parallelism


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
        pixels = pixel_bytes(tower, compute, patches)
    merger = merger_bytes(tower, compute, patches, divided) if merger_learns else 0
    return Kept(
        text=text.num_hidden_layers * decoder.kept,
        decoder=decoder,
        tower=tower.depth * block.kept + pixels,
        block=block,
        merger=merger,
        logits=min(supervised, rows) * text.vocab_size * bytes_of_a_logit(dtype, is_compiled),
        chunks=max(1, -(-supervised // rows)),
        # a block's input, that of its MLP, and the MLP's first product twice more while GELU reads it
        frozen_tower=0 if tower_learns else compute * tower.embed_dim * (2 + 3 * tower.mlp_ratio) * patches,
    )


def pixel_bytes(tower, compute: int, patches: int) -> float:
    """What the patch embedding has read, of a video; an image's patches, which have one frame, are half as long."""
    return compute * tower.in_channels * tower.temporal_patch_size * tower.patch_size**2 * patches


def merger_bytes(tower, compute: int, patches: int, divided: Divided) -> float:
    """Its input, normalised, after its first product, after GELU; four patches side by side are as wide as four."""
    return (2 + 2 / divided.matrices) * compute * tower.embed_dim * patches


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
    width = text.hidden_size / divided.residual
    heads = text.hidden_size / divided.matrices
    inner = text.intermediate_size / divided.matrices
    key_value = heads / text.num_attention_heads * text.num_key_value_heads

    def read_by(*names: str) -> bool:
        return reads("language_model", set(names), config)

    whole = {
        "input": width,
        "normalised for attention": width * read_by("q_proj", "k_proj", "v_proj"),
        "queries, turned": heads,
        "keys, turned": key_value,
        "values": key_value,
        "mixed": heads,  # attention's output
        "after attention": width,
        "normalised for the MLP": width * read_by("gate_proj", "up_proj"),
        "gate": inner,
        "up": inner,
        # compiled it is made anew from the gate, except beside DoRA's lengths
        "gate after SiLU": 0 if is_compiled and not config.lora_dora else inner,
        "product": inner * read_by("down_proj"),
        "sent for attention": sent_for_attention(text, config) / divided.matrices,
    }
    # queries, keys and values before they are turned are as wide as after
    products = ("queries, turned", "keys, turned", "values", "mixed", "after attention", "gate", "up")
    stay = ("values", "mixed", "gate", "up")
    kept, remade = split(whole, products, stay, config, is_compiled)
    # of the product, of the gate before and after SiLU, and of the factor beside it; and what comes from the next layer
    working = width + inner * (2 if is_compiled else 3) - whole["product"]
    statistics = attention_statistics(text.num_attention_heads / divided.matrices, config, dtype, heads, key_value)
    beside = by_adapters("language_model", model_config, config, dtype, is_compiled)
    return layer_of(dtype, config, kept, remade, working, statistics + beside)


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
    return text.hidden_size // heads * (2 * ranks * own - heads + 2 * more_keys)


def tower_block(
    model_config, config: Config, dtype: torch.dtype, is_compiled: bool, divided: Divided = Divided()
) -> Layer:
    """A block of the tower, per patch; its residual is whole on every rank."""
    tower = model_config.vision_config
    width = tower.embed_dim
    heads = width / divided.matrices
    inner = tower.embed_dim * tower.mlp_ratio / divided.matrices

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
        "normalised for the MLP": width * read_by("mlp.fc1"),
        "first product": inner,
        "its sigmoid": 0 if is_compiled else inner,
        "after GELU": inner * read_by("mlp.fc2"),
    }
    products = ("queries, turned", "keys, turned", "values", "mixed", "after attention", "first product")
    stay = ("mixed", "first product")
    kept, remade = split(whole, products, stay, config, is_compiled)
    working = width + (inner if is_compiled else 3 * inner - whole["after GELU"])
    statistics = attention_statistics(tower.num_heads / divided.matrices, config, dtype, heads, heads)
    beside = by_adapters("vision", model_config, config, dtype, is_compiled)
    return layer_of(dtype, config, kept, remade, working, statistics + beside)


def split(
    whole: dict[str, float], products: tuple[str, ...], stay: tuple[str, ...], config: Config, is_compiled: bool
) -> tuple[float, float]:
    """(kept, remade) numbers per row under --activation_checkpointing.

    `products`: of what `selective` keeps, one tensor of each of these sizes; `stay`: those of them that recomputing
    does not make once more.
    """
    everything = sum(whole.values())
    if config.activation_checkpointing == "full":
        return whole["input"], everything - whole["input"]
    if config.activation_checkpointing == "selective":
        kept = whole["input"] + sum(whole[name] for name in products)
        # a compiled graph makes the rest anew where it is read, and never holds all of it
        return kept, 0 if is_compiled else everything - whole["input"] - sum(whole[name] for name in stay)
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
