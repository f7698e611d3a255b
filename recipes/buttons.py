"""A toy screen for an agent: grey buttons, of which one at a time lights up in a colour and wants to be pressed.

    python recipes/buttons.py train_data/buttons                      training data, made by its own solver
    python -m util agent RUN --environment recipes/buttons.py --episodes 200
    ./recipes/agent.sh                                                both, and the training between them

It is an environment file for `python -m util agent` (docs/agent.md): TOOLS, reset, act and goal_reached below are all
that such a file needs. An episode's number decides where its buttons are and which of them light up. Nothing but the
picture says which one is next.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

CELLS = 3  # the screen has 3 x 3 places
SIDE = 28  # pixels of a place: one visual token of Qwen2-VL
COLOURS = {"red": (221, 41, 41), "green": (34, 160, 62), "blue": (38, 82, 224), "yellow": (246, 200, 0)}
WALL, DARK = (235, 235, 235), (150, 150, 150)
FIRST_FOR_TRAINING = 1_000_000  # numbers of episodes from here on are the solver's; those below are for tests

CLICK = {
    "name": "click",
    "description": "Press the button of this colour.",
    "parameters": {
        "type": "object",
        "properties": {"button": {"type": "string", "enum": list(COLOURS)}},
        "required": ["button"],
    },
}
TOOLS = [{"type": "function", "function": CLICK}]

places: dict[str, int] = {}  # colour: the cell in which its button is
lights: list[str] = []  # the colours that light up, one after another
pressed = 0  # how many of them were pressed


def reset(episode: int) -> tuple[Image.Image, str]:
    """Begin an episode: its first picture, and its goal."""
    global places, lights, pressed
    dice = random.Random(episode)
    cells = draw_cells(dice, for_tests=episode < FIRST_FOR_TRAINING)
    places = dict(zip(COLOURS, cells, strict=True))
    lights = dice.sample(list(COLOURS), dice.randint(2, len(COLOURS)))
    pressed = 0
    return screen(), f"Put out {len(lights)} lights."


def draw_cells(dice: random.Random, for_tests: bool) -> list[int]:
    """A place for each button. A fifth of all sets of places is for tests alone: no screen of theirs is trained on."""
    while True:
        cells = dice.sample(range(CELLS * CELLS), len(COLOURS))
        if (sum(cells) % 5 == 0) == for_tests:
            return cells


def act(name: str, arguments: dict) -> Image.Image:
    """Press a button, and give the next picture. A button that is not lit does nothing."""
    global pressed
    if not goal_reached() and arguments["button"] == lights[pressed]:
        pressed += 1
    return screen()


def goal_reached() -> bool:
    """Whether all lights were put out."""
    return pressed == len(lights)


def screen() -> Image.Image:
    """The buttons in their places, the one to press in its colour and the others grey."""
    image = Image.new("RGB", (CELLS * SIDE, CELLS * SIDE), WALL)
    draw = ImageDraw.Draw(image)
    for colour, cell in places.items():
        is_lit = not goal_reached() and colour == lights[pressed]
        draw.rectangle(corners(cell, 3), COLOURS[colour] if is_lit else DARK)
    return image


def corners(cell: int, margin: int) -> tuple[int, int, int, int]:
    """The first and last pixel, across and down, of a place without its margin."""
    left, top = cell % CELLS * SIDE, cell // CELLS * SIDE
    return left + margin, top + margin, left + SIDE - 1 - margin, top + SIDE - 1 - margin


# ---- the solver -----------------------------------------------------------------------------------------------------


def solve(episode: int, media: Path) -> dict:
    """One episode as a sample of a data file: what a user sees, and what an assistant does that knows the lights."""
    picture, goal = reset(episode)
    first = [{"type": "image", "image": save(picture, media)}, {"type": "text", "text": goal}]
    messages: list[dict] = [{"role": "user", "content": first}]
    for colour in lights:
        call = {"type": "function", "function": {"name": "click", "arguments": {"button": colour}}}
        messages.append({"role": "assistant", "content": f"The {colour} one is lit.", "tool_calls": [call]})
        picture = act("click", {"button": colour})
        messages.append({"role": "tool", "content": [{"type": "image", "image": save(picture, media)}]})
    messages.append({"role": "assistant", "content": "All are out."})
    return {"tools": TOOLS, "messages": messages}


def save(picture: Image.Image, media: Path) -> str:
    """Write a picture under a name made from its pixels, and return its path below the data file's folder."""
    name = hashlib.sha256(picture.tobytes()).hexdigest()[:16] + ".png"
    if not (media / name).exists():
        picture.save(media / name)
    return f"{media.name}/{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where episodes.jsonl and its media/ are written")
    parser.add_argument("--episodes", type=int, default=3000, help="episodes of the solver (default: 3000)")
    given = parser.parse_args()
    (given.folder / "media").mkdir(parents=True, exist_ok=True)
    file = given.folder / "episodes.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for number in range(FIRST_FOR_TRAINING, FIRST_FOR_TRAINING + given.episodes):
            lines.write(json.dumps(solve(number, given.folder / "media")) + "\n")
    print(f"{file}: {given.episodes} episodes")


if __name__ == "__main__":
    main()
