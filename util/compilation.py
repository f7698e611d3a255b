"""`--compile`: torch.compile for layers that meet rows of another length in every batch.

Dynamo keeps at most 8 graphs of one function (`torch._dynamo.config.recompile_limit`); what would need another runs as
it is, slower than without compilation. So few graphs must serve every batch, and who reaches the limit must be told.
"""

import logging
from collections.abc import Iterable
from functools import partial

from torch import nn
from tqdm import tqdm


def compile_layers(blocks: Iterable[nn.Module], decoder_layers: Iterable[nn.Module]) -> None:
    """Compile the tower's blocks and the language model's layers, each when it is first called.

    Sizes are symbols from the first batch on (`dynamic`). Both kinds of layers are called through one function of
    transformers, which would have to share 8 graphs; so each kind gets a function of its own. A graph is then made for
    training and for evaluation, and of the language model's first layer, whose input is another kind of tensor.
    """
    for layers, run in ((blocks, tower_block), (decoder_layers, decoder_layer)):
        for layer in layers:
            layer.forward = partial(run, layer.forward)
            layer.compile(dynamic=True)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(known, LimitReached) for known in logger.filters):
        logger.addFilter(LimitReached())


def tower_block(forward, *args, **kwargs):
    return forward(*args, **kwargs)


def decoder_layer(forward, *args, **kwargs):
    return forward(*args, **kwargs)


class LimitReached(logging.Filter):
    """Says in one line above the progress bar, once for each function, what dynamo logs at length."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("torch._dynamo hit config."):
            return True
        name, limit, function, reason = record.args[:4]
        if function not in self.told:
            self.told.add(function)
            tqdm.write(
                f"--compile: {limit} graphs of {function} were made, dynamo's {name}. Batches that none of them fits "
                f"now run without compilation (the last reason: {str(reason).strip()})"
            )
        return False
