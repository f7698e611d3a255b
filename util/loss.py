"""The forward pass, written out by hand on transformers' modules, and the loss on supervised tokens only.

Letters in shapes are those of collator.py, and D is the hidden size.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2VLForConditionalGeneration

from util import head
from util.collator import Batch
from util.data.features import FeatureWriter
from util.packed_layers import rms_norm

# Rows of logits that exist at a time, where --logit_rows says nothing. 4096 x 151,936 in fp32 are 2.3 GiB, and eager
# three such tensors are there at the loss. Compiled, one in bf16 is left: four times as many rows take less.
LOGIT_ROWS = 4096
COMPILED_LOGIT_ROWS = 16384


def most_logit_rows(asked: int | None, is_compiled: bool) -> int:
    """How many rows of logits exist at a time; `asked`: --logit_rows."""
    return asked or (COMPILED_LOGIT_ROWS if is_compiled else LOGIT_ROWS)


class PackedLoss(nn.Module):
    """A Qwen2VLForConditionalGeneration whose forward is: packed batch -> sum of cross-entropies.

    One module's forward and not a function, because under FSDP2 every weight must be used within the root's forward.
    """

    pixel_scale: torch.Tensor  # (3,): a pixel times scale plus shift is what the tower sees
    pixel_shift: torch.Tensor

    def __init__(
        self, model: Qwen2VLForConditionalGeneration, processor, dtype: torch.dtype, logit_rows: int = LOGIT_ROWS
    ) -> None:
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
        hidden = self.supervised_rows(batch, self.embed(batch))
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

        `visual` (V, D): the batch's visual tokens, where they are known already.
        """
        hidden = self.supervised_rows(batch, self.embed(batch, visual))
        found = [torch.zeros(2, 0, device=hidden.device)]
        for rows, targets in chunks(hidden, batch.target_ids, self.logit_rows):
            found.append(self.judged(rows, targets))
        return torch.cat(found, dim=1)

    def judged(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """(S, D), (S,) -> of each token its cross-entropy, and 1.0 where it has the largest logit (2, S)."""
        logits = self.logits(hidden)
        losses = F.cross_entropy(logits, target_ids, reduction="none")
        return torch.stack([losses, logits.argmax(1) == target_ids])

    def supervised_rows(self, batch: Batch, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (T, D) -> the hidden states (S, D) whose next token is supervised: the head sees no other row."""
        hidden = self.decode(batch, embeddings)
        # A prompt's tokens have no target: the head, 152,000 logits wide, skips them.
        supervised = hidden.index_select(0, batch.supervised_index)
        # the norm works row by row, so the others can do without
        return rms_norm(self.model.model.language_model.norm, supervised)

    def decode(self, batch: Batch, embeddings: torch.Tensor) -> torch.Tensor:
        """The decoder layers: (T, D) -> (T, D)."""
        language_model = self.model.model.language_model
        hidden = embeddings  # (T, D)
        cos, sin = language_model.rotary_emb(hidden, batch.position_ids[:, None])  # (1, T, width of a head) each
        # transformers' own model would build a mask of T x T; these layers take where each sample begins and ends.
        return self.run_layers(language_model.layers, hidden, (cos[0], sin[0]), batch.segments)

    def embed(self, batch: Batch, visual: torch.Tensor | None = None) -> torch.Tensor:
        """The row's embeddings (T, D), visual tokens in their places; `visual` (V, D) where they are known already."""
        hidden = self.model.model.language_model.embed_tokens(batch.input_ids)
        if not len(batch.visual_index) and not len(batch.vision_position_ids):
            return hidden
        if visual is None:
            visual = self.visual_tokens(batch)
        # A rank without pictures has dummy patches (EvenCollator in parallel/rows.py): drop their tokens.
        visual = visual[: len(batch.visual_index)].to(hidden.dtype)
        return hidden.index_copy(0, batch.visual_index, visual)

    def visual_tokens(self, batch: Batch) -> torch.Tensor:
        """The batch's visual tokens (V, D): those whose features were kept, then of images, then of videos."""
        merger = self.model.model.visual.merger
        is_merged = self.kept is not None and self.kept.after_merger  # whether what is kept is visual tokens already
        parts = [batch.kept_features] if len(batch.kept_features) else []
        if len(batch.vision_position_ids):
            computed = self.tower(batch)
            if is_merged:
                computed = merger(computed)
            if self.kept is not None:
                self.kept.take(batch.unkept, computed)
            parts.append(computed)
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        return hidden if is_merged else merger(hidden)

    def tower(self, batch: Batch) -> torch.Tensor:
        """The vision tower on all patches of the batch at once: (P, width), what the merger takes."""
        visual = self.model.model.visual
        hidden = self.embed_patches(batch.image_patches, batch.video_patches)  # (P, tower's width)
        # 2D rotary embedding: half of the angles from the patch's row, half from its column
        angles = batch.vision_position_ids[:, :, None] * visual.rotary_pos_emb.inv_freq.float()  # (P, 2, width / 4)
        angles = angles.flatten(1).repeat(1, 2)
        # an image sees itself, and of a video each pair of frames
        return self.run_layers(visual.blocks, hidden, (angles.cos(), angles.sin()), batch.vision_segments)

    def run_layers(self, repeated: nn.ModuleList, hidden: torch.Tensor, rotation: Any, segments: Any) -> torch.Tensor:
        """Rows (T, D) -> (T, D), through the tower's blocks or the language model's layers. `rotation`: cos and sin of
        each row's angles."""
        for layer in repeated:
            hidden = layer(hidden, position_embeddings=rotation, segments=segments)
        return hidden

    def embed_patches(self, image_patches: torch.Tensor, video_patches: torch.Tensor) -> torch.Tensor:
        """uint8 patches -> (P, width). The convolution's kernel is its stride, so it is a matrix product.

        An image is a video of one frame shown twice: adding up the kernel over its two frames saves half of it.
        """
        kernel = self.model.model.visual.patch_embed.proj.weight  # (width, channels, frames, 14, 14)
        images = F.linear(self.normalise(image_patches), kernel.sum(2).flatten(1))
        if not len(video_patches):
            return images
        return torch.cat([images, F.linear(self.normalise(video_patches), kernel.flatten(1))])

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


def chunks(hidden: torch.Tensor, target_ids: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows (S, D) and their targets (S,), `size` at a time."""
    return zip(hidden.split(size), target_ids.split(size), strict=True)
