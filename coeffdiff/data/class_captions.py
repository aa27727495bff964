"""The captions of a class, made of those of the photos: what prior preservation trains beside the subject."""

from __future__ import annotations

from collections.abc import Sequence

from coeffdiff.config.schema import SubjectSettings
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.templates import captions_for, class_caption


def class_captions(
    subject: SubjectSettings,
    prior_weight: float,
    captions: Sequence[tuple[str, ...]],
    pictures: PhotoSet | None,
) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """From each caption of the photos to that of its class, and the captions of each picture of the class.

    One of the two is empty: with pictures the photos' captions need no counterpart, without them there are none.
    Both are empty at weight 0 and without a class word.
    """
    token, word = str(subject.token), subject.class_word
    if not prior_weight or not word:
        return {}, []
    if pictures is None:
        return {text: class_caption(text, token, word) for texts in captions for text in texts}, []
    filled = (captions_for(picture, subject.templates, token, word) for picture in pictures.photos)
    return {}, [tuple(class_caption(text, token, word) for text in texts) for texts in filled]
