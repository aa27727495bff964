"""kohya's layout of folders, `img/10_sks dog/`: the folder with the photos, and what its name says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coeffdiff.errors import PhotoError


@dataclass(frozen=True)
class FolderLabel:
    """What the name of a folder in kohya's layout says: how many repeats, the token, the class word."""

    folder: str
    repeats: int
    token: str
    class_word: str | None


def folder_label(folder: Path) -> FolderLabel | None:
    """ "10_sks dog" -> 10 repeats of the token sks and the class word dog; None for other names."""
    name = folder.name or folder.resolve().name
    match = re.fullmatch(r"(\d{1,6})_\s*(\S+)(?:\s+(\S.*?))?\s*", name)
    return FolderLabel(name, int(match[1]), match[2], match[3]) if match else None


def photo_folder(folder: Path, holds_pictures: Callable[[Path], bool]) -> Path:
    """The folder itself if it has pictures, else the one of kohya's layout below it or below its img/.

    Raises: PhotoError if there are several.
    """
    if not folder.is_dir() or holds_pictures(folder):
        return folder
    for parent in (folder, folder / "img"):
        below = [path for path in _folders(parent) if folder_label(path) and holds_pictures(path)]
        if len(below) > 1:
            names = ", ".join(
                ascii(path.name) if not path.name.isprintable() else path.name for path in below[:5]
            )
            raise PhotoError(
                f"{parent} holds {len(below)} folders in kohya's layout ({names}), and a run learns one subject: "
                "give one of them."
            )
        if below:
            return below[0]
    return folder


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
