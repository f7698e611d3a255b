# Sourced by the shell scripts: sets $python to one that has the packages of the requirements file in $1.
# An active virtual environment or PYTHON=... is used as it is; else .venv is made on first use.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
requirements="$root/$1"

stop() {
    printf '%s\n' "$@" >&2
    exit 1
}

if [ -n "${PYTHON:-}" ]; then
    python="$PYTHON"
elif [ -n "${VIRTUAL_ENV:-}" ]; then
    python="$VIRTUAL_ENV/bin/python"
else
    python=".venv/bin/python" # the scripts run in the project's folder
    stamp="$root/.venv/installed-$(cat "$root"/requirements*.txt | cksum | cut -d' ' -f1)-$1"
    if [ ! -f "$stamp" ]; then
        base="$(command -v python3 || true)"
        [ -n "$base" ] || stop "python3 is not installed. On Debian or Ubuntu: sudo apt install python3 python3-venv"
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            stop "$("$base" --version) is too old: Python 3.11 or newer is needed (PYTHON=/path/to/python3.11 $0 uses another one)."
        version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        "$base" -c 'import ensurepip, venv' 2>/dev/null ||
            stop "python3-venv is missing. On Debian or Ubuntu: sudo apt install python$version-venv"
        echo "first use: making .venv and installing $1 (torch with its CUDA libraries is several GB; this takes minutes)"
        [ -x "$python" ] || "$base" -m venv "$root/.venv" || stop "making .venv failed (see above)"
        "$python" -m pip install --disable-pip-version-check --progress-bar on -r "$requirements" ||
            stop "installing $1 failed (see above); run the command again to go on from where it stopped." \
                "The newest versions that $1 allows were tried. Those that were tested last stand in constraints.txt:" \
                "$python -m pip install -r $1 -c constraints.txt"
        touch "$stamp"
    fi
fi
[ -x "$(command -v "$python")" ] || stop "PYTHON=$python: no such program"

# An environment that is not ours is never installed into: name what it lacks.
missing="$("$python" - "$requirements" <<'PYTHON_END'
import importlib.util, re, sys
modules = {"qwen-vl-utils": "qwen_vl_utils", "pillow": "PIL", "pytest-cov": "pytest_cov", "pytest-xdist": "xdist"}
def names(path):
    for line in open(path):
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from names(path.rpartition("/")[0] + "/" + line[3:].strip())
        elif line:
            yield re.split(r"[<>=\[]", line)[0].strip()
print(*[n for n in names(sys.argv[1]) if importlib.util.find_spec(modules.get(n, n.replace("-", "_"))) is None])
PYTHON_END
)" || stop "$python cannot run; set PYTHON to a working Python 3.11 or newer"
[ -z "$missing" ] || stop "$python lacks: $missing" "install them: $python -m pip install -r $1"
