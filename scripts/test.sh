#!/usr/bin/env bash
# Makes or reuses .venv, then checks style, types and behaviour. Arguments go to pytest: scripts/test.sh -k adapter
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="[dev]"
source scripts/install.sh
make_venv

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# A process a core: the tests compute on one thread each (see tests/conftest.py).
.venv/bin/python -m pytest --numprocesses auto "$@"
