"""Episodes with a model: several side by side, so that their answers are generated in batches."""

from collections.abc import Callable
from itertools import islice

from tqdm import tqdm

from util.agent.environment import Environment
from util.agent.episode import FULL, INTERRUPTED, Episode, Limits
from util.agent.log import Log
from util.dataset import Sample
from util.results import evaluate

Answer = Callable[[list[Sample], int], list[str]]  # prompts and the longest answer -> answers: Answerer.answers


class Play:
    """Episodes by number, `batch.questions` of them side by side, each in an environment of its own."""

    def __init__(
        self,
        answer: Answer,
        environments: list[Environment],
        begin: Callable[[int, Environment], Episode],
        limits: Limits,
        most_tokens: int,
        log: Log,
    ) -> None:
        self.answer = answer
        self.environments = environments
        self.begin = begin
        self.limits = limits
        self.most_tokens = most_tokens
        self.log = log
        self.ended: list[Episode] = []
        self.active: list[Episode] = []

    def run(self, numbers: range) -> None:
        """All episodes with these numbers. What was done is logged also where an exception breaks it off."""
        waiting = iter(numbers)
        bar = tqdm(total=len(numbers), desc="episodes", unit=" episodes", dynamic_ncols=True, leave=False)
        try:
            with bar:
                free = list(self.environments)
                while self.begin_next(waiting, free) or self.active:
                    self.step()
                    if len(numbers) == 1:  # somebody watches
                        tqdm.write(self.active[0].last_step())
                    for episode in [episode for episode in self.active if episode.end]:
                        free.append(episode.environment)
                        self.leave(episode)
                        bar.update()
                    bar.set_postfix(reached=sum(bool(episode.reached) for episode in self.ended))
        finally:
            for episode in list(self.active):
                episode.end = episode.end or INTERRUPTED
                self.leave(episode)

    def begin_next(self, waiting, free: list[Environment]) -> int:
        """Begin an episode in each environment that is free, as long as there are any; how many were begun."""
        begun = [self.begin(number, free.pop()) for number in islice(waiting, len(free))]
        self.active += begun
        return len(begun)

    def step(self) -> None:
        """One step of every active episode."""
        prompts = {}
        for number, episode in enumerate(self.active):
            prompt = episode.prompt()
            if tokens_of(prompt) + self.limits.new_tokens > self.limits.positions:
                episode.finish(FULL)
            else:
                prompts[number] = prompt
        order = list(prompts)
        sizes = [tokens_of(prompts[number]) + self.limits.new_tokens for number in order]
        limits = evaluate.Limits(len(self.environments), self.most_tokens, self.limits.new_tokens)
        for batch in evaluate.batches_of(sizes, limits):
            numbers = [order[place] for place in batch]
            answers = self.answer([prompts[number] for number in numbers], self.limits.new_tokens)
            for number, answer in zip(numbers, answers, strict=True):
                self.active[number].take(answer, self.limits)

    def leave(self, episode: Episode) -> None:
        """Log an episode that has ended."""
        self.active.remove(episode)
        self.ended.append(episode)
        if sample := episode.sample():
            self.log.write(sample)


def tokens_of(prompt: Sample) -> int:
    """Tokens of a prompt with its pictures; a placeholder is one token already."""
    return len(prompt.encoded.input_ids) + sum(medium.grid.tokens - 1 for medium in prompt.media)
