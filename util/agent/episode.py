"""One episode: what is seen, what the model answers, what its calls do, until it ends.

Its messages are those of a data file (util/data/tools.py), and the prompt of each step is made from them as training
makes it: what the model reads in the loop is what it would read if the log were its training data.
"""

import json
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from util import conversation, vision
from util.agent import schema
from util.agent.environment import Environment, Fault
from util.agent.log import Log, NotSeen
from util.command_line import UserError
from util.data import entries
from util.data.lines import DataError
from util.data.media import MediaReader
from util.data.tools import MalformedCall, calls_of
from util.dataset import Example, Sample

# How an episode ends
REACHED, ANSWERED, NO_ANSWER = "goal reached", "answered", "empty answer"
LIMIT, LOOP, FULL, INTERRUPTED = "step limit", "loop", "context full", "interrupted"
# What can be wrong with a step; the model is told and may try again
MALFORMED, SEVERAL, UNKNOWN, WRONG, FAILED = (
    "malformed call", "several calls", "unknown tool", "wrong arguments", "act failed",
)  # fmt: skip
CONTROL_TOKENS = "control tokens in the answer"
A_CALL = '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'


@dataclass
class Limits:
    """When an episode is ended."""

    steps: int
    repeats: int  # the same answer to the same observation, so often, is a loop
    new_tokens: int  # of an answer
    positions: int  # of prompt and answer together, which the model can read


