"""Whether a folder can be written to, tried before anything slow begins."""

from __future__ import annotations

import tempfile
from pathlib import Path

from coeffdiff.errors import ConfigError


def why_unwritable(folder: Path) -> str | None:
    """Why a folder that is there, or will have to be made, cannot be written into; None if it can. Nothing is left.

    By trying: permissions alone say nothing on read-only and network disks.
    """
    try:
        there = folder
        while not _is_there(there):
            there = there.parent
        if not there.is_dir():
            return f"{there} is not a folder"
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


def refuse_unwritable(folder: Path, what: str = "The folder") -> None:
    """Raises: ConfigError before anything slow begins, if `folder` cannot be written into."""
    if reason := why_unwritable(folder):
        raise ConfigError(f"{what} {folder} cannot be written: {reason}. Name another --output.")


def _is_there(path: Path) -> bool:
    """Raises: OSError for a path that cannot be, such as a name that is too long, which Path.exists hides."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
