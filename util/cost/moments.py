"""What lies on a device at the moments of a training step at which it may be most: gradients, activations, and among
several processes what FSDP2 holds beside shards.

FSDP2 works unit by unit: each layer is one, and what is left is the root. In the order of a pass, with S for shards:

    forward     the root is gathered into one buffer and copied out of it; then layer by layer, the next one's buffer
                being filled while this one computes. Under --sharding full a layer's copies are freed behind it.
    backward    the same from the last layer to the first. A layer's whole gradients, in the precision of compute, are
                copied into a buffer in fp32, of which the ranks add up S / ranks each; that buffer stays until the next
                layer's takes its place (foreach_reduce, and post_backward in torch's _fsdp_param_group.py). The root's
                copies and its gradients, the head's from the loss on, stay until all layers are through.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch

from util.adapters import lora
from util.config import Config
from util.cost.activations import FP32, Kept
from util.tensors import PARTS


@dataclass
class Gradients:
    """Bytes of the gradients of weights, in the order in which a backward pass makes them."""

    head: float
    decoder: float  # of the decoder layers
    merger: float
    tower: float
    embedding: float  # of an embedding that is the head, too: another one, until it has been added to the head's
    update: float  # in passing, with small moments: the largest weight and its gradient in fp32
    all_at_once: bool  # they are there from the first pass of a step on, since it has others
    parameters: int  # how many have a gradient

    @property
    def total(self) -> float:
        """At the end of the backward pass."""
        return self.head + self.decoder + self.merger + self.tower

    @classmethod
    def of(
        cls,
        model_config,
        counts: dict,
        config: Config,
        dtype: torch.dtype,
        with_patches: bool,
        passes: int,
        several: bool,
    ) -> Self:
        """`with_patches`: whether there is an image or a video in the data; `several`: whether processes share work."""
        # in bf16 those of one pass may stay as they were computed; sums are made in fp32 (util/optimizer.py)
        width = max(FP32, dtype.itemsize)
        if dtype == torch.bfloat16 and passes == 1 and not several:
            width = dtype.itemsize
        trained = {part: 0 if part in config.freeze else counts[part] for part in PARTS}
        head = 0
        if config.lora_rank:
            trained = lora.count_trained(model_config, config)
        elif trained["language_model"]:
            head = model_config.text_config.vocab_size * model_config.text_config.hidden_size
            head //= config.tensor_parallel_size
        if not with_patches:
            trained = {**trained, "vision": 0, "merger": 0}
        is_tied = model_config.tie_word_embeddings
        return cls(
            head=width * head,
            decoder=width * (trained["language_model"] - head),
            merger=width * trained["merger"],
            tower=width * trained["vision"],
            embedding=dtype.itemsize * head if is_tied and not several else 0,
            update=2 * FP32 * head if config.optimizer != "adamw" and dtype == torch.bfloat16 else 0,
            all_at_once=passes > 1 and not (several and config.sharding == "optimizer"),
            parameters=sum(trained.values()),
        )


def moments(kept: Kept, gradients: Gradients, is_compiled: bool) -> dict[str, dict[str, float]]:
    """What is there beside weights and moments at each moment of a step at which it may be most.

    Between two of these, activations only become fewer and gradients more, both in proportion to the layers that the
    backward pass has left behind: so that one of the two ends needs most.
    """
    # A tied head's gradient waits for the embedding's before both are added to those of earlier passes.
    waiting = gradients.head if gradients.all_at_once and gradients.embedding else 0
    # The gradients of logits and of the head's weight are not there together, except in a compiled loss; but where the
    # loss is cut into chunks, those of the chunks before are.
    at_the_loss = gradients.head * ((kept.chunks > 1) + is_compiled) + gradients.all_at_once * gradients.total

    def at(made: float, activations: float, logits: float, working: float) -> dict[str, float]:
        found = max(made, gradients.total) if gradients.all_at_once else made
        return {"gradients": found, "activations": activations, "logits": logits, "working memory": working}

    head = gradients.head
    decoder = head + gradients.decoder
    merger = decoder + gradients.merger
    of_pictures = kept.tower + kept.merger
    first_decoder = kept.decoder.kept + kept.decoder.remade
    first_block = kept.block.kept + kept.block.remade
    return {
        "the tower's forward pass": at(0, 0, 0, kept.frozen_tower),
        "the loss": at(at_the_loss, kept.total, kept.logits, 0),
        "the beginning of the language model's backward pass": at(
            head, kept.total + kept.decoder.remade, 0, kept.decoder.working + waiting
        ),
        "the end of the language model's backward pass": at(
            decoder, of_pictures + first_decoder, 0, kept.decoder.working + waiting
        ),
        "the beginning of the tower's backward pass": at(
            merger, kept.tower + kept.block.remade, 0, kept.block.working + waiting
        ),
        "the end of the backward pass": at(
            gradients.total, first_block, 0, max(kept.block.working + waiting, waiting + gradients.embedding)
        ),
        "the update of the weights": at(gradients.total, 0, 0, gradients.update),
    }


# ---- among several processes -----------------------------------------------------------------------------------------


@dataclass
class Units:
    """Bytes of what FSDP2 gathers and reduces at once on one rank: whole copies of weights, in the precision of
    compute, and whole gradients in that precision. Those of frozen weights are 0."""

    root: float
    layer: float  # of the language model
    block: float  # of the tower
    root_gradients: float
    layer_gradients: float
    block_gradients: float
    head: float  # of the root's gradients
    tied: float  # the embedding's, until it has been added to the head's
    last_product: float  # of a layer's gradients that of the product whose backward pass comes first
    layers: int
    blocks: int
    wider: float  # bytes of what is reduced for each byte of a gradient
    are_gathered: bool  # from shards on other ranks, into buffers
    are_freed: bool  # after the forward pass of each layer (--sharding full)
    are_added_up: bool  # gradients are, whole and in fp32, until the last micro-batch (--sharding optimizer)
    is_last_pass: bool = True  # of a step; before it, those that are added up are not reduced

    @classmethod
    def of(cls, model_config, counts: dict, config: Config, dtype: torch.dtype, shards: int, passes: int) -> Self:
        """`counts`: of this rank, as memory.counts_of_rank has them."""
        text = model_config.text_config
        copy = dtype.itemsize
        blocks = model_config.vision_config.depth if counts["block"] else 0
        learns = {part: not config.lora_rank and part not in config.freeze for part in PARTS}
        layer, block = learns["language_model"] * counts["layer"], learns["vision"] * counts["block"]
        trained = sum(counts[part] * learns[part] for part in PARTS)
        ranks_of_matrix = config.tensor_parallel_size
        head = learns["language_model"] * text.vocab_size * text.hidden_size / ranks_of_matrix
        return cls(
            root=copy * (sum(counts[part] for part in PARTS) - counts["all_layers"]),
            layer=copy * counts["layer"],
            block=copy * counts["block"],
            root_gradients=copy * (trained - text.num_hidden_layers * layer - blocks * block),
            layer_gradients=copy * layer,
            block_gradients=copy * block,
            head=copy * head,
            tied=copy * head * model_config.tie_word_embeddings,
            last_product=min(copy * layer, copy * text.hidden_size * text.intermediate_size / ranks_of_matrix),
            layers=text.num_hidden_layers,
            blocks=blocks,
            wider=max(FP32, dtype.itemsize) / copy,
            are_gathered=shards > 1,
            are_freed=config.sharding == "full",
            are_added_up=config.sharding == "optimizer" and passes > 1,
        )

    def copies(self, layers: int, blocks: int, at_work: float, following: float) -> float:
        """Of weights, where so many layers and blocks have their backward pass before them; of them one works, and the
        buffer of the one that follows is being filled."""
        if not self.is_last_pass:
            layers, blocks = self.layers, self.blocks
        if self.are_freed:
            return self.root + at_work + following * self.are_gathered
        return self.root + layers * self.layer + blocks * self.block

    def added_up(self, layers: int, blocks: int) -> float:
        """Of gradients of earlier micro-batches, where so many layers and blocks have not reduced theirs yet."""
        if not self.is_last_pass:
            layers, blocks = self.layers, self.blocks
        of_layers = layers * self.layer_gradients + blocks * self.block_gradients
        return self.are_added_up * self.wider * (self.root_gradients + of_layers)

    @property
    def in_buffer(self) -> float:
        """A layer's gradients where ranks add them up."""
        return self.wider * self.layer_gradients * self.is_last_pass

    @property
    def reduced(self) -> float:
        """The same, and as the backward pass has made them, unless these went into what was `added_up` before."""
        return self.in_buffer + self.layer_gradients * (not self.are_added_up)

    @property
    def root_reduced(self) -> float:
        return (self.wider * self.is_last_pass + (not self.are_added_up)) * self.root_gradients

    def of_passes(self, waiting: float) -> list[tuple["Units", float]]:
        """The passes of a step that differ, each with the bytes of rows that wait in a pipeline meanwhile."""
        if not self.are_added_up:
            return [(self, waiting)]
        return [(replace(self, is_last_pass=False), waiting), (self, 0.0)]  # when the last one comes back none waits


