#!/usr/bin/env bash
# Lint and test. The first use makes .venv.
#
#   ./run_tests.sh                     everything that takes seconds, and the demonstration (29 minutes on 2 busy cores)
#   ./run_tests.sh --slow              the long tests too
#   ./run_tests.sh -k positions -x     arguments of pytest (-n 0: in one process)
#   ./run_tests.sh --cov=util          with coverage
set -euo pipefail
cd "$(dirname "$0")"
source util/setup.sh requirements-dev.txt

export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1  # two processes at a time, and what they start: more threads would wait for each other
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
