"""A mark in a folder, by which a process on another machine knows that it sees the same folder."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Marker:
    folder: Path
    name: str

    def seen(self) -> bool:
        return (self.folder / self.name).is_file()


@contextmanager
def marked(folder: Path) -> Iterator[Marker]:
    """The folder's absolute path with a mark, until the block ends."""
    marker = Marker(folder.resolve(), f".seen-{uuid.uuid4().hex}")
    file = marker.folder / marker.name
    file.touch()
    try:
        yield marker
    finally:
        file.unlink(missing_ok=True)
