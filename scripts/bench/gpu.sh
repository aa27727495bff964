#!/usr/bin/env bash
# Every figure that needs a GPU, in one go: bash scripts/bench/gpu.sh FOLDER [tests] [attention] [sdxl] [tiles]
#
# What each part prints, and its JSON, land in FOLDER. A part that fails, or takes longer than LIMIT seconds (default
# 3600), is named at the end, and the others are not kept from running.
#
# PYTHON   the interpreter to use (default: .venv/bin/python where it is, else python3); the three benchmarks need no
#          more than torch, diffusers, transformers, peft, accelerate and safetensors
#
# Exit code: 0, 1 if a part did not come to its end or there is no GPU, 2 for a part that does not exist.
set -uo pipefail

usage="usage: bash scripts/bench/gpu.sh FOLDER [tests] [attention] [sdxl] [tiles]"
mkdir -p "${1:?"$usage"}" && folder=$(cd "$1" && pwd) || exit 1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1

words_of() { # the command of a part, in the array `command`
    case $1 in
    tests) command=(-m pytest -q -m gpu -p no:cacheprovider tests) ;;
    attention) command=(scripts/bench/attention.py --dtype bf16 --pixels 512 1024 1536 --grow) ;;
    sdxl) command=(scripts/bench/steps.py --batch 1 4 --checkpointing off on --rounds 2) ;;
    tiles) command=(scripts/bench/tune_tiles.py) ;;
    *) return 1 ;;
    esac
    if [ "$1" != tests ]; then command+=(--json "$folder/$1.json"); fi
}

if [ $# -eq 0 ]; then set -- tests attention sdxl tiles; fi
for part in "$@"; do
    if ! words_of "$part"; then
        echo "There is no part called $part. $usage" >&2
        exit 2
    fi
done
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "There is no CUDA GPU here." >&2
    exit 1
fi

missed=()
for part in "$@"; do
    words_of "$part"
    echo "== $part: ${command[*]}"
    timeout "${LIMIT:-3600}" "$python" "${command[@]}" 2>&1 | tee "$folder/$part.txt" || missed+=("$part")
done
if [ ${#missed[@]} -gt 0 ]; then
    echo "Not come to its end: ${missed[*]} (see $folder)." >&2
    exit 1
fi
