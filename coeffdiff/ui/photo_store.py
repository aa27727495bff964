"""Photos that were dropped on the page, copied into a folder that a person can see and keep."""

from __future__ import annotations

import filecmp
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

from coeffdiff.data.captions import CAPTION_SUFFIXES
from coeffdiff.data.decoding import KINDS, SUFFIXES
from coeffdiff.errors import PhotoError
from coeffdiff.training.run_folder import RUNS, folder_name_of
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.output_folder import write_errors

PHOTOS = RUNS / "photos"
MOST_FILES = 500
ACCEPTED = (*sorted(SUFFIXES), *sorted(CAPTION_SUFFIXES))


def store_photos(files: Sequence[str | Path], token: str) -> Path:
    """Copy files into PHOTOS/TOKEN, or TOKEN-2, ... where that holds others; the same files stay where they are.

    files: photos, and captions and masks that lie beside them.
    Raises: PhotoError for none, too many, two of one name, or a file of another kind or one that is gone.
    """
    named = _by_name([Path(file) for file in files])
    for number in itertools.count(1):
        folder = PHOTOS / (folder_name_of(token) + (f"-{number}" if number > 1 else ""))
        if _holds(folder, named):
            return folder
        if not folder.exists():
            break
    with write_errors(f"The folder {folder}", PhotoError), atomic_write(folder) as temporary:
        temporary.mkdir()
        for name, file in named.items():
            shutil.copyfile(file, temporary / name)
    return folder


def _by_name(files: list[Path]) -> dict[str, Path]:
    if not files:
        raise PhotoError("There are no photos yet: drop three to six of the subject.")
    if len(files) > MOST_FILES:
        raise PhotoError(f"{len(files)} files are more than the page takes ({MOST_FILES}); drop fewer.")
    named: dict[str, Path] = {}
    for file in files:
        if file.suffix.lower() not in ACCEPTED:
            raise PhotoError(f"{file.name} is no photo; drop {KINDS}.")
        if not file.is_file():
            raise PhotoError("The page keeps dropped photos for a day, and these are gone; drop them again.")
        if file.name in named:
            raise PhotoError(f"Two files are called {file.name}; rename one of them.")
        named[file.name] = file
    return named


def _holds(folder: Path, named: dict[str, Path]) -> bool:
    """Whether a folder has these files, byte for byte, and no others."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != set(named):
        return False
    return all(filecmp.cmp(file, folder / name, shallow=False) for name, file in named.items())
