"""Out of memory, said in one sentence: how much was asked for, and which switches are still to be turned."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from coeffdiff.config import Settings
from coeffdiff.errors import OutOfMemory

# What torch, its CUDA libraries, its CPU allocator, the system and readers of mapped files say.
# oneDNN's words on a CPU are the last two: it has no others for a buffer that it did not get
_SHORT = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|_STATUS_ALLOC_FAILED|Unable to allocate|"
    r"could not create a primitive$|could not create a memory",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ [KMGT]i?B|\d+ bytes)", re.IGNORECASE)


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: the GPU's, or the machine's."""
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, not loaded for it
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_SHORT.search(str(error)))


def too_little(error: BaseException, switches: Sequence[str]) -> str:
    """The sentence. switches: what may still be turned, the mildest first."""
    text = str(error)
    on_gpu = type(error).__name__ == "OutOfMemoryError" or re.search(r"CUDA|CUBLAS|CUDNN|MPS", text)
    asked = _ASKED.search(text)
    more = f" ({_readable(asked[1])} more were asked for)" if asked else ""
    where = "The GPU has" if on_gpu else "This machine has"
    if switches:
        return f"{where} too little memory for this{more}. In this order: {'; '.join(switches)}."
    return (
        f"{where} too little memory for this{more}. End other programs that hold memory, or take "
        f"{'a larger GPU' if on_gpu else 'a larger machine'} or a smaller model."
    )


@contextmanager
def explained(switches: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Turn a shortage of memory inside the block into OutOfMemory, with the switches that are then left."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_shortage(error):
            raise
        raise OutOfMemory(too_little(error, switches())) from None


def training_switches(settings: Settings, device_type: str, *, resumed: bool = False) -> list[str]:
    """What makes a training run smaller and is not already so; settings are resolved. The mildest first.

    A smaller micro-batch that is accumulated, recomputed activations and chunked attention cost time alone;
    precision costs a little, resolution and rank what the adapter can learn.
    """
    training, method = settings.training, settings.method
    batch_size, accumulate, resolution = (
        int(training.batch_size),
        int(training.accumulate),
        int(training.resolution),
    )
    found = []
    if not training.gradient_checkpointing:
        found.append("--set training.gradient_checkpointing=true")
    if batch_size > 1:
        found.append(
            f"--set training.batch_size=1 --set training.accumulate={batch_size * accumulate} (the same result)"
        )
    if "coeff" in method.kind and method.coeff.backend != "auto":
        found.append("--set method.coeff.backend=auto")
    if training.precision == "no":
        found.append(f"--set training.precision={_half(device_type)}")
    if (smaller := _smaller(resolution)) < resolution:
        found.append(f"--resolution {smaller}")
    if "lora" in method.kind and method.lora.rank > 4:
        found.append("--set method.lora.rank=4")
    if found and resumed:
        found[-1] += " (these begin a new run: a resumed one keeps its settings)"
    return found


def sampling_switches(
    *, batch_size: int, offload: str, precision: str, size: tuple[int, int], device_type: str
) -> list[str]:
    """What makes sampling smaller and is not already so. precision: fp32, fp16 or bf16; size: (width, height)."""
    found = []
    if batch_size > 1:
        found.append("--batch-size 1")
    if precision == "fp32":
        found.append(f"--precision {_half(device_type)}")
    if device_type != "cpu" and offload != "sequential":
        found.append("--offload model" if offload == "none" else "--offload sequential")
    smaller = tuple(_smaller(side) for side in size)
    if smaller != size:
        found.append(f"--width {smaller[0]} --height {smaller[1]}")
    return found


def _half(device_type: str) -> str:
    from coeffdiff.speed import half_precision  # loads torch

    return half_precision(device_type)


def _smaller(side: int) -> int:
    """Three quarters in whole steps of 64 pixels, and the same where that would be tiny."""
    smaller = side * 3 // 4 // 64 * 64
    return smaller if smaller >= 64 else side


def _readable(amount: str) -> str:
    if not amount.endswith(" bytes"):
        return amount
    size = float(amount.removesuffix(" bytes"))
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
