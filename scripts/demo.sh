#!/usr/bin/env bash
# From nothing to pictures: makes .venv, paints a few photos of a toy, trains coeff+lora on them, samples.
# Needs Python 3.11 or newer and, the first time, the network for pip. Everything lands in demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
make_venv
python=.venv/bin/python
export OMP_NUM_THREADS=1 # so small a model is faster on one thread, and much faster where other programs run
run() { echo && echo "\$ $*" && "$@"; }

mkdir -p demo
number=1
while [ -e "demo/$number" ]; do number=$((number + 1)); done
here=demo/$number

[ -d demo/model ] || run $python scripts/make_random_sdxl.py --size tiny --output demo/model
run $python scripts/make_photos.py --subject grey_sloth_plushie --output "$here/photos"
run $python -m coeffdiff train --model demo/model --images "$here/photos" --token sks \
    --class-word "stuffed animal" --method coeff+lora --steps 60 --output "$here/run"
run $python -m coeffdiff sample --adapter "$here/run" -n 3 --output "$here/pictures" \
    --prompt "a photo of <V> stuffed animal" --prompt "a photo of <V> stuffed animal in the snow"

cat <<END

Done. The photos are in $here/photos, the adapter in $here/run/adapter, the pictures in $here/pictures.
The model of this demo is SDXL's architecture in a very small size with RANDOM weights, so its pictures are
noise by nature: what you have seen is that everything runs. With a GPU, the same two commands teach SDXL:
    coeffdiff train --images YOUR_PHOTOS/ --token sks --class-word "stuffed animal"
    coeffdiff sample --prompt "a photo of <V> stuffed animal in the snow"
END
