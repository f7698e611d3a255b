"""What every benchmark's result says of how it came about, and where it goes."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def origin(
    script: str,
    arguments: list[str],
    private: Iterable[Path] = (),
    device: str | None = None,
    checkout: Path = ROOT,
) -> dict:
    """The command, the commit and the machine of a result.

    In the command, a file of the user's own (`private`), or anything with a whole path, is FILE.
    `device`: what the figures are of, where it is not this machine's CPU.
    `checkout`: whose commit it is, where it is not that of this script. GIT_COMMIT says it where there is no git.
    """
    private = {str(path) for path in private}
    shown = ["FILE" if argument in private or os.path.isabs(argument) else argument for argument in arguments]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *shown]),
        "commit": os.environ.get("GIT_COMMIT") or commit.stdout.strip() or None,
        "device": device or processor_name(),
    }


def processor_name() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def write_result(result: dict, out: Path | None) -> None:
    """The JSON line, last; and to a file if one is wanted."""
    line = json.dumps(result)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n", encoding="utf-8")
    print(line)
