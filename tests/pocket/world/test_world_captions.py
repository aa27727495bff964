"""What is said of scenes."""

from __future__ import annotations

import itertools

import pytest

from coeffdiff.pocket.world import (
    COLOURS,
    KINDS,
    SETTINGS,
    article,
    caption,
    sample_scene,
    vocabulary,
)
from coeffdiff.pocket.world.scene import PATTERNS


@pytest.mark.parametrize(
    ("phrase", "answer"),
    [("orange mug", "an orange mug"), ("red mug", "a red mug"), ("image of a mug", "an image of a mug")],
)
def test_a_and_an(phrase, answer):
    assert article(phrase) == answer


def test_captions_are_grammatical_true_and_of_known_words():
    """4,000 captions: right articles, only words of the vocabulary, and nothing that the scene is not."""
    words = set(vocabulary())
    seen = set()
    for i in range(4000):
        scene = sample_scene(i % 400)
        text = caption(scene, i)
        parts = text.replace(",", "").split()
        assert set(parts) <= words, text
        seen |= set(parts)
        for first, second in itertools.pairwise(parts):
            if first in ("a", "an"):
                assert (first == "an") == (second[0] in "aeiou"), text
        thing = text.replace(scene.setting, "")
        assert thing != text or not any(setting in text for setting in SETTINGS), text
        for names, own in ((KINDS, scene.kind), (COLOURS, scene.colour), (PATTERNS, scene.pattern)):
            assert not any(f" {name} " in f" {thing} " for name in names if name != own), text
        assert "  " not in text and text == text.strip()
    assert seen == words


def test_captions_name_everything_or_less():
    """One scene: full ones, without adjectives, object only, setting only; adjectives in both orders."""
    scene = sample_scene(0, kind="mug", colour="red", pattern="striped", setting="in the snow")
    texts = {caption(scene, i) for i in range(600)}
    assert {
        "a photo of a striped red mug in the snow",
        "a red striped mug, in the snow",
        "a picture of a mug",
        "a photo taken in the snow",
        "a mug in the snow",
    } <= texts
    assert caption(scene, 1) == caption(scene, 1)
    assert len(texts) > 40
