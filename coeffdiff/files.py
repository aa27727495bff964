"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def appearing(final: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `final` to write a file or folder to; on success it takes final's place.

    Whatever goes wrong, `final` is as it was before and the temporary path is gone; a process that is killed
    leaves at most a hidden name beside it. durable: flush to the disk before the rename, so that a power cut
    cannot leave an empty file under the final name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        if durable:
            for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
                _flush(file)
        if temporary.is_dir() and final.exists():
            replaced = final.with_name(f"{temporary.name}.old")
            final.rename(replaced)
            try:
                temporary.rename(final)
            except BaseException:  # on Windows a program that has a file of it open is enough
                replaced.rename(final)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            temporary.replace(final)
    finally:
        with suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink()


def _flush(file: Path) -> None:
    if file.is_file():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
