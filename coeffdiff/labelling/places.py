"""Where new captions and masks go: names that training will read, and photos that have one already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coeffdiff.data.captions import Captions, printable_name
from coeffdiff.data.decoding import SUFFIXES
from coeffdiff.data.mask_images import MASK_SUFFIX
from coeffdiff.data.masks import Masks
from coeffdiff.data.photos import Photo

CAPTION_SUFFIX = ".txt"


@dataclass(frozen=True)
class Place:
    """A photo and the file that its label goes to."""

    photo: Photo
    file: Path


@dataclass(frozen=True)
class Kept:
    """A photo that is left as it is, and why."""

    photo: Photo
    reason: str


@dataclass(frozen=True)
class Places:
    """What is to be written, and what is kept."""

    new: tuple[Place, ...]
    kept: tuple[Kept, ...]


def caption_places(photos: Sequence[Photo], *, overwrite: bool) -> Places:
    """photo.txt for each photo without a caption of any kind; with overwrite for each photo.

    Args:
        photos: of one folder, read with their captions.
    """
    entries = _entries(photos)

    def refused(photo: Photo, file: Path) -> str | None:
        if not overwrite:
            if photo.caption:
                return "there is a caption already"
            return _why_no_caption(file)
        files = Captions.of(_beside(photo, entries, file), ()).files_of(photo.path)
        return _why_not_first(files[0], file) if files[0] != file else None

    return _places(photos, entries, CAPTION_SUFFIX, refused)


def mask_places(photos: Sequence[Photo], *, overwrite: bool) -> Places:
    """photo.mask.png for each photo without a mask, in a file or as its alpha channel; with overwrite for each photo.

    Args:
        photos: of one folder, read with their masks, or with overwrite without.
    """
    entries = _entries(photos)

    def refused(photo: Photo, file: Path) -> str | None:
        if photo.mask and not overwrite:
            own = photo.mask.path == photo.path
            return "the alpha channel is the mask" if own else "there is a mask already"
        first = Masks(_beside(photo, entries, file), SUFFIXES).of(photo.path)
        return _why_not_first(first, file) if first and first != file else None

    return _places(photos, entries, MASK_SUFFIX, refused)


def _places(
    photos: Sequence[Photo],
    entries: Sequence[Path],
    suffix: str,
    refused: Callable[[Photo, Path], str | None],
) -> Places:
    """refused(photo, file): why a photo's file is not written, or None."""
    masks = Masks(entries, SUFFIXES)
    pictures = [path for path in entries if path.suffix.lower() in SUFFIXES and path not in masks]
    claims = Counter(key for path in pictures for key in (path.stem, path.name))
    new, kept = [], []
    for photo in photos:
        # photo.txt beside photo.jpg and photo.png would be that of both
        key = photo.path.stem if claims[photo.path.stem] == 1 else photo.path.name
        file = photo.path.with_name(key + suffix)
        reason = "not an ordinary file" if file.exists() and not file.is_file() else None
        reason = f"{printable_name(file)} is {reason}" if reason else refused(photo, file)
        if reason:
            kept.append(Kept(photo, reason))
        else:
            new.append(Place(photo, file))
    return Places(tuple(new), tuple(kept))


def _entries(photos: Sequence[Photo]) -> list[Path]:
    return sorted(photos[0].path.parent.iterdir(), key=lambda path: path.name) if photos else []


def _beside(photo: Photo, entries: Iterable[Path], file: Path) -> list[Path]:
    """The entries that may belong to a photo, with a file that is yet to come, sorted by name."""
    stem = photo.path.stem
    return sorted({file, *(path for path in entries if path.name.startswith(stem))}, key=lambda p: p.name)


def _why_no_caption(file: Path) -> str | None:
    """Why a caption file that training does not read must not be written over; None if there is nothing in it."""
    try:
        if not file.exists() or not file.read_bytes().strip():
            return None
    except OSError:
        pass
    return f"{printable_name(file)} is there, but not readable as a caption; --overwrite replaces it"


def _why_not_first(first: Path, file: Path) -> str:
    return f"{printable_name(first)} would be read before {printable_name(file)}; remove it first"
