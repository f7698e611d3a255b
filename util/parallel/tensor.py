"""Tensor parallelism: every matrix of the model in parts on several ranks, which all work on the same rows.

Of two products that follow each other the first matrix is cut by columns and the second by rows, so that nothing has to
be exchanged between them (Megatron-LM, arXiv 1909.08053). With 2 ranks, in an MLP and in attention:

              the same rows     gate, up; q, k, v     between          down; o        parts of a sum    the same rows
    rank 0    [T, D]     ---->  [D, half]      ---->  [T, half]  ----> [half, D] ---> [T, D] \\
                         enter                        or its heads                            sum ---->  [T, D]
    rank 1    [T, D]     ---->  [D, half]      ---->  [T, half]  ----> [half, D] ---> [T, D] /   leave

`enter` and `leave` are one all-reduce each in a layer's half: `leave` adds up the parts in the forward pass, `enter`
adds up the gradients in the backward pass. So a layer has two in each pass. With `--sequence_parallel`
(arXiv 2205.05198) a rank keeps only its part of the rows between the halves, where there are norms and sums alone:
`enter` then gathers the rows and `leave` hands each rank the sum of its own.

    held by every rank of a tensor group    norms, patch embedding, learned positions, the tower's qkv, biases that are
                                            added after a sum
    in parts, by columns (rows of weights)  q, k, v, gate, up; the tower's fc1; a merger's first; embedding and head
    in parts, by rows (columns of weights)  o, down; the tower's proj and fc2; a merger's second

The tower's fused qkv stays whole under its name: its rows are those of q, then k, then v, and a rank uses of each the
rows of its own heads. Its gradient is then in parts, which are added up once a step (`agree`). So are the gradients of
Qwen3-VL's norms of queries and keys.

Letters in shapes: T rows (tokens, or patches of the tower), D the width, S supervised tokens, R ranks of a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from util.attention import Segments
from util.collator import Batch
from util.command_line import UserError
from util.cost.shapes import shapes_of
from util.loss import Change, PackedLoss
from util.tensors import run_parameters

AXIS = "tensor"  # of the mesh

# The operations themselves, which compiled and recomputed layers can look at. torch's functions around them have other
# names in each version.
collectives = torch.ops._c10d_functional

# ---- what ranks exchange --------------------------------------------------------------------------------------------


def same(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return rows


def total(rows: torch.Tensor, group: dist.ProcessGroup, of: str = "sum") -> torch.Tensor:
    """The sum (`of`: or another reduction) of all ranks' tensors, on each."""
    return collectives.wait_tensor(collectives.all_reduce(rows.contiguous(), of, group.group_name))


