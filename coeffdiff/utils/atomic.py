"""Atomic writes of files and folders."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?P<final>.+)\.[0-9a-f]{8}(?P<old>\.old)?")  # the names that atomic_write() gives


@contextmanager
def atomic_write(final: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `final` to write a file or folder to; on success it takes final's place.

    Whatever goes wrong, `final` is as it was before and the temporary path is gone; a process that is killed
    leaves at most a hidden name beside it, for sweep(). durable: flush to the disk before the rename, so that a
    power cut cannot leave an empty file under the final name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        if durable:
            for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
                _flush(file)
        if not (temporary.is_dir() and final.exists()):
            temporary.replace(final)
        elif not _exchange(temporary, final):
            replaced = final.with_name(f"{temporary.name}.old")
            final.rename(replaced)
            try:
                temporary.rename(final)
            except BaseException:  # on Windows, if a program has one of its files open
                replaced.rename(final)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        with suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink()


@contextmanager
def in_utf8(path: Path) -> Iterator[Path]:
    """A path to the same file or folder for safetensors, which takes UTF-8 alone: itself, or a link of another name."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="coeffdiff-") as folder:
            link = Path(folder, "link")
            link.symlink_to(path.absolute())
            yield link
        return
    yield path


def sweep(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove what killed writers left in a folder. A folder that was set aside and never replaced is restored.

    older_than: seconds; younger files may belong to a writer at work.
    """
    for path in folder.glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        with suppress(OSError):
            if match is None or time.time() - path.stat().st_mtime < older_than:
                continue
            if match["old"] and not (final := path.with_name(match["final"])).exists():
                path.rename(final)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def unfinished(final: Path) -> list[Path]:
    """What killed writers of one file or folder left beside it."""
    matches = {path: _TEMPORARY.fullmatch(path.name) for path in final.parent.glob(".*")}
    return [
        path for path, match in matches.items() if match and match["final"] == final.name and not match["old"]
    ]


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, so that at no moment a name is free; False where the system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "linux":
            here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            return ctypes.CDLL(None).renameat2(here, names[0], here, names[1], exchange) == 0
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(*names, 2) == 0  # RENAME_SWAP
    except (AttributeError, OSError):  # a C library that does not have it
        pass
    return False


def _flush(file: Path) -> None:
    if file.is_file():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
