"""Started by torchrun in test_scaling.py: trains single steps and counts what each rank hands to every collective.

torchrun --nproc_per_node 2 tests/count_bytes.py CASES.json FOLDER     (a list of Config fields; one JSON per rank)

The count knows nothing of FSDP2: it sees every operation of torch.distributed as PyTorch dispatches it. The process
groups number the collectives they run themselves; a step in which the two disagree has a collective that escaped.
"""

import atexit
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from util.collator import total_counts
from util.config import Config
from util.data.bad_samples import LenientCollator
from util.dataset import Samples, load_examples
from util.model import load_config, load_processor
from util.optimizer import build_optimizer, clip_gradient
from util.parallel import distributed
from util.parallel.rows import EvenCollator
from util.vision import Budget

# operation -> its name here, and which of its arguments the rank hands in
OPERATIONS = {
    "c10d._allgather_base_": ("all_gather", 1),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.allreduce_": ("all_reduce", 0),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.all_to_all_single": ("all_to_all", 0),
    "_c10d_functional.all_gather_into_tensor": ("gather_rows", 0),
    "_c10d_functional.reduce_scatter_tensor": ("scatter_rows", 0),
}


class Count(TorchDispatchMode):
    """Calls and bytes handed in, by collective; `kind` parts those of the passes from the scalars around them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes, self.kind = Counter(), Counter(), ""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # look at what it does with its local tensors
        name = f"{operation.namespace}.{operation._schema.name.split('::')[1]}"
        if name in OPERATIONS:  # one that is missing there shows in the numbers of the process groups
            collective, position = OPERATIONS[name]
            handed = arguments[position]
            for tensor in handed if isinstance(handed, list) else [handed]:
                self.bytes[f"{self.kind}{collective}"] += tensor.numel() * tensor.itemsize
            self.calls[f"{self.kind}{collective}"] += 1
        return operation(*arguments, **(keywords or {}))


def collectives_run() -> int:
    """How many collectives all process groups of this rank have numbered so far."""
    return sum(group._get_sequence_number_for_group() for group in _world.pg_map)


def train_step(model, optimizer, micro_batches: list, config: Config, world) -> dict:
    """One step as finetune_distributed.py makes it, counted."""
    before = collectives_run()
    with Count() as count:
        count.kind = "scalar_"
        totals = total_counts(micro_batches)
        totals = world.sum(totals)
        count.kind = ""
        loss_sum = torch.zeros((), dtype=torch.float64)
        for batch in micro_batches:
            distributed.before_backward(model, config, is_last=batch is micro_batches[-1])
            batch_loss_sum = model(batch)
            (batch_loss_sum / totals["supervised_tokens"] * world.size).backward()
            loss_sum += batch_loss_sum.detach()
        count.kind = "scalar_"
        distributed.drop_blank_gradients(model, totals["visual_tokens"])
        norm = clip_gradient(model, optimizer, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        world.sum({"loss_sum": loss_sum.item()})
    assert norm > 0
    return {"calls": count.calls, "bytes": count.bytes, "numbered": collectives_run() - before}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    atexit.register(distributed.leave_group)  # else a late thread of gloo's may abort a process that is done
    world = distributed.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    configs = [Config(**settings) for settings in json.loads(Path(sys.argv[1]).read_text())]
    common, collator, found = configs[0], LenientCollator(EvenCollator()), []
    processor = load_processor(common.model)
    samples = Samples(load_examples(common.data, processor), processor, Budget.of(common, "qwen2_vl"))
    first, second = collator([samples[world.rank]]), collator([samples[world.size + world.rank]])
    if world.rank == world.size - 1:
        second = collator([])  # the last rank has run out of samples
    for config in configs:
        model = distributed.build_model(config, config.model, load_config(config.model), processor, world)
        optimizer = build_optimizer(model, config)
        # two micro-batches, then one: nothing is left over
        found.append([train_step(model, optimizer, step, config, world) for step in ([first, second], [first])])
    (Path(sys.argv[2]) / f"rank_{world.rank}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main()
