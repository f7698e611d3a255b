# Sourced by the shell scripts: sets $python to one that has the packages of the requirements file in $1.
# PYTHON=..., an active virtual or conda environment, and a .venv that uv has made are used as they are and never
# installed into; else .venv is made on first use. Written for the bash 3.2 and the tools of macOS, too.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
requirements="$root/$1"

stop() {
    printf '%s\n' "$@" >&2
    exit 1
}

case "$(uname -s)" in
    MINGW* | MSYS* | CYGWIN*) # Git Bash and its like
        echo "$0: does not run on Windows itself, but in its Linux: run \`wsl --install\`, then this there" >&2
        exit 2
        ;;
esac

# ---- which Python

has_all_packages() {
    [ -x "$(command -v "$1")" ] && [ -z "$(missing_packages "$1" 2>&1)" ]
}

# The packages of the requirements file that the Python $1 lacks; if it is too old itself, that.
missing_packages() {
    "$1" - "$requirements" <<'PYTHON_END'
import sys
if sys.version_info < (3, 11):
    print("Python 3.11 or newer (it is %d.%d)" % sys.version_info[:2])
    sys.exit()
import importlib.util, re
modules = {"qwen-vl-utils": "qwen_vl_utils", "pillow": "PIL", "pytest-cov": "pytest_cov", "pytest-xdist": "xdist"}
def names(path):
    for line in open(path, encoding="utf-8"):
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from names(path.rpartition("/")[0] + "/" + line[3:].strip())
        elif line:
            yield re.split(r"[<>=\[]", line)[0].strip()
print(*[n for n in names(sys.argv[1]) if importlib.util.find_spec(modules.get(n, n.replace("-", "_"))) is None])
PYTHON_END
}

is_made_by_uv() { # $1: the folder of a virtual environment
    grep -q '^uv = ' "$1/pyvenv.cfg" 2>/dev/null
}

# Many people have conda's base environment active in every shell: it is not a choice, so nothing is asked of it.
is_conda_base() {
    case "${CONDA_DEFAULT_ENV:-}" in base | root) return 0 ;; *) return 1 ;; esac
}

# The folder of the environment that is active, which may be none. With one of each kind, PATH says which came last.
active_environment() {
    local first
    first="$(command -v python || true)"
    if [ -n "${VIRTUAL_ENV:-}" ] && [ "$first" != "${CONDA_PREFIX:-}/bin/python" ]; then
        echo "$VIRTUAL_ENV"
    elif [ -n "${CONDA_PREFIX:-}" ] && ! is_conda_base; then
        echo "$CONDA_PREFIX"
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        echo "$VIRTUAL_ENV"
    fi
}

# The first Python on PATH that is new enough: where python3 is an old one, a newer often lies beside it.
new_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
}

stop_without_python() {
    local remedy="On Debian or Ubuntu: sudo apt install python3 python3-venv"
    [ "$(uname -s)" != Darwin ] || remedy="On macOS: brew install python@3.13"
    if command -v uv >/dev/null; then
        remedy="With uv: uv venv --python 3.13 && uv pip install -r $1"
    fi
    if command -v python3 >/dev/null; then
        stop "$(python3 --version) is too old: Python 3.11 or newer is needed (PYTHON=/path/to/python3.11 $0 uses another one)." "$remedy"
    fi
    stop "python3 is not installed. $remedy"
}

# Make .venv, unless that was done for these very requirements files.
make_environment() {
    local stamp base version
    stamp="$root/.venv/installed-$(cat "$root"/requirements*.txt | cksum | cut -d' ' -f1)-$1"
    [ ! -f "$stamp" ] || return 0
    base="$(new_python)"
    [ -n "$base" ] || stop_without_python "$1"
    version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "python3-venv is missing. On Debian or Ubuntu: sudo apt install python$version-venv"
    [ -z "${CONDA_PREFIX:-}" ] || echo "conda's base environment is left as it is (activate another one to use that)"
    echo "first use: making .venv and installing $1 (torch with its CUDA libraries is several GB; this takes minutes)"
    [ -x "$python" ] || "$base" -m venv "$root/.venv" || stop "making .venv failed (see above)"
    "$python" -m pip install --disable-pip-version-check --progress-bar on -r "$requirements" ||
        stop "installing $1 failed (see above); run the command again to go on from where it stopped." \
            "The newest versions that $1 allows were tried. Those that were tested last stand in constraints.txt:" \
            "$python -m pip install -r $1 -c constraints.txt"
    touch "$stamp"
}

environment="$(active_environment)"
or_else="or deactivate that environment: then the next start makes .venv"
if [ -n "${PYTHON:-}" ]; then
    python="$PYTHON"
    environment="$(dirname "$(dirname "$python")")"
    or_else="or unset PYTHON: then the next start makes .venv"
elif [ -n "$environment" ]; then
    python="$environment/bin/python"
elif is_made_by_uv "$root/.venv"; then
    environment="$root/.venv"
    python=".venv/bin/python" # the scripts run in the project's folder
    or_else="or remove .venv: then the next start makes another one"
elif [ ! -e "$root/.venv" ] && [ -n "${CONDA_PREFIX:-}" ] && has_all_packages "$CONDA_PREFIX/bin/python"; then
    echo "conda's base environment has all packages: it is used"
    python="$CONDA_PREFIX/bin/python"
else
    python=".venv/bin/python"
    make_environment "$1"
fi

# ---- an environment that is not ours is never installed into: name what it lacks

# The command that installs $* into the environment, as those type it who use what has made it.
install_line() {
    local own
    own="$(printf '%q' "$python")"
    if [ "${STARTED_IN:-$root}" != "$root" ]; then
        printf 'cd %q && ' "$root"
    fi
    if is_made_by_uv "$environment"; then
        echo "uv pip install --python $own $*"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        echo "$own -m pip install $*"
    elif [ -d "$environment/conda-meta" ]; then
        echo "conda install --prefix $(printf '%q' "$environment") 'python>=3.11' pip && $own -m pip install $*"
    else
        echo "$own -m ensurepip && $own -m pip install $*"
    fi
}

if [ ! -x "$(command -v "$python")" ]; then
    [ -z "${PYTHON:-}" ] || stop "PYTHON=$python: no such program"
    # `conda create --name NAME` alone makes one without Python
    [ ! -d "$environment/conda-meta" ] || stop "the conda environment $environment has no Python" "install it: $(install_line -r "$1")"
    stop "the environment $environment has no Python: make it again, $or_else"
fi
missing="$(missing_packages "$python")" || stop "$python cannot run; set PYTHON to a working Python 3.11 or newer"
case "$missing" in
    "") ;;
    "Python "*) stop "$python is too old: $missing is needed" "make the environment again with one, $or_else" ;;
    *) stop "$python lacks: $missing" "install them: $(install_line -r "$1")" "$or_else" ;;
esac