def own_part(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(T, ...) -> this rank's (T / R, ...)."""
    return rows.chunk(group.size())[group.rank()].contiguous()


def gathered(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(T / R, ...) -> all ranks' (T, ...)."""
    whole = collectives.all_gather_into_tensor(rows.contiguous(), group.size(), group.group_name)
    return collectives.wait_tensor(whole)


def own_part_of_total(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(T, ...) -> this rank's part (T / R, ...) of the sum of all ranks' tensors."""
    part = collectives.reduce_scatter_tensor(rows.contiguous(), "sum", group.size(), group.group_name)
    return collectives.wait_tensor(part)


class Exchange(torch.autograd.Function):
    """One of these in the forward pass, and another on the gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, there: Callable, back: Callable, group: dist.ProcessGroup):
        ctx.back = back
        ctx.group = group
        return there(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        return ctx.back(gradient, ctx.group), None, None, None


@dataclass(eq=False)
class Sharing:
    """How the ranks of a tensor group hand each other rows, in all layers alike."""

    group: dist.ProcessGroup
    splits_rows: bool  # --sequence_parallel: between the halves of layers each rank has its part of the rows

    def copied(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows that all ranks have, for products that each has a part of."""
        return Exchange.apply(rows, same, total, self.group)

    def summed(self, parts: torch.Tensor) -> torch.Tensor:
        """Parts of a sum -> the sum, on all ranks."""
        return Exchange.apply(parts, total, same, self.group)

    def enter(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Between a norm and the products that read it: all `count` rows."""
        if not self.splits_rows:
            return self.copied(rows)
        return Exchange.apply(rows, gathered, own_part_of_total, self.group)[:count]

    def leave(self, parts: torch.Tensor) -> torch.Tensor:
        """After the product whose outputs are parts of a sum."""
        if not self.splits_rows:
            return self.summed(parts)
        return Exchange.apply(self.filled_up(parts), own_part_of_total, gathered, self.group)

    def before_layers(self, rows: torch.Tensor) -> torch.Tensor:
        """What the first layer gets of rows that all ranks have."""
        return Exchange.apply(self.filled_up(rows), own_part, gathered, self.group) if self.splits_rows else rows

    def after_layers(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Of what the last layer gives, all `count` rows on all ranks."""
        return Exchange.apply(rows, gathered, own_part, self.group)[:count] if self.splits_rows else rows

    def filled_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows up to a multiple of the ranks; those that are added stay apart, and have no gradient."""
        return F.pad(rows, (0, 0, 0, -len(rows) % self.group.size()))


# ---- modules of which each rank has a part --------------------------------------------------------------------------


class ByColumns(nn.Linear):
    """A linear layer that gives some of its outputs: this rank has the rows of its weight for these."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to_local()
        return F.linear(rows, self.weight.to_local(), bias)


class ByRows(nn.Linear):
    """A linear layer that reads some of its inputs: this rank has the columns of its weight for these."""

    sharing: Sharing

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        summed = self.sum_up(F.linear(rows, self.weight.to_local()))
        return summed if self.bias is None else summed + self.bias  # added once, and not by each rank

    def sum_up(self, parts: torch.Tensor) -> torch.Tensor:
        return self.sharing.leave(parts)


class ByRowsOfAll(ByRows):
    """The same outside of the layers, where every rank has all rows."""

    def sum_up(self, parts: torch.Tensor) -> torch.Tensor:
        return self.sharing.summed(parts)


class OwnHeads(nn.Linear):
    """The tower's fused product for q, k and v, which every rank has whole: of each, the rows of this rank's heads."""

    sharing: Sharing

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = self.own_rows(self.weight), self.own_rows(self.bias)
        return F.linear(rows, weight, bias)

    def own_rows(self, whole: torch.Tensor) -> torch.Tensor:
        group = self.sharing.group
        return whole.unflatten(0, (3, group.size(), -1))[:, group.rank()].flatten(0, 1)


class OwnVocabulary(nn.Embedding):
    """An embedding of which this rank has the rows of some tokens; the others' are zeros here, and all are the sum."""

    sharing: Sharing

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        part = self.weight.to_local()
        index, is_here = in_own_vocabulary(ids, len(part), self.sharing.group)
        return self.sharing.summed(F.embedding(index, part) * is_here[:, None])


Kinds = dict[str, type[nn.Module]]

# the dimension along which a parameter is cut; what is not named stays whole
CUT: dict[type[nn.Module], dict[str, int]] = {
    ByColumns: {"weight": 0, "bias": 0},
    ByRows: {"weight": 1},
    ByRowsOfAll: {"weight": 1},
    OwnHeads: {},
    OwnVocabulary: {"weight": 0},
}


def in_own_vocabulary(ids: torch.Tensor, rows: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens (N,) their rows among the `rows` of this rank, some row where it is another rank's, and whether it is
    here."""
    index = ids - group.rank() * rows
    is_here = (index >= 0) & (index < rows)
    return index.clamp(0, rows - 1), is_here


# ---- the model ------------------------------------------------------------------------------------------------------


class TensorLoss(PackedLoss):
    """A PackedLoss of which each rank of a group has a part: the same rows give the same loss on all of them."""

    sharing: Sharing

    def run_layers(
        self,
        repeated: nn.ModuleList,
        hidden: torch.Tensor,
        rotation: Any,
        segments: Sequence[Segments],
        after: dict[int, Change],
    ) -> torch.Tensor:
        count = len(hidden)
        hidden = self.sharing.before_layers(hidden)
        on_all: dict[int, Change] = {}
        for number, change in after.items():
            on_all[number] = partial(self.on_all_rows, change, count)
        hidden = super().run_layers(repeated, hidden, rotation, segments, on_all)
        return self.sharing.after_layers(hidden, count)

    def on_all_rows(self, change: Change, count: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows between two layers, of which this rank may have a part, changed by what wants all `count` of them."""
        return self.sharing.before_layers(change(self.sharing.after_layers(rows, count)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(S, D) -> those of this rank's part of the vocabulary (S, vocabulary / R)."""
        return super().logits(self.sharing.copied(hidden))

    def token_losses(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        return self.cross_entropies(self.logits(hidden), target_ids)

    def cross_entropies(self, logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """The loss is log(sum(exp(z))) - z[target] over the logits z of all ranks; each rank has a part of the sum, and
        one has the target."""
        group = self.sharing.group
        own = logits.logsumexp(1)  # (S,)
        largest = total(own.detach(), group, "max")  # for numbers that exp can take
        index, is_here = in_own_vocabulary(target_ids, logits.shape[1], group)
        of_target = logits.gather(1, index[:, None])[:, 0] * is_here
        shares, of_target = self.sharing.summed(torch.stack([(own - largest).exp(), of_target]))
        return largest + shares.log() - of_target

    def judged(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        group = self.sharing.group
        logits = self.logits(hidden)
        own, index = logits.max(1)
        largest = total(own, group, "max")
        tokens = index + group.rank() * logits.shape[1]
        # of equals the first, as argmax has it; a rank that has none of them names a token beyond all
        likeliest = total(tokens.where(own == largest, torch.iinfo(tokens.dtype).max), group, "min")
        return torch.stack([self.cross_entropies(logits, target_ids), likeliest == target_ids])

    def score(self, batch: Batch, visual: torch.Tensor | None = None) -> torch.Tensor:
        """As PackedLoss has it, on the first rank; zeros on the others, since evaluation adds up over all ranks."""
        found = super().score(batch, visual)
        return found if self.sharing.group.rank() == 0 else torch.zeros_like(found)


# What becomes of a linear layer of the tower's blocks and of the language model's layers, by the end of its name, which
# each family chooses by itself. One that is not named here is an error, as its gradients would be counted wrongly.
KINDS: Kinds = {
    "qkv": OwnHeads,
    "proj": ByRows,
    "fc1": ByColumns,
    "fc2": ByRows,
    "linear_fc1": ByColumns,
    "linear_fc2": ByRows,
    "q_proj": ByColumns,
    "k_proj": ByColumns,
    "v_proj": ByColumns,
    "o_proj": ByRows,
    "gate_proj": ByColumns,
    "up_proj": ByColumns,
    "down_proj": ByRows,
}


def products(parent: nn.Module) -> list[str]:
    """The names of a module's linear layers, in the order in which it has them."""
    return [name for name, module in parent.named_modules() if isinstance(module, nn.Linear)]


def split(packed: TensorLoss, mesh: DeviceMesh, splits_rows: bool) -> None:
    """Keep of every matrix of a model this rank's part on a mesh of one axis. To be called before FSDP shards the rest.

    Parts are DTensors, which know of what they are parts: checkpoints and exports have whole weights by their names.
    """
    sharing = packed.sharing = Sharing(mesh.get_group(), splits_rows)
    tower = packed.model.model.visual
    language_model = packed.model.model.language_model
    for layer in [*tower.blocks, *language_model.layers]:
        layer.sharing = sharing
        kinds = {name: KINDS[name.rpartition(".")[2]] for name in products(layer)}
        become(kinds, layer, sharing, mesh)
    for block in tower.blocks:
        block.attn.num_heads //= mesh.size()
    for merger in [tower.merger, *getattr(tower, "deepstack_merger_list", ())]:
        first, second = products(merger)
        become({first: ByColumns, second: ByRowsOfAll}, merger, sharing, mesh)
        merger.get_submodule(first).register_forward_pre_hook(lambda module, inputs: (sharing.copied(inputs[0]),))
    is_tied = packed.model.lm_head.weight is language_model.embed_tokens.weight
    become({"embed_tokens": OwnVocabulary}, language_model, sharing, mesh)
    become({"lm_head": ByColumns}, packed.model, sharing, mesh)
    if is_tied:
        packed.model.lm_head.weight = language_model.embed_tokens.weight  # one part, in which both gradients meet


def become(kinds: Kinds, parent: nn.Module, sharing: Sharing, mesh: DeviceMesh) -> None:
    """Let modules, by their names in a parent, be of these kinds, each with this rank's part of its parameters.

    A class and not a forward of each module's own, which dynamo would compile anew for every layer.
    """
    for name, kind in kinds.items():
        module: Any = parent.get_submodule(name)
        module.__class__ = kind
        module.sharing = sharing
        for parameter, dimension in CUT[kind].items():
            if getattr(module, parameter) is not None:
                setattr(module, parameter, part_of_parameter(getattr(module, parameter), mesh, dimension))
        if kind is ByColumns:
            module.out_features //= mesh.size()
        if issubclass(kind, ByRows):
            module.in_features //= mesh.size()


def part_of_parameter(whole: nn.Parameter, mesh: DeviceMesh, dimension: int) -> nn.Parameter:
    part = distribute_tensor(whole.detach(), mesh, [Shard(dimension)], src_data_rank=None)
    return nn.Parameter(part, requires_grad=whole.requires_grad)


def check_sizes(model_config, ranks: int) -> None:
    """Raise UserError where the model cannot be cut into as many equal parts."""
    text = model_config.text_config
    tower = model_config.vision_config
    sizes = {
        "key-value heads": text.num_key_value_heads,
        "attention heads": text.num_attention_heads,
        "heads in the vision tower": tower.num_heads,
        "columns in the MLP": text.intermediate_size,
        "columns in the vision tower's MLP": shapes_of(model_config).block.inner,
        "rows in the embedding": text.vocab_size,
    }
    if fits(sizes, ranks):
        return
    wrong = [f"{size:,} {what}" for what, size in sizes.items() if size % ranks]
    possible = [str(number) for number in range(1, text.num_key_value_heads + 1) if fits(sizes, number)]
    raise UserError(
        f"--tensor_parallel_size {ranks} cannot divide this model's {' and '.join(wrong)}: each rank must have as much "
        f"as another. Sizes that can: {', '.join(possible)}. What helps beyond them is --context_parallel_size"
    )


def fits(sizes: dict[str, int], ranks: int) -> bool:
    return not any(size % ranks for size in sizes.values())


# ---- equal copies ---------------------------------------------------------------------------------------------------


def is_in_parts(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) and AXIS in parameter.device_mesh.mesh_dim_names


def agree(packed: TensorLoss) -> None:
    """Give all ranks of a tensor group the same gradients of what each of them has whole, once a step.

    Of a weight that each uses for its own heads or rows, each has a part of the gradient: their sum. Of any other, all
    have the same but for a last bit (a kernel that adds in no fixed order): their mean. So copies stay equal bit by
    bit, where they would drift apart.
    """
    sharing = packed.sharing
    gradients = []
    for name, parameter in run_parameters(packed).items():
        if parameter.grad is None or is_in_parts(parameter):
            continue
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if not has_partial_gradient(name, sharing.splits_rows):
            gradient /= sharing.group.size()
        gradients.append(gradient)
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=sharing.group)
    agreed = flat.split([gradient.numel() for gradient in gradients])
    for gradient, values in zip(gradients, agreed, strict=True):
        gradient.copy_(values.view_as(gradient))


def has_partial_gradient(name: str, splits_rows: bool) -> bool:
    """Whether a rank's gradient of a weight that it has whole is a part of a sum over the ranks."""
    of_own_heads = any(part in name for part in (".qkv.", ".q_norm.", ".k_norm."))
    return of_own_heads or (splits_rows and (".blocks." in name or ".layers." in name))
