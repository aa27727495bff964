"""Every subject has the same share of the samples, whatever its photos are and however the samples are divided."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from coeffdiff.data.batches import LatentData, Prior
from coeffdiff.data.encoding import EncodedPhoto, EncodedText, EncodedView

TEXT = EncodedText(torch.zeros(3, 4), torch.zeros(4))


def photo(subject: int, rows: int = 2, name: str = "") -> EncodedPhoto:
    latents = torch.zeros(4, rows, 2)
    return EncodedPhoto(
        (EncodedView(latents, latents, (0,) * 6),), (f"{name}{'abc'[subject]}",), subject=subject
    )


def data(*photos: EncodedPhoto, prior: Prior | None = None) -> LatentData:
    captions = {caption for one in (*photos, *(prior.pictures if prior else ())) for caption in one.captions}
    return LatentData(photos, dict.fromkeys(captions, TEXT), lambda x: x, 1000, seed=0, prior=prior)


def drawn(photos, samples: int, steps: int) -> Counter:
    found = Counter()
    for step in range(1, steps + 1):
        found.update(data(*photos).batch(step, range(samples)).captions)
    return found


@pytest.mark.parametrize("samples", [1, 3, 4])
@pytest.mark.parametrize("rows", [2, 3], ids=["one size", "each its own"])
def test_one_photo_beside_six_has_half_of_the_samples(samples, rows):
    """Exactly, in 40 steps; a step of one size has both subjects."""
    photos = [photo(0), *[photo(1, rows)] * 6]
    found = drawn(photos, samples, 40)
    assert found["a"] == found["b"] == 20 * samples
    if samples > 1 and rows == 2:
        assert set(data(*photos).batch(1, range(samples)).captions) == {"a", "b"}


def test_sizes_that_some_subjects_share_keep_the_shares_on_average():
    """Three subjects, three sizes: of 3,200 samples a third each, within three standard deviations of a fair draw."""
    photos = [photo(0)] * 2 + [photo(0, 3)] * 3 + [photo(1, 3)] * 6 + [photo(2), photo(2, 4)]
    found = drawn(photos, 4, 800)
    assert all(abs(found[name] - 3200 / 3) < 3 * (3200 * 2 / 9) ** 0.5 for name in "abc")


def test_samples_do_not_depend_on_how_they_are_divided():
    photos = [photo(0), *[photo(1)] * 6]
    whole = data(*photos).batch(5, range(4))
    parts = [data(*photos).batch(5, [index]) for index in range(4)]
    assert whole.captions == tuple(caption for part in parts for caption in part.captions)
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))


def test_a_class_row_shows_the_class_of_its_subject():
    prior = Prior({}, (photo(0, name="class "), photo(1, name="class ")))
    batch = data(photo(0), photo(1), prior=prior).batch(1, range(4))
    assert batch.captions[4:] == tuple(f"class {caption}" for caption in batch.captions[:4])
