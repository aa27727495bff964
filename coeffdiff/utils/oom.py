"""Out of memory, reported in one sentence: how much was asked for, and which options reduce memory use."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from coeffdiff.errors import OutOfMemory
from coeffdiff.utils.sizes import in_mib_or_gib

# What torch, its CUDA libraries, its CPU allocator, the system and readers of mapped files say.
# oneDNN's words on a CPU are the last two: it has no others for a buffer that it did not get
_SHORT = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|_STATUS_ALLOC_FAILED|Unable to allocate|"
    r"could not create a primitive$|could not create a memory",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ [KMGT]i?B|\d+ bytes)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: the GPU's, or the machine's."""
    # By its name: torch is not loaded for this
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_SHORT.search(str(error)))


def oom_sentence(error: BaseException, switches: Sequence[str]) -> str:
    """One sentence on how much was asked for and what to do. switches: options not used yet, the mildest first."""
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
def oom_hints(switches: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into OutOfMemory, with the options that are not used yet."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(oom_sentence(error, switches())) from None


def halved_batch(batch_size: int) -> list[str]:
    """The option that halves a batch, unless it is of one already."""
    return [f"--batch-size {batch_size // 2}"] if batch_size > 1 else []


def smaller_side(side: int) -> int:
    """Three quarters of a side in whole steps of 64 pixels; the side itself where that would be below 64."""
    smaller = side * 3 // 4 // 64 * 64
    return smaller if smaller >= 64 else side


def _readable(amount: str) -> str:
    if not amount.endswith(" bytes"):
        return amount
    return in_mib_or_gib(float(amount.removesuffix(" bytes")), 1)
