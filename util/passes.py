"""The forward and backward passes of a step, and what happens where a device runs out of memory in them: the step is
tried again in smaller micro-batches, which changes nothing but memory and time.
"""

import gc
import traceback
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from util import ranks
from util.checkpoint import Saver
from util.collator import Batch
from util.command_line import is_out_of_memory
from util.guard import StopSignal
from util.optimizer import sum_gradients_in_fp32
from util.steps import Steps

Work = TypeVar("Work")
Item = TypeVar("Item")
Found = TypeVar("Found")


class Passes:
    """Runs the passes of each step; remembers how large a micro-batch may be, once one was too large.

    On several ranks a failed step cannot be tried again: the others wait in the middle of a pass for this one's part.
    There the error is raised, which ends the job with a message.
    """

    def __init__(
        self,
        run_pass: Callable[[Batch, float], torch.Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        steps: Steps,
        stop: StopSignal,
        saver: Saver,
    ) -> None:
        """`run_pass` (micro-batch, divisor): its forward and backward pass, which the scripts write out themselves."""
        self.run_pass, self.model, self.optimizer, self.device = run_pass, model, optimizer, device
        self.longest = int(steps.sizes.tokens[steps.sizes.usable].max(initial=0))  # tokens of a sample
        self.stop, self.saver = stop, saver
        self.most_tokens: int | None = None  # of a micro-batch, since memory ran out
        self.failed: Batch | None = None  # the last one that was too large
        self.error = ""

    def run(self, step: int, micro_batches: Sequence[Batch], divisor: float) -> torch.Tensor:
        """The passes of all micro-batches: gradients of the losses' sum, divided, are added to the parameters.

        Returns the sum of losses, a scalar in fp64 on the device. Where memory runs out all of them run again, in
        smaller ones and from gradients of zero (an adapter's dropout draws anew). Raises Ended, with the run saved,
        where a single sample is too large.
        """
        while True:
            loss_sum = self.attempt(self.split(micro_batches), divisor)
            if loss_sum is not None:
                return loss_sum
            assert self.failed
            self.optimizer.zero_grad()  # of the passes that did succeed
            free_memory()
            if not self.failed.halves():
                self.stop.end_out_of_memory(self.why(self.failed), step, self.saver, self.model, self.optimizer)
            self.most_tokens = tokens_of(self.failed) // 2
            sum_gradients_in_fp32(self.model)  # a step that had one pass has several now
            self.stop.run.say(self.what_now(step, self.failed))

    def attempt(self, micro_batches: Sequence[Batch], divisor: float) -> torch.Tensor | None:
        """The sum of losses; None where memory ran out: what the passes held is let go with this function's end."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # stays there: reading it would wait
        for batch in micro_batches:
            try:
                batch_loss_sum = self.run_one(batch, divisor, is_last=batch is micro_batches[-1])
            except Exception as error:
                if not is_out_of_memory(error) or ranks.are_several():
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold the activations
                self.failed, self.error = batch, str(error)
                return None
            loss_sum += batch_loss_sum
        return loss_sum

    def run_one(self, batch: Batch, divisor: float, is_last: bool) -> torch.Tensor:
        """The sum of losses of one micro-batch. On several ranks what `is_last` says matters (EvenPasses)."""
        return self.run_pass(batch, divisor)

    def split(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same samples in micro-batches of at most `most_tokens`, or of one sample."""
        small: list[Batch] = []
        for batch in batches:
            is_large = self.most_tokens is not None and tokens_of(batch) > self.most_tokens
            halves = batch.halves() if is_large else []
            small += self.split(halves) if halves else [batch]
        return small

    def what_now(self, step: int, failed: Batch) -> str:
        return (
            f"step {step}: out of memory in a micro-batch of {len(failed.where)} samples and {tokens_of(failed):,} "
            f"tokens. It runs again, and what follows too, in micro-batches of at most {self.most_tokens:,} tokens or "
            "one sample, which changes memory and time alone. To begin so: "
            f"--max_tokens {max(self.most_tokens or 0, self.longest)}"
        )

    def why(self, failed: Batch) -> str:
        """What is said where nothing is left to try."""
        return (
            f"out of memory in the pass of a single sample, {', '.join(failed.where)} ({tokens_of(failed):,} tokens): "
            f"{self.error}\nWhat helps: --activation_checkpointing full, --logit_rows 512, a smaller --max_pixels, "
            "--freeze vision, --lora_rank 16"
        )


def tokens_of(batch: Batch) -> int:
    return len(batch.input_ids)


def free_memory() -> None:
    """Give back what nobody holds any more: a failed pass leaves holes between what is kept."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_parts(work: Callable[[Work], Found], whole: Work, halves: Callable[[Work], list[Work]]) -> list[Found]:
    """What `work` makes of `whole`: one result or, where it runs out of memory, those of its halves, each in parts too.

    For work without gradients. Raises the error of what cannot be halved.
    """
    try:
        return [work(whole)]
    except Exception as error:
        parts = halves(whole) if is_out_of_memory(error) else []
        if not parts:
            raise
        traceback.clear_frames(error.__traceback__)
    free_memory()
    found: list[Found] = []
    for part in parts:
        found += in_parts(work, part, halves)
    return found


def batch_halves(batch: Batch) -> list[Batch]:
    """Of `in_parts`: on several ranks every pass is of all together, and none can make two of one."""
    return [] if ranks.are_several() else batch.halves()


def in_halves(work: Callable[..., list[Found]], items: list[Item], *arguments: object) -> list[Found]:
    """What `work` makes of a list, one for each item, in halves of it where memory runs out."""
    found = in_parts(lambda part: work(part, *arguments), items, halves_of)
    return list(chain.from_iterable(found))


def halves_of(items: list[Item]) -> list[list[Item]]:
    """A list in two; none where it has one item."""
    middle = len(items) // 2
    return [items[:middle], items[middle:]] if middle else []
