"""Started by torchrun in test_tensor_parallel.py: what single steps of two tensor ranks exchange, hold and compute, then
whole runs in the same processes.

torchrun --nproc_per_node 2 tests/tensor_checks.py CASES.json FOLDER     (Config fields; one JSON of findings per rank)
"""

import atexit
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist

import finetune_distributed
from tests.count_bytes import Count
from util import model, optimizer
from util.collator import Batch
from util.config import Config
from util.data.bad_samples import LenientCollator
from util.dataset import Samples, load_examples
from util.model import load_config, load_processor
from util.optimizer import build_optimizer, clip_gradient
from util.parallel import distributed, faults, tensor
from util.parallel.rows import EvenCollator
from util.tensors import PARTS, part_of, run_parameters
from util.vision import Budget

CPU = torch.device("cpu")
DRIFT = 1e-9


def build(config: Config, world):
    return distributed.build_model(config, config.model, load_config(config.model), load_processor(config.model), world)


def whole(found: torch.Tensor) -> torch.Tensor:
    return found.full_tensor() if hasattr(found, "full_tensor") else found


# ---- what is exchanged ----------------------------------------------------------------------------------------------


def exchanged(config: Config, world, batch: Batch) -> dict:
    """Calls, and bytes handed in, of the forward and of the backward pass of one batch."""
    packed = build(config, world)
    with Count() as count:
        count.kind = "forward_"
        loss = packed(batch)
        count.kind = "backward_"
        loss.backward()
    return {"calls": count.calls, "bytes": count.bytes}


# ---- gradients, with and without planted faults ---------------------------------------------------------------------


def wrong_heads(layer: tensor.ByColumns, rows: torch.Tensor) -> torch.Tensor:
    """Every other row of the keys' and values' weights, where a rank's part must be whole heads."""
    weight = layer.weight.to_local()
    if layer.weight.shape[0] == 64:  # two heads of 32
        weight = layer.weight.full_tensor()[dist.get_rank() :: 2]
    return torch.nn.functional.linear(rows, weight, None if layer.bias is None else layer.bias.to_local())


own_lookup = tensor.OwnVocabulary.forward


def counted_twice(embedding: tensor.OwnVocabulary, ids: torch.Tensor) -> torch.Tensor:
    """The gradient of every rank's rows is that of all ranks, added up though each has the whole of it."""
    return embedding.sharing.copied(own_lookup(embedding, ids))


def norm_of_all_ranks(trained) -> torch.Tensor:
    """What every rank has whole counts once for each of them."""
    parts = [parameter.grad.to_local().double().square().sum() for parameter in trained]
    square = torch.stack(parts).sum()
    dist.all_reduce(square)
    return square.sqrt()


def filled_up_in_front(sharing: tensor.Sharing, rows: torch.Tensor) -> torch.Tensor:
    """So that every row has the position of the one before it."""
    more = -len(rows) % sharing.group.size()
    return torch.nn.functional.pad(rows, (0, 0, more, 0))


FAULTS = {
    "none": None,
    "a key-value head is cut wrongly": (tensor.ByColumns, "forward", wrong_heads),
    "the tied gradient counts twice": (tensor.OwnVocabulary, "forward", counted_twice),
    "the gradient of qkv is not summed": (tensor, "has_partial_gradient", lambda name, splits_rows: False),
    "the norm counts copies twice": (optimizer, "total_norm", norm_of_all_ranks),
}
FAULTS_IN_ROWS = {"none": None, "rows are filled up in front": (tensor.Sharing, "filled_up", filled_up_in_front)}


