#!/usr/bin/env bash
# From nothing to one labelled picture: makes .venv, then `coeffdiff demo`, which says where everything is.
# Needs Python 3.11 or newer and, the first time, the network for pip. Arguments go to the demo: --subject robot_mug
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
make_venv
.venv/bin/python -m coeffdiff demo "$@"
