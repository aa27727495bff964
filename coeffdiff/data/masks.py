"""Which files are masks of which photos, by the names that this tool and others give them.

    photo.mask.png       this tool's
    photo-masklabel.png  OneTrainer's; its photo-condlabel.png is a picture for control and neither photo nor mask
    photo_mask.png, photo-mask.png   of scripts and editors, where there is a photo of that name beside it

In place of .png any suffix of a photo. sd-scripts, ai-toolkit and SimpleTuner keep masks in a folder of their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

_SURE = re.compile(r"(.+)(\.mask|-masklabel|-condlabel)\.\w+", re.IGNORECASE | re.DOTALL)
_PERHAPS = re.compile(r"(.+)([-_]mask)\.\w+", re.IGNORECASE | re.DOTALL)
_ORDER = (".mask", "-masklabel", "_mask", "-mask")


class Masks:
    """The masks of a folder: `of` gives a photo's mask, `why_not` the reason to leave out a mask that is not used."""

    def __init__(self, entries: Iterable[Path], suffixes: Collection[str]) -> None:
        pictures = [path for path in entries if path.suffix.lower() in suffixes]
        sure = {path: match for path in pictures if (match := _SURE.fullmatch(path.name))}
        photos = {name for path in pictures if path not in sure for name in (path.stem, path.name)}
        perhaps = {
            path: match
            for path in pictures
            if path not in sure and (match := _PERHAPS.fullmatch(path.name)) and match[1] in photos
        }
        self._marks: Mapping[Path, re.Match[str]] = sure | perhaps
        self._of: dict[str, Path] = {}
        for mark in _ORDER:
            for path, match in self._marks.items():
                if match[2].lower() == mark:
                    self._of.setdefault(match[1], path)

    def __contains__(self, path: object) -> bool:
        return path in self._marks

    def of(self, photo: Path) -> Path | None:
        """The mask file of a photo."""
        return self._of.get(photo.stem) or self._of.get(photo.name)

    def owner(self, path: Path) -> str | None:
        """The name, with or without a suffix, of the photo that a mask in use belongs to."""
        match = self._marks.get(path)
        return match[1] if match and self._of.get(match[1]) == path else None

    def why_not(self, path: Path) -> str:
        """Why a mask file that is not used is left out."""
        mark, stem = self._marks[path][2].lower(), self._marks[path][1]
        if mark == "-condlabel":
            return "OneTrainer's picture for control, not a photo"
        if self._of.get(stem) != path:
            return f"another mask of {stem}, which has {self._of[stem].name}"
        return "a mask without a photo of that name"
