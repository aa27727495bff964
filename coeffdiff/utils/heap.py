"""Memory that is given back to the system as soon as it is free, on Linux with glibc; elsewhere nothing changes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, blocks from 64 KiB on are mapped one by one, and unmapped when they are freed.

    glibc would take them from its heap, where small blocks that stay keep the room of large ones that went: reading a
    network and quantizing it, the process would keep as much as the network was wide. Afterwards the thresholds are
    those to which glibc raises them itself while large blocks come and go.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)


def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
