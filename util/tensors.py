"""The tensors of a run: every parameter as it is trained and saved, whatever the model has computed before."""

from torch import nn
from torch.distributed.fsdp import FSDPModule

from util.adapters import lora

PARTS = ("vision", "merger", "language_model")


def part_of(name: str) -> str:
    """The part a parameter belongs to, by its name: vision, merger or language_model (with embedding and head)."""
    if ".visual.merger." in f".{name}" or ".visual.deepstack_merger_list." in f".{name}":
        return "merger"
    return "vision" if ".visual." in f".{name}" else "language_model"


def run_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by name: in the precision it is trained in and, of several ranks, this rank's shard.

    Who saves, loads, exports, clips or optimises asks here, never `named_parameters()`: a unit of `fully_shard` shows
    its gathered copies in the precision of compute as long as it holds them. The root does so after every forward pass
    without a backward pass, and under --sharding gradients, optimizer and none each layer does. They are let go here,
    which no other rank has to know of; the next forward pass gathers them again, from weights as they then are.

    `model` must be the whole, as it was built: of a part, the unit that holds its tensors may be the root outside it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint or an export must hold: of a model with adapters these alone, else every parameter."""
    adapted = lora.has_adapters(model)
    return {
        name: parameter for name, parameter in run_parameters(model).items() if parameter.requires_grad or not adapted
    }