class Refused(Exception):
    """A call that is not done: its kind, and what the model is told."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


class Episode:
    """An episode while it goes on and when it has ended (`end` says how)."""

    def __init__(self, number: int, environment: Environment, log: Log, processor, budget: vision.Budget) -> None:
        self.number = number
        self.environment = environment
        self.log = log
        self.processor = processor
        self.budget = budget
        self.forbidden = conversation.control_tokens(processor)
        self.messages: list[dict] = []
        self.media: list[vision.Medium] = []  # of all messages
        self.failed: list[int] = []  # numbers of the messages whose call was not done
        self.failures: Counter[str] = Counter()
        self.told: list[str] = []  # for the user: what failed, with file and line
        self.seen: Counter[tuple[str, str]] = Counter()  # (observation, answer to it)
        self.steps = 0
        self.reached: bool | None = False if environment.can_judge else None
        self.end = ""

    # ---- what the model reads -----------------------------------------------------------------------------------

    def begin(self, goal: str | None, image: Path | None, system: str | None) -> None:
        """The first message: the picture, then the goal. Raises UserError.

        `goal`: None: the environment's. `image`: what is seen first where the environment has no `reset`.
        """
        first: object = image or []
        if self.environment.can_reset:
            first, own_goal = self.environment.reset(self.number)
            goal = goal or (own_goal if isinstance(own_goal, str) else None)
        if not goal or not goal.strip():
            raise UserError(f"{self.environment.file}: reset gives no goal; return one, or name it by --goal")
        if system:
            self.messages.append({"role": "system", "content": system})
        try:
            items = self.log.items_of([] if first is None else first)
            self.add({"role": "user", "content": [*items, {"type": "text", "text": goal}]})
        except (DataError, ValueError, OSError, NotSeen) as error:
            raise UserError(f"{self.environment.file}: what is seen first, or the goal: {error}") from None

    def add(self, message: dict) -> None:
        """Append what the model is to read next, its pictures as the model sees them. Raises as reading them does."""
        self.messages.append(message)
        try:
            asked = Example(self.checked(), "")
            new = asked.media[len(self.media) :]
            self.media += MediaReader().each(vision.load, new, self.budget)
        except Exception:
            self.messages.pop()
            raise

    def checked(self) -> list[dict]:
        """The messages so far as training reads them. Raises DataError."""
        # The check asks for an answer, too; "?" stands in its place and is not shown to the model.
        waiting = {"tools": self.environment.tools, "messages": [*self.messages, {"role": "assistant", "content": "?"}]}
        default = conversation.default_system(self.processor)
        return entries.check_messages(waiting, self.forbidden, self.log.folder, default_system=default)[:-1]

    def prompt(self) -> Sample:
        """What the model reads before its next answer."""
        pieces = conversation.render_prompt(self.checked(), self.processor)
        encoded = conversation.encode(pieces, self.processor, [medium.grid for medium in self.media])
        return Sample(encoded, list(self.media), f"episode {self.number}")

    # ---- what it answers ----------------------------------------------------------------------------------------

    def take(self, answer: str, limits: Limits) -> None:
        """Take the model's answer: do what it calls for, and see what comes of it."""
        said = self.without_control_tokens(answer)
        observed = (json.dumps(self.messages[-1]["content"]), said)
        self.steps += 1
        self.seen[observed] += 1
        try:
            text, calls = calls_of(said)
            if not calls:
                self.finish(ANSWERED if said.strip() else NO_ANSWER)
                if said.strip():
                    self.messages.append({"role": "assistant", "content": said})
                return
            call = self.allowed(calls)
        except MalformedCall as problem:
            self.refuse(said, Refused(MALFORMED, f"{problem}; write {A_CALL}"))
        except Refused as refused:
            self.refuse(said, refused)
        else:
            called = {"type": "function", "function": call}
            self.messages.append({"role": "assistant", "content": text, "tool_calls": [called]})
            self.do(call)
        self.reached = self.environment.goal_reached()
        if self.reached:
            self.finish(REACHED)
        elif self.seen[observed] >= limits.repeats:
            self.finish(LOOP)
        elif self.steps >= limits.steps:
            self.finish(LIMIT)

    def without_control_tokens(self, answer: str) -> str:
        """An answer that a data file may hold: an untrained model may write tokens that would begin a turn."""
        said = answer
        while found := [token for token in self.forbidden if token in said]:
            for token in found:
                said = said.replace(token, "")
        self.failures[CONTROL_TOKENS] += said != answer
        return said

    def allowed(self, calls: list[dict]) -> dict:
        """The one call of an answer, if it can be done. Raises Refused."""
        if len(calls) > 1:
            raise Refused(SEVERAL, f"{len(calls)} calls in one answer; make one, and see what comes of it")
        (call,) = calls
        schemas = self.environment.schemas
        if call["name"] not in schemas:
            raise Refused(UNKNOWN, f"there is no tool {call['name']!r:.60}; there are {', '.join(schemas)}")
        if problems := list(schema.problems_of(call["arguments"], schemas[call["name"]], "arguments")):
            raise Refused(WRONG, "; ".join(problems))
        return call

    def refuse(self, said: str, refused: Refused) -> None:
        """Tell the model what is wrong with its call. The log keeps what it wrote, as text."""
        self.messages.append({"role": "assistant", "content": said})
        self.fail(refused.kind, str(refused))

    def do(self, call: dict) -> None:
        """Do a call, and show the model what comes of it. Raises UserError where `act` returns nothing to be seen."""
        environment = self.environment
        try:
            seen = environment.act(call["name"], deepcopy(call["arguments"]))  # it may change them; the log must not
            items = self.log.items_of(seen)
            self.add({"role": "tool", "content": items})
        except Fault as fault:
            self.told.append(str(fault))
            self.fail(FAILED, fault.shown)
        except NotSeen as error:
            raise UserError(f"{environment.file}: act returned {error}") from None
        except (DataError, ValueError, OSError) as error:
            self.told.append(f"{environment.file}: what act returned cannot be shown: {error}")
            self.fail(FAILED, "what it gave cannot be shown")

    def fail(self, kind: str, problem: str) -> None:
        """Count a failure and show it to the model in place of an observation."""
        self.failures[kind] += 1
        self.failed.append(len(self.messages) - 1)
        for text in (f"Error: {problem}", f"Error: {kind}"):  # the first may quote what no data file may hold
            try:
                self.add({"role": "tool", "content": text})
                return
            except DataError:
                continue

    def finish(self, end: str) -> None:
        self.end = end
        if end in (ANSWERED, NO_ANSWER):
            self.reached = self.environment.goal_reached()

    def last_step(self) -> str:
        """The last answer and what came of it, for somebody who watches."""
        if self.end == FULL:
            return "the context is full"
        words = []
        for message in self.messages[-2:]:
            content = message["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = [item.get("text", "(a picture)").strip() for item in items]
            parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
            words.append(" ".join(filter(None, parts)))
        if self.end in (ANSWERED, NO_ANSWER):
            return f"step {self.steps}: {words[-1] if self.end == ANSWERED else '(no answer)'}"
        return f"step {self.steps}: {words[0]}\n        {words[1]}"

    # ---- what is left of it -------------------------------------------------------------------------------------

    def sample(self) -> dict | None:
        """The episode as a sample of a data file, up to its last answer; None where there is none to learn from.

        What was seen after that answer, and how it went, stands under `episode`, which training does not read.
        """
        answers = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not answers:
            return None
        last = answers[-1] + 1
        facts = {
            "number": self.number,
            "end": self.end,
            "goal_reached": self.reached,
            "steps": self.steps,
            "failures": {kind: count for kind, count in self.failures.items() if count},
            "failed_messages": self.failed,
            "seen_last": [message["content"] for message in self.messages[last:]],
        }
        return {"tools": self.environment.tools, "messages": self.to_learn(last), "episode": facts}

    def to_learn(self, end: int) -> list[dict]:
        """The messages before `end`, those whose call was not done marked as not to be learned.

        Where none was done, none is marked: a sample of which nothing is learned is refused by training.
        """
        failed = set(self.failed)
        answers = {number for number in range(end) if self.messages[number]["role"] == "assistant"}
        if answers <= failed:
            return self.messages[:end]
        return [
            {**message, "train": False} if number in failed else message
            for number, message in enumerate(self.messages[:end])
        ]


def counts_of(episodes: list[Episode]) -> Iterator[tuple[str, int]]:
    """How often each thing went wrong over all episodes, most frequent first."""
    total: Counter[str] = Counter()
    for episode in episodes:
        total.update(episode.failures)
    yield from ((kind, count) for kind, count in total.most_common() if count)
