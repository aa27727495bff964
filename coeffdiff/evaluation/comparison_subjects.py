"""The subjects of a comparison: pocket's own, or folders of photos."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffdiff.data.photos import holds_pictures, read_photos
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.evaluation.prompts import LISTING, read_listing
from coeffdiff.evaluation.protocol import Subject
from coeffdiff.pocket.world import subjects
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.hashing import hash_of

_GROUPS: dict[str, Sequence[subjects.Subject]] = {
    "dev": subjects.DEV, "eval": subjects.EVAL, "tellable": subjects.TELLABLE, "told": subjects.TOLD,
}  # fmt: skip


@dataclass(frozen=True)
class ComparisonSubject:
    """A subject of a comparison.

    identity: of its photos, the same on every machine. made_up: the subject of pocket's own whose photos these are.
    """

    name: str
    folder: Path
    class_word: str | None
    identity: str
    made_up: subjects.Subject | None = None

    def write_photos(self) -> None:
        """Write the photos of one of pocket's own, if they are not there yet."""
        if self.made_up and not self.folder.is_dir():
            with atomic_write(self.folder) as unfinished:
                subjects.write_photos(self.made_up, unfinished, masks=True)


def find_subjects(wanted: str, class_word: str | None, output: Path) -> Iterator[ComparisonSubject]:
    """The subjects that a plan names; the photos of pocket's own, once they are written, lie below `output`.

    Raises: ConfigError or PhotoError for subjects that do not exist.
    """
    own, root = subject_named(wanted)
    if own:
        for subject in own:
            folder = output / "work" / "photos" / subject.name
            yield ComparisonSubject(
                subject.name, folder, subject.class_word, repr(_rounded(subject)), subject
            )
        return
    listing = read_listing(root)  # in it, or beside it where it is one subject's folder
    classes = listing.classes if listing else {}
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    if listing and listing.file.parent == root:
        folders = [folder for folder in folders if folder.name in classes]
        if not folders:
            raise PhotoError(f"None of the subjects that {root / LISTING} names has a folder in {root}.")
    elif folders and holds_pictures(root):
        raise PhotoError(
            f"{root} has photos and folders ({folders[0].name}, ...), so it may be one subject or several. Move one "
            "of the two elsewhere."
        )
    for folder in folders or [root]:
        own_class = classes.get(folder.name) or class_word
        identity = hash_of([photo.identity for photo in read_photos(folder).photos])
        yield ComparisonSubject(folder.name, folder, own_class, identity)


def _rounded(value: Any) -> Any:
    """A subject with its numbers to four decimals: the last digits of what torch computes depend on the processor."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_rounded(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _rounded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def subject_named(wanted: str) -> tuple[list[subjects.Subject], Path]:
    """The subjects of pocket's own with these names, or an existing folder. Raises: ConfigError for neither."""
    own, root = _made_up(wanted), Path(wanted)
    if not own and not root.is_dir():
        raise ConfigError(
            f"There are no subjects {wanted!r}: {', '.join(_GROUPS)}, fresh:N or names of pocket's own, or a folder of "
            "photos."
        )
    return own, root


def _made_up(wanted: str) -> list[subjects.Subject]:
    """The subjects of pocket's own with these names, or none."""
    fresh = re.fullmatch(r"fresh:(\d+)(?:@(\d+))?", wanted)
    if fresh:
        first = int(fresh[2] or 0)
        return [subjects.fresh_subject(seed) for seed in range(first, first + int(fresh[1]))]
    if wanted in _GROUPS:
        return list(_GROUPS[wanted])
    names = wanted.split(",")
    if twice := next((name for name in names if names.count(name) > 1 and name in subjects.SUBJECTS), None):
        raise ConfigError(f"The subjects {wanted!r} name {twice} twice.")
    return [subjects.SUBJECTS[name] for name in names] if set(names) <= set(subjects.SUBJECTS) else []


def subject_of(subject: ComparisonSubject, token: str) -> Subject:
    """The subject as scoring takes it, its photos read."""
    photos = read_photos(subject.folder).photos
    return Subject(subject.name, photos, [photo.open_mask() for photo in photos], token, subject.class_word)
