"""Let a model act: `python -m util agent RUN --environment my_env.py --goal "Open the mail."`

Each step shows the model a picture or text, reads the tool call in its answer, calls `act` of the environment file, and
shows what that returned, until the goal is reached, the model answers without a call, or --max_steps are done. A call
that cannot be done is answered with what is wrong with it. util/agent/environment.py says what such a file gives;
recipes/buttons.py is one, and docs/agent.md the page about it.

Written are episodes.jsonl, which can be trained on again, its pictures in media/, and episodes.html, which shows them.
"""

import argparse
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from util.command_line import UserError, command_parser
from util.config import Config
from util.results.answer import BUDGET_FLAGS, find_run, sizes_of_media
from util.results.metrics import share_with_interval
from util.run_folder import ROOT, read_settings, relative

if TYPE_CHECKING:
    from util.agent.environment import Environment
    from util.agent.episode import Episode
    from util.agent.log import Log
    from util.agent.play import Play
    from util.vision import Budget


def parser() -> argparse.ArgumentParser:
    made = command_parser("agent", __doc__)
    made.add_argument("run", nargs="?", help="run directory, one of its checkpoints, hub name or `tiny`; default: the "
                      "newest run")  # fmt: skip
    made.add_argument("--environment", required=True, type=Path, metavar="FILE", help="Python file with TOOLS and act")
    made.add_argument("--goal", help="what is to be done; default: what the environment's reset returns")
    made.add_argument("--image", type=Path, help="what is seen first, where the environment has no reset")
    made.add_argument("--system", help="system message, if the training data had one of its own")
    made.add_argument("--episodes", type=int, default=1, help="how many; default: 1")
    made.add_argument("--first", type=int, default=0, help="the number that reset gets first; default: 0")
    made.add_argument("--batch_size", type=int, default=32, help="episodes side by side, each with its own copy of the "
                      "environment's globals; default: 32")  # fmt: skip
    made.add_argument("--max_steps", type=int, default=20, help="most answers of an episode; default: 20")
    made.add_argument("--max_new_tokens", type=int, default=256, help="longest answer; default: 256")
    made.add_argument("--max_tokens", type=int, help="tokens of the prompts answered at a time (memory only; none is "
                      "cut); default: what the run was trained with")  # fmt: skip
    made.add_argument("--repeats", type=int, default=3, help="end an episode where the same answer to the same "
                      "observation was given so often; default: 3")  # fmt: skip
    made.add_argument("--at_least", type=float, help="exit 1 where the share of goals reached is below this one")
    made.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; default: the GPU where there is one")
    made.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="precision")
    made.add_argument("--output_dir", type=Path, metavar="DIR", help="where the episodes are written; default: "
                      "test_output/agent_<date-time>")  # fmt: skip
    for name in BUDGET_FLAGS:
        kind = float if name == "video_fps" else int
        made.add_argument(f"--{name}", type=kind, help="as in finetune.py; default: what the run was trained with")
    return made


def main(arguments: list[str]) -> None:
    given = parser().parse_args(arguments)
    check(given)
    from util.agent.environment import Environment

    environment = Environment(given.environment)
    check_environment(given, environment)
    number = min(given.batch_size, given.episodes)
    environments = [environment, *(Environment(given.environment) for _ in range(number - 1))]
    play, log = prepare(given, environments)
    try:
        play.run(range(given.first, given.first + given.episodes))
    finally:  # also where it is broken off: what was done is shown
        if any(episode.sample() for episode in play.ended):
            conclude(given, play.ended, log)
    require(given, play.ended)


def check(given: argparse.Namespace) -> None:
    """Raise UserError where flags are impossible, before anything is loaded."""
    names = ("episodes", "batch_size", "max_steps", "max_new_tokens", "repeats", "max_tokens")
    for name in names:
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name} {getattr(given, name)}: must be at least 1")
    if given.at_least is not None and not 0 <= given.at_least <= 1:
        raise UserError(f"--at_least {given.at_least}: must be from 0 to 1")
    if given.image and not given.image.is_file():
        raise UserError(f"--image {given.image}: no such file")


def check_environment(given: argparse.Namespace, environment: "Environment") -> None:
    """Raise UserError where flags do not fit what an environment can do."""
    file = environment.file
    if environment.can_reset and given.image:
        raise UserError(f"--image: {file} has a reset, which says what is seen first")
    if not environment.can_reset and given.episodes > 1:
        raise UserError(f"--episodes {given.episodes}: {file} has no reset(episode), which begins another one")
    if not environment.can_reset and not given.goal:
        raise UserError(f"{file} has no reset(episode), which gives a goal; name one by --goal")
    if not environment.can_judge and given.at_least is not None:
        raise UserError(f"--at_least: {file} has no goal_reached(), which says whether a goal is reached")


