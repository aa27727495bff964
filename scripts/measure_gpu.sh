#!/usr/bin/env bash
# Every figure that needs a GPU, in one go: bash scripts/measure_gpu.sh FOLDER [tests] [attention] [sdxl] [tiles]
#
# Text and JSON of each part land in FOLDER. A part that fails, or takes longer than LIMIT seconds (default 600), is
# named at the end, and the others are not kept from running; the exit code is how many did not come to their end.
#
# PYTHON   the interpreter to use (default: .venv/bin/python where it is, else python3); the three benchmarks need no
#          more than torch, diffusers, transformers, peft, accelerate and safetensors
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:?"usage: bash scripts/measure_gpu.sh FOLDER [tests] [attention] [sdxl] [tiles]"}
shift
parts=${*:-tests attention sdxl tiles}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "There is no CUDA GPU here." >&2
    exit 1
fi
mkdir -p "$folder" || exit 1

missed=()
for part in $parts; do
    case $part in
    tests) command=(-m pytest -q -m gpu -p no:cacheprovider tests) ;;
    attention) command=(scripts/bench_attention.py --dtype bf16 --pixels 512 1024 1536 --grow) ;;
    sdxl) command=(scripts/bench_sdxl.py --batch 1 4 --checkpointing off on --rounds 2) ;;
    tiles) command=(scripts/tune_tiles.py) ;;
    *)
        echo "There is no part called $part: tests, attention, sdxl, tiles." >&2
        exit 2
        ;;
    esac
    [ "$part" = tests ] || command+=(--json "$folder/$part.json")
    echo "== $part: ${command[*]}"
    timeout "${LIMIT:-600}" "$python" "${command[@]}" 2>&1 | tee "$folder/$part.txt" || missed+=("$part")
done
if [ ${#missed[@]} -gt 0 ]; then echo "Not come to its end: ${missed[*]} (see $folder)." >&2; fi
exit ${#missed[@]}
