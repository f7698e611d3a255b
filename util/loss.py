"""The forward pass, written out by hand on transformers' modules, and the loss on supervised tokens only.

Letters in shapes are those of collator.py, D is the hidden size, and K how many of the language model's first layers
are given visual tokens of their own (Qwen3-VL's deepstack: 3; else 0).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from util import family, head
from util.attention import Segments
from util.collator import Batch
from util.data.features import FeatureWriter
from util.packed_layers import rms_norm

# Rows of logits that exist at a time, where --logit_rows says nothing. 4096 x 151,936 in fp32 are 2.3 GiB, and eager
# three such tensors are there at the loss. Compiled, one in bf16 is left: four times as many rows take less.
LOGIT_ROWS = 4096
COMPILED_LOGIT_ROWS = 16384

Change = Callable[[torch.Tensor], torch.Tensor]  # of rows (T, D) between two layers


def most_logit_rows(asked: int | None, is_compiled: bool) -> int:
    """How many rows of logits exist at a time; `asked`: --logit_rows."""
    return asked or (COMPILED_LOGIT_ROWS if is_compiled else LOGIT_ROWS)


class PackedLoss(nn.Module):
    """A model of one of the families (family.py) whose forward is: packed batch -> sum of cross-entropies.

    One module's forward and not a function, because under FSDP2 every weight must be used within the root's forward.
    """

    pixel_scale: torch.Tensor  # (3,): a pixel times scale plus shift is what the tower sees
    pixel_shift: torch.Tensor

    def __init__(self, model: PreTrainedModel, processor, dtype: torch.dtype, logit_rows: int = LOGIT_ROWS) -> None:
        super().__init__()
        self.model: Any = model  # transformers' modules, whose own types say Tensor or Module of every part
        self.reshard_after_forward = False  # of its layers, where they are sharded: see shard in util/model.py
        self.logit_rows = logit_rows
        self.dtype = dtype  # of compute; the weights may be kept in a wider one
        self.kept: FeatureWriter | None = None  # of a frozen tower, where what it gives is kept: util/frozen.py
        wide = torch.promote_types(dtype, torch.float32)
        mean = torch.tensor(processor.image_processor.image_mean, dtype=wide)
        std = torch.tensor(processor.image_processor.image_std, dtype=wide)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", -mean / std, persistent=False)

    def whole_form(self) -> Any:
        """The model with all its modules, as it is written: of its weights only the names count."""
        return self.model

    def forward(self, batch: Batch) -> torch.Tensor:
        """The cross-entropies of all supervised tokens, each times its weight, summed up: a scalar in fp32 (fp64 where
        the model's weights are)."""
        hidden = self.supervised_rows(batch, *self.embed(batch))
        if len(hidden) <= self.logit_rows:
            return (self.token_losses(hidden, batch.target_ids) * batch.target_weights).sum()
        # Logits of all rows at once would be the largest tensor of a step. They are made chunk by chunk, and made
        # anew in the backward pass instead of being kept for it.
        losses = []
        for rows, targets in chunks(hidden, batch.target_ids, self.logit_rows):
            losses.append(checkpoint(self.token_losses, rows, targets, use_reentrant=False))
        return (torch.cat(losses) * batch.target_weights).sum()

    def score(self, batch: Batch, visual: torch.Tensor | None = None) -> torch.Tensor:
        """For evaluation: (2, S), the cross-entropy of each supervised token, and 1.0 where it has the largest logit.

        `visual` (V, 1 + K, D): the batch's visual tokens, where they are known already.
        """
        hidden = self.supervised_rows(batch, *self.embed(batch, visual))
        found = [torch.zeros(2, 0, device=hidden.device)]
        for rows, targets in chunks(hidden, batch.target_ids, self.logit_rows):
            found.append(self.judged(rows, targets))
        return torch.cat(found, dim=1)

    def judged(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """(S, D), (S,) -> of each token its cross-entropy, and 1.0 where it has the largest logit (2, S)."""
        logits = self.logits(hidden)
        losses = F.cross_entropy(logits, target_ids, reduction="none")
        return torch.stack([losses, logits.argmax(1) == target_ids])

    def supervised_rows(self, batch: Batch, embeddings: torch.Tensor, deeper: torch.Tensor) -> torch.Tensor:
        """What `embed` gives -> the hidden states (S, D) whose next token is supervised: the head sees no other row."""
        hidden = self.decode(batch, embeddings, deeper)
        # A prompt's tokens have no target: the head, 152,000 logits wide, skips them.
        supervised = hidden.index_select(0, batch.supervised_index)
        # the norm works row by row, so the others can do without
        return rms_norm(self.model.model.language_model.norm, supervised)

    def decode(self, batch: Batch, embeddings: torch.Tensor, deeper: torch.Tensor) -> torch.Tensor:
        """The decoder layers: (T, D) -> (T, D). `deeper` (V, K, D): added to visual tokens after the first K layers."""
        language_model = self.model.model.language_model
        hidden = embeddings  # (T, D)
        cos, sin = language_model.rotary_emb(hidden, batch.position_ids[:, None])  # (1, T, width of a head) each
        # transformers' own model would build a mask of T x T; these layers take where each sample begins and ends.
        layers = language_model.layers
        after: dict[int, Change] = {}
        for number, visual in enumerate(deeper.unbind(1)):
            after[number] = partial(add_visual, visual, batch.visual_index)
        return self.run_layers(layers, hidden, (cos[0], sin[0]), [batch.segments] * len(layers), after)

    def embed(self, batch: Batch, visual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The row's embeddings (T, D), visual tokens in their places, and what is added to these later (V, K, D).

        `visual` (V, 1 + K, D): the visual tokens, where they are known already.
        """
        hidden = self.model.model.language_model.embed_tokens(batch.input_ids)
        if not len(batch.visual_index) and not len(batch.vision_position_ids):
            return hidden, hidden.new_zeros(0, 0, hidden.shape[1])
        if visual is None:
            visual = self.visual_tokens(batch)
        # A rank without pictures has dummy patches (EvenCollator in parallel/rows.py): drop their tokens.
        visual = visual[: len(batch.visual_index)].to(hidden.dtype)
        return hidden.index_copy(0, batch.visual_index, visual[:, 0]), visual[:, 1:]

    def visual_tokens(self, batch: Batch) -> torch.Tensor:
        """The batch's visual tokens (V, 1 + K, D): those whose features were kept, then of images, then of videos.

        The first of 1 + K stands in the row; the others are added to it after the first K layers.
        """
        visual = self.model.model.visual
        merger = visual.merger
        is_merged = self.kept is not None and self.kept.after_merger  # whether what is kept is visual tokens already
        parts = [batch.kept_features] if len(batch.kept_features) else []
        deeper = []
        if len(batch.vision_position_ids):
            *before, computed = self.tower(batch)
            for level, rows in enumerate(before):
                deeper.append(visual.deepstack_merger_list[level](rows))
            if is_merged:
                computed = merger(computed)
            if self.kept is not None:
                self.kept.take(batch.unkept, computed)
            parts.append(computed)
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.stack([hidden if is_merged else merger(hidden), *deeper], dim=1)

    def tower(self, batch: Batch) -> list[torch.Tensor]:
        """The vision tower on all patches of the batch at once: what the deepstack mergers take of K of its blocks, and
        what the merger takes of its last one, (P, width) each."""
        visual = self.model.model.visual
        hidden = self.embed_patches(batch.image_patches, batch.video_patches)  # (P, tower's width)
        if hasattr(visual, "pos_embed"):  # Qwen3-VL has learned positions, too
            t, h, w = batch.grid_thw.unbind(1)  # for `prod` CUDA would compile a kernel at run time
            sizes = batch.grid_thw[:, 1:].repeat_interleave(t * h * w, dim=0, output_size=len(hidden))
            learned = family.stretched(visual.pos_embed, batch.vision_position_ids, sizes)
            hidden = hidden + learned.to(hidden.dtype)
        # 2D rotary embedding: half of the angles from the patch's row, half from its column
        angles = batch.vision_position_ids[:, :, None] * visual.rotary_pos_emb.inv_freq.float()  # (P, 2, width / 4)
        angles = angles.flatten(1).repeat(1, 2)
        # An image sees itself, and of a video each pair of frames; in most of Qwen2.5-VL's blocks windows of these.
        blocks = range(len(visual.blocks))
        whole = getattr(visual, "fullatt_block_indexes", blocks)
        segments = [batch.vision_segments if number in whole else batch.window_segments for number in blocks]
        taken = []

        def take(hidden: torch.Tensor) -> torch.Tensor:
            taken.append(hidden)
            return hidden

        after: dict[int, Change] = dict.fromkeys(getattr(visual, "deepstack_visual_indexes", ()), take)
        hidden = self.run_layers(visual.blocks, hidden, (angles.cos(), angles.sin()), segments, after)
        return [*taken, hidden]

    def run_layers(
        self,
        repeated: nn.ModuleList,
        hidden: torch.Tensor,
        rotation: Any,
        segments: Sequence[Segments],
        after: dict[int, Change],
    ) -> torch.Tensor:
        """Rows (T, D) -> (T, D), through the tower's blocks or the language model's layers. `rotation`: cos and sin of
        each row's angles; `segments`: of each layer; `after`: what is done with the rows after some, by their
        numbers."""
        for number, layer in enumerate(repeated):
            hidden = layer(hidden, position_embeddings=rotation, segments=segments[number])
            if number in after:
                hidden = after[number](hidden)
        return hidden

    def embed_patches(self, image_patches: torch.Tensor, video_patches: torch.Tensor) -> torch.Tensor:
        """uint8 patches -> (P, width). The convolution's kernel is its stride, so it is a matrix product.

        An image is a video of one frame shown twice: adding up the kernel over its two frames saves half of it.
        """
        convolution = self.model.model.visual.patch_embed.proj
        kernel = convolution.weight  # (width, channels, frames, patch, patch)
        images = F.linear(self.normalise(image_patches), kernel.sum(2).flatten(1), convolution.bias)
        if not len(video_patches):
            return images
        videos = F.linear(self.normalise(video_patches), kernel.flatten(1), convolution.bias)
        return torch.cat([images, videos])

    def normalise(self, patches: torch.Tensor) -> torch.Tensor:
        """uint8 (P, 3 * n) -> (P, 3 * n) in the dtype of compute, normalised by channel."""
        # Patches travel to the device as bytes: 8 times less than the processor's floats for images, 4 for videos.
        pixels = patches.unflatten(1, (3, -1)).to(self.pixel_scale.dtype)
        pixels = pixels * self.pixel_scale[:, None] + self.pixel_shift[:, None]
        return pixels.flatten(1).to(self.dtype)

    def token_losses(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """(S, D), (S,) -> the cross-entropy of each token (S,). May run twice (see forward), so it must be pure.

        Another loss begins here: docs/adding.md.
        """
        if head.takes(self.model.lm_head, hidden):
            return head.cross_entropies(hidden, self.model.lm_head.weight, target_ids)
        return F.cross_entropy(self.logits(hidden), target_ids, reduction="none")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(S, D) -> (S, vocabulary), in fp32 at least: in bf16 a loss has three digits."""
        logits = self.model.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def add_visual(visual: torch.Tensor, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states (T, D) with visual tokens (V, D) added to those that stand in these rows (V,)."""
    return hidden.index_add(0, rows, visual)


def chunks(hidden: torch.Tensor, target_ids: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows (S, D) and their targets (S,), `size` at a time."""
    return zip(hidden.split(size), target_ids.split(size), strict=True)
