"""A lock file that one process holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def try_lock(path: Path) -> Iterator[bool | None]:
    """Hold a folder, or a file that is never replaced, until the block ends or the process does, however it ends, by
    a lock that leaves nothing of its own.

    Yields True if this process has it now, False if another one does, None where there are no such locks (Windows,
    some network disks) or no such path.
    """
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine: bool | None = True
        except BlockingIOError:
            mine = False
        except OSError:
            mine = None
        yield mine
    finally:
        os.close(handle)
