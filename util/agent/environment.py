"""A user's environment: a plain Python file, imported by its path.

It gives:

    TOOLS                    the tools as a data file has them: a list of {"type": "function", "function": {...}}
    act(name, arguments)     does what a call asks for and returns what is to be seen then
    reset(episode)           optional: begins the episode with this number and returns (what is to be seen, the goal)
    goal_reached()           optional: whether the goal is reached; asked after each call, and True ends the episode

What is to be seen is a picture (a PIL image, a pathlib.Path, or a str that names an image file which is there), text
(any other str), or a list of these. An exception in `act` is shown to the model, which may try something else.

Of the file's own mistakes the user is told with file and line, without the traceback of this project.
"""

import importlib.util
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from util.command_line import UserError
from util.data.lines import DataError, shortened
from util.data.tools import read_tools

WHAT_IT_GIVES = "an environment file gives TOOLS and act(name, arguments); docs/agent.md shows one"
counter = itertools.count()  # several copies of a file are modules of different names


class Fault(Exception):
    """An exception in a user's file: `str` names file, line and function, `shown` is what the model is told."""

    def __init__(self, error: BaseException, file: Path, doing: str) -> None:
        self.shown = shortened(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        super().__init__(f"{place_of(error, file) or f'{file}, in {doing}'}: {self.shown}")


def place_of(error: BaseException, file: Path) -> str | None:
    """File, line and function of the last line of a user's file that an exception went through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == os.path.abspath(file)]
    if not frames:
        return None
    where = "" if frames[-1].name == "<module>" else f", in {frames[-1].name}"
    return f"{file}, line {frames[-1].lineno}{where}"


class Environment:
    """One copy of an environment file. Each has its own globals, so that several episodes may go on side by side."""

    def __init__(self, file: str | Path) -> None:
        """Raises UserError where the file cannot be imported or lacks something."""
        self.file = Path(file)
        if not self.file.is_file():
            raise UserError(f"--environment {file}: no such file; {WHAT_IT_GIVES}")
        self.module = self.imported()
        for name in ("act", "reset", "goal_reached"):
            function = getattr(self.module, name, None)
            if function is None and name != "act":
                continue
            if not callable(function):
                raise UserError(f"{self.file}: has no function {name}; {WHAT_IT_GIVES}")
        try:
            self.tools = read_tools(getattr(self.module, "TOOLS", None))
        except DataError as error:
            raise UserError(f"{self.file}, TOOLS{error}") from None
        if not self.tools:
            raise UserError(f"{self.file}: has no TOOLS; {WHAT_IT_GIVES}")
        self.schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}

    def imported(self) -> ModuleType:
        """The file as a module of its own. Files beside it can be imported, as by a script."""
        folder = str(self.file.resolve().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        name = f"environment_{next(counter)}"
        spec = importlib.util.spec_from_file_location(name, os.path.abspath(self.file))
        if spec is None or spec.loader is None:
            raise UserError(f"--environment {self.file}: is no Python file (.py)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look themselves up there
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(str(Fault(error, self.file, "importing"))) from None
        return module

    @property
    def can_reset(self) -> bool:
        return hasattr(self.module, "reset")

    @property
    def can_judge(self) -> bool:
        return hasattr(self.module, "goal_reached")

    def reset(self, episode: int) -> tuple[object, object]:
        """What is to be seen at the beginning, and the goal. Raises UserError."""
        try:
            begun = self.call(self.module.reset, episode)
        except Fault as fault:
            raise UserError(str(fault)) from None
        if not isinstance(begun, (tuple, list)) or len(begun) != 2:
            raise UserError(
                f"{self.file}: reset returned {type(begun).__name__}; return (what is to be seen, the goal)"
            )
        seen, goal = begun
        return seen, goal

    def act(self, name: str, arguments: dict) -> object:
        """What is to be seen after a call. Raises Fault where the user's function does."""
        return self.call(self.module.act, name, arguments)

    def goal_reached(self) -> bool | None:
        """Whether the goal is reached; None where the file does not say. Raises UserError."""
        if not self.can_judge:
            return None
        try:
            return bool(self.call(self.module.goal_reached))
        except Fault as fault:
            raise UserError(str(fault)) from None

    def call(self, function: Callable, *arguments: object) -> object:
        """What a function of the file returns. Raises Fault for whatever it raises, `sys.exit()` included."""
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            raise Fault(error, self.file, getattr(function, "__name__", "a function")) from None
