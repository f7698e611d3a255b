"""A toy screen for an agent: coloured buttons at varying places, to be pressed in the order of a goal.

    python recipes/buttons.py train_data/buttons                      training data, made by its own solver
    python -m util agent RUN --environment recipes/buttons.py --episodes 200
    ./recipes/agent.sh                                                both, and the training between them

It is an environment file for `python -m util agent` (docs/agent.md): TOOLS, reset, act and goal_reached below are all
that such a file needs. An episode's number decides where its buttons are and what its goal is.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

CELLS = 3  # the screen has 3 x 3 places
SIDE = 28  # pixels of a place: one visual token of Qwen2-VL
COLOURS = {"red": (221, 41, 41), "green": (34, 160, 62), "blue": (38, 82, 224), "yellow": (246, 200, 0)}
FIRST_FOR_TRAINING = 1_000_000  # numbers of episodes from here on are the solver's; those below are for tests

# The places as on a chess board, counted from the top left, row by row: C1 is the top right one.
NAMES = [f"{'ABC'[cell % CELLS]}{cell // CELLS + 1}" for cell in range(CELLS * CELLS)]
PLACE = {"type": "string", "enum": NAMES}
CLICK = {
    "name": "click",
    "description": "Click on a place of the screen.",
    "parameters": {"type": "object", "properties": {"place": PLACE}, "required": ["place"]},
}
TOOLS = [{"type": "function", "function": CLICK}]

places: dict[str, int] = {}  # colour: the cell in which its button is
wanted: list[str] = []  # the colours of the goal, in their order
pressed: list[str] = []  # those that are pressed already


def reset(episode: int) -> tuple[Image.Image, str]:
    """Begin an episode: its first picture, and its goal with the question that begins it."""
    global places, wanted
    dice = random.Random(episode)
    cells = draw_cells(dice, for_tests=episode < FIRST_FOR_TRAINING)
    places = dict(zip(COLOURS, cells, strict=True))
    wanted = dice.sample(list(COLOURS), dice.randint(2, len(COLOURS)))
    pressed.clear()
    return screen(), f"Press {', then '.join(wanted)}. {question()}"


def draw_cells(dice: random.Random, for_tests: bool) -> list[int]:
    """A place for each button. A fifth of all layouts is for tests alone: no screen of theirs is trained on."""
    while True:
        cells = dice.sample(range(CELLS * CELLS), len(COLOURS))
        of_tests = sum(weight * cell for weight, cell in enumerate(cells, 1)) % 5 == 0
        if of_tests == for_tests:
            return cells


def act(name: str, arguments: dict) -> list:
    """Click, and give the next picture and question. A button out of turn starts the goal over."""
    cell = NAMES.index(arguments["place"])
    for colour, own_cell in places.items():
        if cell == own_cell and colour not in pressed:
            if colour == wanted[len(pressed)]:
                pressed.append(colour)
            else:
                pressed.clear()
    return [screen(), question()]


def question() -> str:
    """What the screen asks for next."""
    return "All pressed." if goal_reached() else f"Where is {wanted[len(pressed)]}?"


def goal_reached() -> bool:
    """Whether all buttons of the goal were pressed in their order."""
    return pressed == wanted


def screen() -> Image.Image:
    """The buttons in their places, on a wallpaper whose shade differs from place to place; a pressed one is hollow."""
    image = Image.new("RGB", (CELLS * SIDE, CELLS * SIDE))
    draw = ImageDraw.Draw(image)
    for cell in range(CELLS * CELLS):
        draw.rectangle(corners(cell, 0), shade(cell))
    for colour, cell in places.items():
        draw.rectangle(
            corners(cell, 5), shade(cell) if colour in pressed else COLOURS[colour], COLOURS[colour], width=4
        )
    return image


def corners(cell: int, margin: int) -> tuple[int, int, int, int]:
    """The first and last pixel, across and down, of a place without its margin."""
    left, top = cell % CELLS * SIDE, cell // CELLS * SIDE
    return left + margin, top + margin, left + SIDE - 1 - margin, top + SIDE - 1 - margin


def shade(cell: int) -> tuple[int, int, int]:
    """The wallpaper: more red to the right, more green to the bottom."""
    return 90 + 80 * (cell % CELLS), 90 + 80 * (cell // CELLS), 170


# ---- the solver -----------------------------------------------------------------------------------------------------


def look(episode: int, media: Path) -> dict:
    """A sample without tools that asks where each button is, for a model that has to learn to see first."""
    reset(episode)
    dice = random.Random(-episode)
    shown = dice.sample(list(COLOURS), dice.randint(1, len(COLOURS)))  # few buttons are easier to begin with
    for colour in set(COLOURS) - set(shown):
        del places[colour]
    picture = screen()
    messages = []
    for colour in shown:
        asked: list[dict] = [{"type": "text", "text": f"Where is {colour}?"}]
        if not messages:
            asked.insert(0, {"type": "image", "image": save(picture, media)})
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": f"Press {colour} {NAMES[places[colour]]}"})
    return {"messages": messages}


def solve(episode: int, media: Path) -> dict:
    """One episode as a sample of a data file: what a user sees, and what an assistant does that knows the places."""
    picture, goal = reset(episode)
    first = [{"type": "image", "image": save(picture, media)}, {"type": "text", "text": goal}]
    messages: list[dict] = [{"role": "user", "content": first}]
    for colour in wanted:
        arguments = {"place": NAMES[places[colour]]}
        call = {"type": "function", "function": {"name": "click", "arguments": arguments}}
        messages.append({"role": "assistant", "content": f"Press {colour} {arguments['place']}", "tool_calls": [call]})
        picture, asked = act("click", arguments)
        seen = [{"type": "image", "image": save(picture, media)}, {"type": "text", "text": asked}]
        messages.append({"role": "tool", "content": seen})
    messages.append({"role": "assistant", "content": "Done."})
    return {"tools": TOOLS, "messages": messages}


def save(picture: Image.Image, media: Path) -> str:
    """Write a picture under a name made from its pixels, and return its path below the data file's folder."""
    name = hashlib.sha256(picture.tobytes()).hexdigest()[:16] + ".png"
    if not (media / name).exists():
        picture.save(media / name)
    return f"{media.name}/{name}"


def write(file: Path, make: Callable[[int, Path], dict], numbers: range) -> None:
    """A data file of the samples with these numbers."""
    with open(file, "w", encoding="utf-8") as lines:
        for number in numbers:
            lines.write(json.dumps(make(number, file.parent / "media")) + "\n")
    print(f"{file}: {len(numbers)} samples")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where looks.jsonl, episodes.jsonl and their media/ are written")
    parser.add_argument("--looks", type=int, default=15000, help="samples that ask where buttons are (default: 15000)")
    parser.add_argument("--episodes", type=int, default=1000, help="episodes of the solver (default: 1000)")
    given = parser.parse_args()
    (given.folder / "media").mkdir(parents=True, exist_ok=True)
    middle_number = FIRST_FOR_TRAINING + given.looks
    write(given.folder / "looks.jsonl", look, range(FIRST_FOR_TRAINING, middle_number))
    write(given.folder / "episodes.jsonl", solve, range(middle_number, middle_number + given.episodes))


if __name__ == "__main__":
    main()
