"""The folder that a command writes to: is it a folder, free and writable? Checked before anything slow begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coeffdiff.errors import CoeffDiffError, ConfigError

_FILE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".pdf", ".svg", ".html"),
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin"),
    *(".json", ".jsonl", ".yaml", ".yml", ".csv", ".txt"),
)
_UNCHANGED = "Nothing was changed."


def check_output(path: Path | None) -> None:
    """Raises: ConfigError for a file, a path below a file, and a new name that ends as a file's does."""
    if path is None:
        return
    try:
        if path.is_dir():
            return
        file = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    except (OSError, ValueError):  # too long a name: reported where the folder is made
        return
    if file == path:
        raise ConfigError(f"--output {path} is a file, and a folder is wanted; name another. {_UNCHANGED}")
    if file:
        raise ConfigError(
            f"--output {path} cannot be a folder, since {file} is a file; name another. {_UNCHANGED}"
        )
    if path.suffix.lower() in _FILE_ENDINGS:
        raise ConfigError(
            f"--output names a folder, and {path} would be one that is called like a {path.suffix} file; name for "
            f"instance {path.with_suffix('')}. {_UNCHANGED}"
        )


def is_free(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def refuse_occupied(path: Path, error: type[CoeffDiffError] = ConfigError) -> None:
    """Raises: `error` if the path is a file or a folder that holds something."""
    if not is_free(path):
        raise error(f"{path} is not empty; name another --output. {_UNCHANGED}")


def why_unwritable(folder: Path) -> str | None:
    """Why an existing or future folder cannot be written into; None if it can. Leaves nothing behind.

    A temporary file decides: permissions alone say nothing on read-only and network disks.
    """
    try:
        there = folder
        while not _exists(there):
            there = there.parent
        if not there.is_dir():
            return f"{there} is not a folder"
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


def refuse_unwritable(folder: Path, what: str = "The folder") -> None:
    """Raises: ConfigError if `folder` cannot be written into."""
    if reason := why_unwritable(folder):
        raise ConfigError(f"{what} {folder} cannot be written: {reason}. Name another --output.")


@contextmanager
def write_errors(what: str, error: type[CoeffDiffError] = ConfigError) -> Iterator[None]:
    """Raises: `error` in place of an OSError inside. what: a path, or a path with its noun."""
    try:
        yield
    except OSError as reason:
        raise error(f"{what} cannot be written: {reason.strerror or reason}.") from None


def next_folder(parent: Path) -> Path:
    """parent/001, or the first number that is free."""
    number = 1
    while (parent / f"{number:03d}").exists():
        number += 1
    return parent / f"{number:03d}"


def _exists(path: Path) -> bool:
    """Raises: OSError for an impossible path, such as a name that is too long, which Path.exists hides."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
