"""Individuals that the pocket world never shows, and photos of them: what customization is tried on.

A subject is of a class that the base model knows, with what no caption can say: hues between the named
colours, marks on one side, proportions beyond the world's, parts of other things. sample_scene never draws
marks or extras, and a Subject without either is refused, so no sampled scene can be one; Subject.novelty()
lists everything in which it lies outside.
"""

from __future__ import annotations

from coeffdiff.pocket.world.subjects.fresh import fresh_subject
from coeffdiff.pocket.world.subjects.named import DEV, EVAL, SUBJECTS
from coeffdiff.pocket.world.subjects.photos import (
    PHOTO_SETTINGS,
    photo_scenes,
    picture_of,
    subject_photos,
    write_photos,
)
from coeffdiff.pocket.world.subjects.subject import UNNAMED, Subject
from coeffdiff.pocket.world.subjects.tellable import TELLABLE, TOLD, TellableSubject

__all__ = [
    "DEV", "EVAL", "PHOTO_SETTINGS", "SUBJECTS", "TELLABLE", "TOLD", "UNNAMED", "Subject", "TellableSubject",
    "fresh_subject", "photo_scenes", "picture_of", "subject_photos", "write_photos",
]  # fmt: skip