def moments_among_several(
    kept: Kept, gradients: Gradients, units: Units, is_compiled: bool, waiting: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """As `moments`, where FSDP2 shards weights and gradients: also the whole "copies at work", and "whole gradients"
    with the buffers in which they are reduced. `gradients`: not yet divided among the ranks. `waiting`: bytes of
    activations of a pipeline's other rows."""
    for of_pass, waits in units.of_passes(waiting):
        for name, parts in Pass(kept, gradients, of_pass, is_compiled).moments().items():
            yield name, {**parts, "activations": parts["activations"] + waits}


@dataclass
class Pass:
    """The moments of a forward and a backward pass of one micro-batch, in their order."""

    kept: Kept
    gradients: Gradients
    units: Units
    is_compiled: bool

    def moments(self) -> dict[str, dict[str, float]]:
        found = self.of_forward_pass() | self.of_last_layers() | self.of_first_layer() | self.of_tower()
        return found | self.of_root()

    def at(
        self, left: tuple[int, int], made, copies, whole, activations=0.0, logits=0.0, working=0.0
    ) -> dict[str, float]:
        """Bytes by part. `left`: layers and blocks whose gradients have not been reduced; `made`: gradients that have;
        `copies`: of weights; `whole`: gradients that have not."""
        gradients = self.gradients
        return {
            "gradients": gradients.total if gradients.all_at_once else made * self.units.is_last_pass,
            "copies at work": copies,
            "whole gradients": whole + self.units.added_up(*left),
            "activations": activations,
            "logits": logits,
            "working memory": working,
        }

    @property
    def every(self) -> tuple[int, int]:
        return self.units.layers, self.units.blocks

    @property
    def before(self) -> float:
        """The unit whose turn it is after the last layer."""
        return self.units.layer if self.units.layers > 1 else self.units.block

    @property
    def at_work(self) -> float:
        return self.kept.decoder.working + self.units.last_product

    def of_forward_pass(self) -> dict[str, dict[str, float]]:
        units, kept = self.units, self.kept
        block = units.block
        of_loss = units.head * ((kept.chunks > 1) + self.is_compiled)
        gathering = units.root * (1 + units.are_gathered)
        in_tower = units.copies(*self.every, block, block)
        all_copies = units.copies(*self.every, 0, 0)
        return {
            "the beginning of the forward pass": self.at(self.every, 0, gathering, 0),
            "the tower's forward pass": self.at(self.every, 0, in_tower, 0, working=kept.frozen_tower),
            "the loss": self.at(self.every, 0, all_copies, of_loss, kept.total, kept.logits),
        }

    def of_last_layers(self) -> dict[str, dict[str, float]]:
        """Where the backward pass of the language model begins, and no buffer is there yet."""
        units, kept, one = self.units, self.kept, self.kept.decoder
        layers, blocks = self.every
        copies = units.copies(layers, blocks, units.layer, self.before)
        without_last = kept.total - one.kept
        reducing = units.copies(layers - 1, blocks, 0, self.before)
        found = {
            "the beginning of the language model's backward pass": self.at(
                self.every, 0, copies, units.head, kept.total + one.remade, working=self.at_work
            ),
            "the reduction of the last layer's gradients": self.at(
                self.every, 0, reducing, units.head + units.reduced, without_last
            ),
        }
        if layers > 1:
            second = units.copies(layers - 1, blocks, units.layer, units.layer if layers > 2 else units.block)
            whole = units.head + units.in_buffer
            found["the backward pass of the layer before the last"] = self.at(
                self.every, 0, second, whole, without_last + one.remade, working=self.at_work
            )
            found["the end of the backward pass of the layer before the last"] = self.at(
                self.every, 0, second, whole + units.layer_gradients, without_last - one.kept
            )
        return found

    def of_first_layer(self) -> dict[str, dict[str, float]]:
        units, kept, one = self.units, self.kept, self.kept.decoder
        left = 1, units.blocks
        made = self.gradients.decoder
        last = units.copies(1, units.blocks, units.layer, units.block)
        whole = units.head + units.in_buffer * (units.layers > 1)
        of_pictures = kept.tower + kept.merger
        return {
            "the end of the language model's backward pass": self.at(
                left, made, last, whole, of_pictures + one.kept + one.remade, working=self.at_work
            ),
            "the reduction of the first layer's gradients": self.at(
                left, made, last, whole + units.layer_gradients, of_pictures
            ),
        }

    def of_tower(self) -> dict[str, dict[str, float]]:
        units, block = self.units, self.kept.block
        first = units.copies(0, units.blocks, units.block, units.block)
        last = units.copies(0, 1, units.block, 0)
        whole = units.root_gradients + units.in_buffer
        of_block = units.root_gradients + units.wider * units.block_gradients
        made = self.gradients.decoder + self.gradients.tower
        return {
            "the beginning of the tower's backward pass": self.at(
                (0, units.blocks), self.gradients.decoder, first, whole, self.kept.tower + block.remade,
                working=block.working,
            ),
            "the end of the tower's backward pass": self.at(
                (0, 1), made, last, of_block, block.kept + block.remade, working=block.working
            ),
        }  # fmt: skip

    def of_root(self) -> dict[str, dict[str, float]]:
        """What is left when all layers and blocks are through, and the update."""
        units, gradients = self.units, self.gradients
        made = gradients.decoder + gradients.tower
        copies = units.copies(0, 0, 0, 0)
        update = self.at((0, 0), gradients.total, 0, 0, working=gradients.update)
        return {
            "the embedding's backward pass": self.at((0, 0), made, copies, units.root_gradients + units.tied),
            "the reduction of the root's gradients": self.at(
                (0, 0), made, copies - units.root * units.is_last_pass, units.root_reduced
            ),
            "the update of the weights": {**update, "gradients": gradients.total, "whole gradients": 0},
        }
