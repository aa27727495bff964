# Makes .venv with coeffdiff and its pinned dependencies; demo.sh and test.sh source it. Says what it downloads.
#
# PYTHON   the interpreter to use (default: the first of python3.11, python3.12, python3.13, python3)
# EXTRAS   what to install beside the package itself, such as [dev]

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "coeffdiff needs Python 3.11 or newer; none was found (set PYTHON to its path)." >&2
    return 1
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

cpu_index=https://download.pytorch.org/whl/cpu

# PyTorch's default wheel for Linux brings gigabytes of CUDA. Without a GPU its CPU build is taken: from PyTorch's
# own index where that answers within five seconds, else from whatever pip is set up with.
install_torch() {
    local torch
    torch=$(grep '^torch==' scripts/constraints.txt)
    if has_nvidia_gpu; then
        echo "PyTorch with CUDA is installed: about 3 GB to download."
        .venv/bin/pip install --quiet "$torch"
    elif [ "$(uname -s)" = Linux ] &&
        .venv/bin/python -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
        echo "PyTorch for the CPU is installed: about 200 MB to download."
        .venv/bin/pip install --quiet --index-url "$cpu_index" "$torch"
    else
        echo "PyTorch is installed as pip finds it (its CPU index does not answer): 200 MB to 3 GB to download."
        .venv/bin/pip install --quiet "$torch"
    fi
}

make_venv() {
    local pins stamp
    pins=$(cat pyproject.toml scripts/constraints.txt | cksum)
    # What the tests need includes what the demo needs, so either of the two stamps will do for the demo.
    for stamp in "${EXTRAS:-}" "[dev]"; do
        if [ "$(cat ".venv/.installed$stamp" 2>/dev/null)" = "$pins" ]; then return; fi
    done
    if [ ! -x .venv/bin/pip ]; then # a venv without pip is what Debian leaves where python3-venv is missing
        echo "Making .venv ..."
        "$(find_python)" -m venv --clear .venv
    fi
    .venv/bin/python -c 'import torch' 2>/dev/null || install_torch
    echo "The other libraries (diffusers, transformers, accelerate, peft, ...) are installed: about 150 MB to download."
    .venv/bin/pip install --quiet --constraint scripts/constraints.txt --editable ".${EXTRAS:-}"
    echo "$pins" >".venv/.installed${EXTRAS:-}"
}
