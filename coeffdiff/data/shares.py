"""Equal shares of a run's samples for each of its subjects, however many photos they have.

A step's photos have one latent size, so its size is drawn first, and then each sample's subject among those that have
photos of that size. A photo counts 1 / (photos of its subject), which gives every subject the same share on average; it
is exact in every S steps, of S subjects, where all photos have one size or each subject has its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from coeffdiff.data.encoding import EncodedPhoto
from coeffdiff.utils.seeding import stable_seed

T = TypeVar("T")


def size_of_step(photos: Sequence[EncodedPhoto], seed: int, step: int) -> tuple[int, ...]:
    """The latent size of one step's photos."""
    if (count := len(_counts(photos))) == 1:
        return random.Random(stable_seed(seed, "bucket", step)).choice([photo.bucket for photo in photos])
    round_, place = divmod(step - 1, count)
    point = random.Random(stable_seed(seed, "bucket of subjects", round_)).random() + place / count
    return _at([photo.bucket for photo in photos], _weights(photos, photos), point % 1)


def photos_of_sample(
    photos: Sequence[EncodedPhoto], every: Sequence[EncodedPhoto], seed: int, step: int, index: int
) -> Sequence[EncodedPhoto]:
    """The photos of the subject that one sample is of.

    photos: of the step's size; every: of the run.
    """
    if (count := len(_counts(every))) == 1:
        return photos
    subjects = sorted({photo.subject for photo in photos})
    weights = _weights(photos, every)
    shares = [sum(w for p, w in zip(photos, weights, strict=True) if p.subject == s) for s in subjects]
    # S neighbours, samples of a step or one sample of S steps, share one draw and take its S equal parts in turn
    draw = random.Random(stable_seed(seed, "subject", (step - 1) // count, index // count)).random()
    subject = _at(subjects, shares, (draw + (step - 1 + index) % count / count) % 1)
    return [photo for photo in photos if photo.subject == subject]


def _counts(photos: Sequence[EncodedPhoto]) -> dict[int, int]:
    """How many photos each subject has."""
    counts: dict[int, int] = {}
    for photo in photos:
        counts[photo.subject] = counts.get(photo.subject, 0) + 1
    return counts


def _weights(photos: Sequence[EncodedPhoto], every: Sequence[EncodedPhoto]) -> list[float]:
    counts = _counts(every)
    return [1 / counts[photo.subject] for photo in photos]


def _at(items: Sequence[T], weights: Sequence[float], point: float) -> T:
    """The item at a point between 0 and 1 of a line on which each takes up its weight, equal ones side by side."""
    order = list(dict.fromkeys(items))
    sums = [sum(w for item, w in zip(items, weights, strict=True) if item == one) for one in order]
    rest = point * sum(sums)
    for item, length in zip(order, sums, strict=True):
        if rest < length:
            return item
        rest -= length
    return order[-1]  # rounding
