"""Started by torchrun in test_same_model.py: builds models as finetune_distributed.py does and writes what they hold.

torchrun --nproc_per_node 2 tests/built_models.py CONFIGS.json OUT     (a list of Config fields; OUT/0.pt, OUT/1.pt ...)
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from util.collator import Collator
from util.config import Config
from util.conversation import Encoded
from util.dataset import Sample
from util.mixed_adamw import exact_value
from util.model import find_model, load_config, load_processor
from util.parallel import distributed

FAR = 12_000  # positions between the two halves of a row: a video of an hour is as long


def held_by(packed) -> dict[str, torch.Tensor]:
    """A copy of every parameter, whole, and of every buffer, by name. Of several ranks all must call."""
    held = {}
    for name, tensor in [*packed.named_parameters(), *packed.named_buffers()]:
        tensor = exact_value(tensor)
        held[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def row_with_a_gap():
    """A packed batch of one text whose second half lies 12,000 positions behind its first. Positions are relative in
    rotary attention: only far apart do wrong frequencies show."""
    ids = torch.randint(0, 300, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = Collator()([Sample(Encoded(ids, [True] * len(ids), []), [], "text")])
    batch.position_ids[:, len(ids) // 2 :] += FAR
    return batch


@torch.no_grad()
def token_losses(packed) -> torch.Tensor:
    """The cross-entropies (S,) of that row."""
    return packed.eval().score(row_with_a_gap())[0].clone()


def main() -> None:
    out = Path(sys.argv[2])
    for number, settings in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        config = Config(**settings)
        world = distributed.join_group(config, 600)
        torch.manual_seed(config.seed)
        path = find_model(config.model, world.device)
        packed = distributed.build_model(config, path, load_config(path, config), load_processor(path), world)
        held = held_by(packed)  # first: a forward pass leaves working copies in the root
        losses = token_losses(packed)
        if world.is_first:
            torch.save({"held": held, "losses": losses}, out / f"{number}.pt")
    distributed.wait_for_all()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