def differences(config: Config, world, batch: Batch, fault: tuple | None) -> dict:
    """By how much the loss, the gradients and their norm differ from those of one process."""
    alone = model.pack_loss(model.load_trainable(config, config.model, CPU), config, load_processor(config.model), CPU)
    expected = alone(batch)
    expected.backward()
    expected_norm = torch.stack([parameter.grad.norm() for parameter in alone.parameters()]).norm()
    with ExitStack() as planted:
        if fault:
            planted.enter_context(mock.patch.object(*fault))
        packed = build(config, world)
        loss = packed(batch)
        loss.backward()
        tensor.agree(packed)
        found = {name: whole(parameter.grad) for name, parameter in run_parameters(packed).items()}
        norm = clip_gradient(packed, None, 0.0)
    assert found.keys() == dict(alone.named_parameters()).keys(), "names are not those of one process"
    gaps = [(found[name] - parameter.grad).abs().max().item() for name, parameter in alone.named_parameters()]
    return {
        "loss": abs(loss.item() - expected.item()),
        "gradient": max(gaps),
        "norm": abs(norm.item() - expected_norm.item()),
    }


def held(packed) -> dict:
    """How many numbers of each part of the model this rank has."""
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in run_parameters(packed).items():
        found[part_of(name)] += parameter.to_local().numel()
    return found


# ---- equal copies ---------------------------------------------------------------------------------------------------


def drift(config: Config, world, batch: Batch, agree: bool) -> dict:
    """Whether copies are equal bit by bit after a step in which one rank's gradients were off by a billionth; and what
    each rank gives as the loss of a step."""
    packed = build(config, world)
    adam = build_optimizer(packed, config)

    def run_pass(batch: Batch, divisor: float) -> torch.Tensor:
        loss = packed(batch)
        (loss / divisor).backward()
        if world.rank == 1:
            for parameter in run_parameters(packed).values():
                if not tensor.is_in_parts(parameter):
                    parameter.grad.mul_(1 + DRIFT)
        return loss.detach()

    steps = SimpleNamespace(sizes=SimpleNamespace(tokens=np.array([1]), usable=np.array([0])))
    passes = distributed.EvenPasses(run_pass, packed, adam, CPU, steps, None, None, config)
    with ExitStack() as without:
        if not agree:
            without.enter_context(mock.patch.object(tensor, "agree"))
        loss = passes.run(1, [batch], 1.0)
        clip_gradient(packed, adam, 1.0)
        adam.step()
    unequal = 0
    for parameter in run_parameters(packed).values():
        if not tensor.is_in_parts(parameter):
            own = parameter.detach().to_local()
            copies = [torch.empty_like(own) for _ in range(world.size)]
            dist.all_gather(copies, own)
            unequal += not torch.equal(*copies)
    return {"unequal": unequal, "loss": loss.item()}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    atexit.register(distributed.leave_group)  # else a late thread of gloo's may abort a process that is done
    cases = json.loads(Path(sys.argv[1]).read_text())
    plain = Config(**cases["plain"])
    world = distributed.make_world(plain, CPU)
    processor = load_processor(plain.model)
    samples = Samples(load_examples(plain.data, processor), processor, Budget.of(plain, "qwen2_vl"))
    batch = LenientCollator(EvenCollator())([samples[number] for number in cases["samples"]])
    found = {
        "rows": len(batch.input_ids),
        "patches": len(batch.vision_position_ids),
        "supervised": len(batch.target_ids),
    }
    found["exchanged"] = {
        name: exchanged(Config(**{**cases["plain"], **changes}), world, batch)
        for name, changes in cases["exchanged"].items()
    }
    found["faults"] = {name: differences(plain, world, batch, fault) for name, fault in FAULTS.items()}
    in_rows = Config(**{**cases["plain"], "sequence_parallel": True})
    for name, fault in FAULTS_IN_ROWS.items():
        found["faults"][f"{name}, in rows"] = differences(in_rows, world, batch, fault)
    found["agreed"] = drift(plain, world, batch, agree=True)
    found["drifted"] = drift(plain, world, batch, agree=False)
    found["held"] = held(build(plain, world))
    (Path(sys.argv[2]) / f"rank_{world.rank}.json").write_text(json.dumps(found))
    faults.EVERY, faults.MEASURED = 3, 2  # steps between comparisons of the ranks, which runs of a few steps reach
    for settings in cases["runs"]:
        finetune_distributed.train(Config(**settings))
    dist.barrier()


if __name__ == "__main__":
    main()
