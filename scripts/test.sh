#!/usr/bin/env bash
# Makes or reuses .venv, then checks style, types and behaviour.
# Arguments go to pytest, and only the tests run: scripts/test.sh tests/hosts/test_learned_token.py, scripts/test.sh -k adapter
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="[dev]"
source scripts/install.sh
make_venv

if [ $# -gt 0 ]; then # one process: workers take longer to start than most files take
    exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# A process a core: the tests compute on one thread each (see tests/conftest.py).
.venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
