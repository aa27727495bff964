"""The captions of a class, made of those of the photos: what prior preservation trains beside the subject."""

from __future__ import annotations

from collections.abc import Sequence

from coeffdiff.config.schema import SubjectSettings
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.subjects import captions_of
from coeffdiff.data.templates import class_caption


def class_captions(
    subjects: Sequence[SubjectSettings],
    prior_weight: float,
    captions: Sequence[tuple[str, ...]],
    pictures: PhotoSet | None,
) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """From each caption of the photos to that of its class, and the captions of each picture of a class.

    One of the two is empty: with pictures the photos' captions need no counterpart, without them there are none.
    Both are empty at weight 0 and without class words. A caption that names several subjects names their classes.
    """
    words = [(str(subject.token), subject.class_word) for subject in subjects]
    if not prior_weight or not all(word for _, word in words):
        return {}, []

    def of_class(text: str) -> str:
        for token, word in words:
            text = class_caption(text, token, str(word))
        return text

    if pictures is None:
        return {text: of_class(text) for texts in captions for text in texts}, []
    filled = captions_of(subjects, pictures.photos)
    return {}, [tuple(of_class(text) for text in texts) for texts in filled]
