"""The subject's place in a caption."""

from __future__ import annotations

import pytest

from coeffdiff.labelling.wording import with_subject


@pytest.mark.parametrize(
    ("caption", "class_word", "expected"),
    [
        ("a photo of a dog on a sofa", "dog", "a photo of a ohwx dog on a sofa"),
        ("Dog on a sofa beside a dog", "dog", "ohwx Dog on a sofa beside a dog"),
        ("a puppy on a sofa", "dog", "ohwx dog, a puppy on a sofa"),
        ("two hotdogs and a dog-shaped cake", "dog", "ohwx dog, two hotdogs and a dog-shaped cake"),
        ("a grey stuffed animal.", "stuffed animal", "a grey ohwx stuffed animal."),
        ("a puppy on a sofa", None, "ohwx, a puppy on a sofa"),
        ("a photo of a ohwx dog", "dog", "a photo of a ohwx dog"),
        ("a dog\n with  a {label}", "dog", "a ohwx dog with a (label)"),
        ("a c++ book", "c++", "a ohwx c++ book"),
        ("", "dog", "ohwx dog"),
    ],
)
def test_the_token_stands_before_the_class_word(caption, class_word, expected):
    """Once; in front, with the class word, where the caption does not name that."""
    assert with_subject(caption, "ohwx", class_word) == expected
    assert with_subject(expected, "ohwx", class_word) == expected
