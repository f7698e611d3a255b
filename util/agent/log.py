"""What an agent leaves: a folder with episodes.jsonl, a data file, and the pictures that it names in media/."""

import hashlib
import io
import json
from pathlib import Path

from PIL import Image

from util import vision
from util.command_line import UserError
from util.data.keys import MEDIA_FILE

KEPT_AS_THEY_ARE = ("1", "L", "LA", "P", "RGB", "RGBA")  # modes that PNG has and the model's reader knows
WHAT_IS_SEEN = "a PIL image, the path of an image, text, or a list of these"


class NotSeen(Exception):
    """An environment returned something that cannot be shown to a model."""


class Log:
    """Episodes in a folder, each written when it ends, so that nothing is lost where the process is killed."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the folder holds episodes already: they may be somebody's training data."""
        self.folder = folder
        self.file = folder / "episodes.jsonl"
        if self.file.exists():
            raise UserError(f"--output_dir {folder}: holds {self.file.name} already; name another folder, or remove it")

    def write(self, entry: dict) -> None:
        """Append one sample."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def items_of(self, seen: object) -> list[dict]:
        """What an environment gave to be seen, as content items of a message; pictures are kept under media/.

        Raises NotSeen where it is none of `WHAT_IS_SEEN`, ValueError or OSError for a picture that cannot be read.
        """
        items = []
        for part in seen if isinstance(seen, (list, tuple)) else [seen]:
            if isinstance(part, Image.Image):
                items.append({"type": "image", "image": self.keep_image(part)})
            elif isinstance(part, Path) or (isinstance(part, str) and MEDIA_FILE.match(part) and Path(part).is_file()):
                items.append({"type": "image", "image": self.keep_file(Path(part))})
            elif isinstance(part, str):
                items.append({"type": "text", "text": part})
            else:
                raise NotSeen(f"{type(part).__name__}; return {WHAT_IS_SEEN}")
        return items

    def keep_image(self, image: Image.Image) -> str:
        """The path, below the folder, of a PNG of this picture."""
        if image.mode not in KEPT_AS_THEY_ARE:
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self.keep(buffer.getvalue(), ".png")

    def keep_file(self, path: Path) -> str:
        """The path, below the folder, of a copy of this picture: an environment may write the next one over it."""
        vision.to_tensor(vision.open_image(str(path)), str(path))  # raises where it cannot be read to its end
        return self.keep(path.read_bytes(), path.suffix.lower())

    def keep(self, content: bytes, suffix: str) -> str:
        """Write a file under a name made from its content: a picture that is seen again is kept once."""
        name = f"media/{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return name
