"""Started by torchrun in test_context_parallel.py: attention whose heads are dealt against torch's own, then runs with
--context_parallel_size, some with a fault put into them.

torchrun --nproc_per_node 2 tests/context_runs.py RUNS.json 4/2 8/2     (Config fields, "fault" among them; heads / key-value heads)

Beside each run, in RUN_RANK.json: which samples this rank read, and its all-to-alls.
"""

import atexit
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F

import finetune_distributed
from tests.count_bytes import Count
from util.attention import stacked_sdpa
from util.command_line import Ended, UserError
from util.config import Config
from util.dataset import Samples
from util.parallel import context, distributed
from util.parallel.layout import Layout


def check_attention(heads: int, key_value_heads: int) -> None:
    """Outputs and gradients of a row in parts against torch's attention, one segment after the other."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lengths = [7, 1, 5, 8, 2 + ranks - (23 % ranks)]
    tokens = sum(lengths)
    draw = torch.Generator().manual_seed(heads)
    shapes = [(tokens, number, 6) for number in (heads, key_value_heads, key_value_heads, heads)]
    q, k, v, upstream = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    whole = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    found = []
    for begin, end in pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist()):
        of_query, of_key, of_value = (tensor[begin:end].transpose(0, 1)[None] for tensor in whole)
        copies = heads // key_value_heads
        of_key, of_value = (tensor.repeat_interleave(copies, 1) for tensor in (of_key, of_value))
        seen = F.scaled_dot_product_attention(of_query, of_key, of_value, is_causal=True)
        found.append(seen[0].transpose(0, 1))
    expected = torch.cat(found)
    expected.backward(upstream)

    part = slice(rank * tokens // ranks, (rank + 1) * tokens // ranks)
    own = [tensor[part].clone().requires_grad_() for tensor in (q, k, v)]
    segments = context.RowSegments.of(lengths)
    queries = context.send_queries(own[0], dist.group.WORLD)
    mixed = context.attend_by_heads(queries, heads, *own[1:], segments, 6**-0.5, stacked_sdpa, dist.group.WORLD)
    mixed.backward(upstream[part])
    for name, ours, theirs in zip(("output", "q", "k", "v"), [mixed, *(t.grad for t in own)],
                                  [expected, *(t.grad for t in whole)], strict=True):  # fmt: skip
        gap = (ours - theirs[part]).abs().max().item()
        assert gap < 1e-13, f"{heads} heads, {key_value_heads} of them for keys and values, {ranks} ranks: {name} {gap}"


# ---- faults ---------------------------------------------------------------------------------------------------------


def wrong_key_value_heads():
    """A rank's queries read the key-value heads of the next rank."""
    deal = context.deal_heads

    def deal_wrongly(*sizes):
        dealt = deal(*sizes)
        return [replace(own, keys=other.keys) for own, other in zip(dealt, [*dealt[1:], dealt[0]], strict=True)]

    return patch.object(context, "deal_heads", deal_wrongly)


def visual_tokens_in_another_order():
    """Those for a rank are sent last first."""
    order_of = context.order_of

    def backwards(*arguments):
        order = order_of(*arguments)
        ranges = order.index.split(order.sent)
        return replace(order, index=torch.cat([some.flip(0) for some in ranges]))

    return patch.object(context, "order_of", backwards)


def changed_parts(change):
    part_of = context.part_of
    return patch.object(context, "part_of", lambda whole, rank, *more: change(part_of(whole, rank, *more), whole, rank))


def positions_from_the_beginning():
    """Each part has the positions with which the row begins."""
    return changed_parts(
        lambda part, whole, _: replace(part, position_ids=whole.position_ids[:, : len(part.input_ids)])
    )


def positions_after_what_fills_up():
    """A row that is filled up to a multiple has its positions behind those of what fills it up, and not before them."""
    pad = context.F.pad

    def pad_wrongly(tensor, sizes):
        return pad(tensor, sizes[::-1] if tensor.ndim == 2 else sizes)

    return patch.object(context, "F", SimpleNamespace(pad=pad_wrongly))


def targets_of_the_neighbour():
    """A row in a part that predicts the first token of the next part predicts this part's own first."""

    def change(part, whole, rank):
        ids = torch.cat([part.input_ids, part.input_ids[:1]])
        return replace(part, target_ids=ids[part.supervised_index + 1])

    return changed_parts(change)


@contextmanager
def segments_of_the_part():
    """Attention takes the row for one sample: what stands before it is seen."""
    of = context.RowSegments.of
    with patch.object(context.RowSegments, "of", lambda lengths: of([sum(lengths)])):
        yield


def gradients_twice():
    """What comes back of keys and values, for a rank that has the same heads as another, is counted twice."""
    begin = context.begin

    def doubled(numbers, *arguments):
        if numbers.requires_grad:
            numbers = numbers * 1.0
            numbers.register_hook(lambda gradient: 2 * gradient)
        return begin(numbers, *arguments)

    return patch.object(context, "begin", doubled)


def losses_of_a_rank_alone():
    """The loss is divided as if each rank had samples of its own."""
    make = distributed.EvenPasses.__init__

    def make_alone(self, *arguments) -> None:
        make(self, *arguments)
        self.averaged = Layout.of(self.config, dist.get_world_size()).data

    return patch.object(distributed.EvenPasses, "__init__", make_alone)


FAULTS = {
    fault.__name__: fault
    for fault in (
        wrong_key_value_heads,
        visual_tokens_in_another_order,
        positions_from_the_beginning,
        positions_after_what_fills_up,
        targets_of_the_neighbour,
        segments_of_the_part,
        gradients_twice,
        losses_of_a_rank_alone,
    )
}  # fmt: skip


# ---- runs -----------------------------------------------------------------------------------------------------------


@contextmanager
def reads_noted(read: Counter) -> Iterator[None]:
    """Which samples this rank reads for its batches."""
    load = Samples.__getitem__

    def noted(samples, index):
        read[index] += 1
        return load(samples, index)

    with patch.object(Samples, "__getitem__", noted):
        yield


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    atexit.register(distributed.leave_group)  # else a late thread of gloo's may abort a process that is done
    for sizes in sys.argv[2:]:
        check_attention(*map(int, sizes.split("/")))
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        fault = settings.pop("fault", None)
        read: Counter = Counter()
        run = Path(settings["output_dir"])
        with FAULTS[fault]() if fault else nullcontext(), reads_noted(read), Count() as count:
            try:
                finetune_distributed.train(Config(**settings))
            except (UserError, Ended) as error:
                run.mkdir(exist_ok=True)
                (run / f"ended_{dist.get_rank()}").write_text(str(error))
        found = {"read": read, "calls": count.calls, "bytes": count.bytes}
        Path(f"{run}_{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
