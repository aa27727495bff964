#!/usr/bin/env bash
# Runs the tests of the page (coeffdiff ui) with gradio, and in headless Chromium from dropped photos to a downloaded
# picture, on the CPU. Gradio, Playwright and what they need beside the tests' own libraries come from PyPI (about 110 MB
# to download) and lie in .ui/, which git ignores; Chromium is Debian's. Where they cannot be had, it says so and skips.
# Arguments go to pytest: scripts/test_ui.sh scripts/ui --screenshots DIR trains longer and leaves screenshots in DIR.
#
# CHROMIUM   a Chromium or Chrome of one's own
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="[dev]"
source scripts/install.sh
make_venv

needs="gradio gradio-client brotli fastapi groovy hf-gradio httpcore httpx opentelemetry-api orjson pandas pydub
    python-multipart pytz safehttpx semantic-version starlette tomlkit uvicorn playwright greenlet pyee"
pillow="pillow==12.3.0" # as pip chooses it beside gradio, which does not take the 13 of constraints.txt yet
pins=$(grep -iE "^($(echo $needs | tr ' ' '|'))==" scripts/constraints.txt; echo "$pillow")
cache=$PWD/.ui

fetch() {
    rm -rf "$cache"
    .venv/bin/pip install --quiet --no-deps --target "$cache/packages" $pins
    echo "$pins" >"$cache/.fetched" # last: a fetch that was cut off begins again
}

find_chromium() {
    local name
    for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome; do
        if [ -n "$name" ] && command -v "$name"; then return; fi
    done
    return 1
}

install_chromium() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return 1; fi
    echo "Chromium is installed from Debian's packages: about 120 MB to download."
    (apt-get update && DEBIAN_FRONTEND=noninteractive timeout 400 apt-get install --yes --no-install-recommends chromium) \
        >/dev/null 2>&1
}

if ! find_chromium >/dev/null && ! install_chromium; then
    echo "Skipped: the tests of the page need Chromium (apt-get install chromium), and there is none."
    exit 0
fi
CHROMIUM=$(find_chromium)
if [ "$(cat "$cache/.fetched" 2>/dev/null)" != "$pins" ]; then
    echo "Gradio, Playwright and their needs are fetched from the package index into .ui/ ..."
    if ! (export -f fetch; export pins cache; timeout 300 bash -euo pipefail -c fetch); then
        echo "Skipped: the tests of the page need gradio and playwright, and the package index does not give them."
        exit 0
    fi
fi
export CHROMIUM PYTHONPATH=$cache/packages${PYTHONPATH:+:$PYTHONPATH}
if [ $# -eq 0 ]; then set -- tests/ui scripts/ui; fi
exec .venv/bin/python -m pytest -p no:cacheprovider "$@"
