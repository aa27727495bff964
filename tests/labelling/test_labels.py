"""Labels that a class word means."""

from __future__ import annotations

import pytest

from coeffdiff.errors import ConfigError
from coeffdiff.labelling.labels import matching_labels

LABELS = {
    0: "wall",
    1: "hot dog",
    2: "dog, domestic dog, Canis",
    3: "teddy bear",
    4: "wall-other-merged",
    5: "bear",
}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dog", [2]),
        ("Domestic Dog", [2]),
        ("hot dog", [1]),
        ("bear", [5]),
        ("teddy", [3]),
        ("other", [4]),
        ("wall", [0]),
    ],
)
def test_a_label_that_is_the_word_wins_over_those_that_contain_it(word, expected):
    assert list(matching_labels(LABELS, word, "me/model")) == expected


@pytest.mark.parametrize("word", ["cat", "do", "dogs", "...", "ar"])
def test_a_word_without_a_label_is_one_sentence(word):
    with pytest.raises(ConfigError, match=r"None of the 6 labels of me/model contains .*--class-word"):
        matching_labels(LABELS, word, "me/model")


def test_the_nearest_labels_are_named():
    with pytest.raises(ConfigError, match=r"the nearest are teddy bear"):
        matching_labels(LABELS, "teddybear", "me/model")
