"""Locks on files and folders, held by one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def try_lock(path: Path) -> Iterator[bool | None]:
    """Lock a folder, or a file that is never replaced, until the block or the process ends; no lock file is left.

    Yields True if this process has the lock, False if another one has it, None where there are no such locks
    (Windows, some network disks) or no such path.
    """
    with _flock(path, waiting=False) as mine:
        yield mine


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """The same, after whoever else has it; without a lock where there are none."""
    with _flock(path, waiting=True):
        yield


@contextmanager
def _flock(path: Path, *, waiting: bool) -> Iterator[bool | None]:
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
            mine: bool | None = True
        except BlockingIOError:
            mine = False
        except OSError:
            mine = None
        yield mine
    finally:
        os.close(handle)