def prepare(given: argparse.Namespace, environments: list["Environment"]) -> tuple["Play", "Log"]:
    """The model, the folder, and what plays the episodes."""
    from util.adapters.lora import base_of
    from util.agent.episode import Limits
    from util.agent.log import Log
    from util.agent.play import Play
    from util.model import choose_device, choose_dtype, find_model, load_config, load_processor
    from util.results.evaluate import Answerer

    device = choose_device(given.device)
    path = find_model("tiny", device) if given.run == "tiny" else find_run(given.run)
    given.run = path  # for the page
    config = load_config(base_of(path))
    processor = load_processor(path)
    log = Log(given.output_dir or ROOT / "test_output" / f"agent_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    answerer = Answerer.load(path, processor, device, choose_dtype(given.dtype, device))
    limits = Limits(given.max_steps, given.repeats, given.max_new_tokens, config.text_config.max_position_embeddings)
    most_tokens = given.max_tokens or read_settings(path).get("max_tokens") or Config().max_tokens
    begin = partial(begin_episode, given, log, processor, budget_of(given, path))
    return Play(answerer.answers, environments, begin, limits, most_tokens, log), log


def budget_of(given: argparse.Namespace, run: str) -> "Budget":
    """The sizes of pictures: of the command line, else those that the run was trained with."""
    from util.vision import Budget

    flags = {name: getattr(given, name) for name in BUDGET_FLAGS if getattr(given, name) is not None}
    return Budget(**sizes_of_media(read_settings(run), flags))


def begin_episode(
    given: argparse.Namespace, log: "Log", processor, budget: "Budget", number: int, environment: "Environment"
) -> "Episode":
    from util.agent.episode import Episode

    episode = Episode(number, environment, log, processor, budget)
    episode.begin(given.goal, given.image, given.system)
    return episode


# ---- what came of it ------------------------------------------------------------------------------------------------


def conclude(given: argparse.Namespace, episodes: list["Episode"], log: "Log") -> None:
    """Print how the episodes went and where they are, and write their page."""
    from util.agent.page import write_page

    episodes.sort(key=lambda episode: episode.number)
    facts = summary(episodes)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:>{width}}  {value}")
    for line in dict.fromkeys(told_by(episodes)):
        print(f"{'act':>{width}}  {line}", file=sys.stderr)
    samples = [sample for episode in episodes if (sample := episode.sample())]
    where = [("environment", relative(given.environment)), ("model", relative(given.run))]
    page = write_page(log.folder / "episodes.html", [*where, *facts], samples, log)
    print(f"{'page':>{width}}  {relative(page)}")
    print(f"{'data':>{width}}  {relative(log.file)} ({len(samples)} of {len(episodes)} episodes have an answer)")


def summary(episodes: list["Episode"]) -> list[tuple[str, str]]:
    """Lines (name, value): how many reached their goal, how they ended, and what went wrong on the way."""
    from util.agent.episode import counts_of

    lines = [("episodes", str(len(episodes)))]
    judged = [episode.reached for episode in episodes if episode.reached is not None]
    if judged:
        share = share_with_interval([float(reached) for reached in judged])
        lines.append(("goals reached", f"{sum(judged)} of {len(judged)}: {share}"))
    lines.append(("steps", f"{sum(episode.steps for episode in episodes) / len(episodes):.1f} each"))
    ends: dict[str, int] = {}
    for episode in episodes:
        ends[episode.end] = ends.get(episode.end, 0) + 1
    lines += [(f"end: {end}", str(count)) for end, count in sorted(ends.items(), key=lambda pair: -pair[1])]
    lines += [(f"failed: {kind}", str(count)) for kind, count in counts_of(episodes)]
    return lines


def told_by(episodes: list["Episode"]) -> list[str]:
    lines: list[str] = []
    for episode in episodes:
        lines += episode.told
    return lines


def require(given: argparse.Namespace, episodes: list["Episode"]) -> None:
    """Exit 1 where fewer goals were reached than `--at_least` asks for."""
    if given.at_least is None:
        return
    reached = sum(bool(episode.reached) for episode in episodes) / len(episodes)
    verdict = "reached" if reached >= given.at_least else "MISSED"
    print(f"goals reached {reached:.1%}, asked for at least {given.at_least:.1%}: {verdict}")
    if reached < given.at_least:
        sys.exit(1)
