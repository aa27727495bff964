"""The subjects of a run with their photos, captions and prompts, in order; an ordinary run has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from coeffdiff.config.fields import PLACEHOLDER
from coeffdiff.config.nested import as_tree
from coeffdiff.config.schema import Settings, SubjectSettings
from coeffdiff.config.tree import with_values
from coeffdiff.data.captions import printable_name
from coeffdiff.data.photos import Photo, PhotoSet, offered_values, read_photos
from coeffdiff.data.templates import captions_for, fill
from coeffdiff.errors import ConfigError, PhotoError


def with_offered_words(settings: Settings) -> Settings:
    """A copy with the token and class word that a folder's name offers, where the settings lack them."""
    if not settings.subjects:
        return with_values(settings, offered_values(settings.subject))
    entries: list[dict[str, Any]] = as_tree(settings)["subjects"]
    for entry, subject in zip(entries, settings.each_subject, strict=True):
        offered = offered_values(subject)
        entry |= {name.removeprefix("subject."): value for name, value in offered.items()}
    return with_values(settings, {"subjects": entries})


def refuse_incomplete(settings: Settings) -> None:
    """Raises: ConfigError for a subject without photos or a token."""
    for number, subject in enumerate(settings.each_subject, 1):
        missing = "images" if subject.images is None else "token" if subject.token is None else None
        if missing is None:
            continue
        if settings.subjects:
            raise ConfigError(f"Subject {number} of {len(settings.subjects)} has no {missing}; give it one.")
        raise ConfigError(
            f"The subject has no {missing}: train --images photos/ --token ohwx, or the same in a file of subjects."
        )


def read_subjects(settings: Settings, on_file: Callable[[int], None] = lambda done: None) -> PhotoSet:
    """The photos of all subjects, one subject after the other; each photo knows which it is of.

    on_file: called with the number of files that have been read.
    Raises: PhotoError as read_photos, and for one folder that two subjects name.
    """
    subjects, masks = settings.each_subject, settings.training.masked_loss
    _refuse_one_folder(subjects)
    photos: list[Photo] = []
    sets: list[PhotoSet] = []
    before = 0
    for number, subject in enumerate(subjects):
        assert subject.images is not None

        def report(done: int, before: int = before) -> None:
            on_file(before + done)

        found = read_photos(subject.images, masks, on_file=report)
        photos += [replace(photo, subject=number) for photo in found.photos]
        sets.append(found)
        before += len(found.photos) + len(found.skipped)
    skipped = tuple(one for found in sets for one in found.skipped)
    notes = tuple(note for found in sets for note in found.notes)
    return PhotoSet(tuple(photos), skipped, (*notes, *_shared_photos(photos, subjects)))


def captions_of(subjects: Sequence[SubjectSettings], photos: Sequence[Photo]) -> list[tuple[str, ...]]:
    """The captions that may go with each photo, filled; <V> stays where there is no token yet.

    Raises: ConfigError for a placeholder that does not exist.
    """
    words, tokens = tokens_of(subjects), numbered(subjects)
    return [
        captions_for(photo, subject.templates, words[photo.subject], subject.class_word, tokens)
        for photo in photos
        for subject in (subjects[photo.subject],)
    ]


def prompts_of(subjects: Sequence[SubjectSettings], prompts: Sequence[str]) -> list[str]:
    """Each prompt, filled for each subject; one that names none in particular comes once."""
    tokens = numbered(subjects)
    filled = [
        fill(prompt, word, subject.class_word, tokens)
        for prompt in prompts
        for subject, word in zip(subjects, tokens_of(subjects), strict=True)
    ]
    return list(dict.fromkeys(filled))


def tokens_of(subjects: Sequence[SubjectSettings]) -> list[str]:
    """The tokens, <V> for one that is missing, as in a check."""
    return [subject.token or PLACEHOLDER for subject in subjects]


def numbered(subjects: Sequence[SubjectSettings]) -> list[str]:
    """What <V1>, <V2> in captions and prompts stand for: the tokens of several subjects."""
    return tokens_of(subjects) if len(subjects) > 1 else []


def _refuse_one_folder(subjects: Sequence[SubjectSettings]) -> None:
    seen: dict[Any, SubjectSettings] = {}
    for subject in subjects:
        assert subject.images is not None
        other = seen.setdefault(subject.images.resolve(), subject)
        if other is not subject:
            raise PhotoError(
                f"{other.token} and {subject.token} have one folder of photos, {subject.images}; give each its own."
            )


def _shared_photos(photos: Sequence[Photo], subjects: Sequence[SubjectSettings]) -> list[str]:
    """A note for each photo of two subjects."""
    notes: list[str] = []
    first: dict[str, Photo] = {}
    for photo in photos:
        other = first.setdefault(photo.digest, photo)
        if other.subject != photo.subject:
            both = " and of ".join(str(subjects[one.subject].token) for one in (other, photo))
            notes.append(
                f"{printable_name(photo.path)} is a photo of {both}: unless masks or captions say what is which, "
                "both words learn all that it shows."
            )
    return notes
