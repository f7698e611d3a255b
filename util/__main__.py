"""What a user types beside the scripts: `python -m util COMMAND ...`; `--help` lists the commands."""

import argparse
import difflib
import importlib
import sys

from util.command_line import run_command

# command -> (module, what it does). A module has `parser()`, its command line, and `main(arguments)`.
COMMANDS = {
    "show": ("util.results.show", "look at a sample, or at one step of a run, as the model sees it"),
    "check": ("util.cost.check_data", "look over all data before training, from file headers"),
    "convert": ("util.formats.convert", "convert data files of other formats to this one"),
    "chartqa": ("util.formats.chartqa", "prepare ChartQA, from the hub, a folder, or drawn on the spot"),
    "export": ("util.publish.export", "write a checkpoint as a model that plain transformers opens"),
    "merge": ("util.publish.merge_lora", "write an adapter and its base as one model"),
    "push": ("util.publish.hub", "send a run's model to the Hugging Face hub"),
    "track": ("util.publish.trackers", "send a run's metrics to TensorBoard, trackio or wandb"),
    "compare": ("util.results.compare", "compare several models' answers in one table"),
    "report": ("util.results.report", "make one page of answers, with their pictures and scores"),
    "agent": ("util.agent.agent", "let a model act in an environment of yours, by tool calls"),
}


def parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    made = argparse.ArgumentParser(
        prog="python -m util",
        usage="%(prog)s COMMAND ...",
        description="Everything around a training run.",
        epilog="\n".join(["commands:", *lines, "", "python -m util COMMAND --help says how each is used"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("command", metavar="COMMAND", help="one of those below")
    return made


def main(arguments: list[str]) -> None:
    command = parser().parse_args(arguments[:1]).command
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else "python -m util --help lists them all"
        parser().exit(2, f"python -m util: unknown command {command!r}; {advice}\n")
    module, _ = COMMANDS[command]
    run_command(importlib.import_module(module).main, arguments[1:], name=f"python -m util {command}")


if __name__ == "__main__":
    main(sys.argv[1:])
