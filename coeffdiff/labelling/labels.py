"""The labels of a segmentation model that a class word means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from coeffdiff.errors import ConfigError


def matching_labels(labels: Mapping[int, str], class_word: str, name: str) -> dict[int, str]:
    """The labels that are the class word, or if there are none those that contain it as whole words.

    So "dog" takes "dog" or "dog, domestic dog, canis familiaris", and "hot dog" only where no label is a dog.

    Args:
        labels: a model's id2label, of which one label may list several words with commas.
        name: of the model, for the error.
    Raises: ConfigError, with the nearest labels.
    """
    word = _words(class_word)
    parts = {number: [_words(part) for part in label.split(",")] for number, label in labels.items()}
    exact = {number: labels[number] for number, known in parts.items() if word in known}
    if exact:
        return exact
    within = {
        number: labels[number]
        for number, known in parts.items()
        if any(f" {word} " in f" {part} " for part in known)
    }
    if within and word:
        return within
    near = difflib.get_close_matches(class_word.lower(), [label.lower() for label in labels.values()], 5, 0.5)
    like = f"; the nearest are {', '.join(near)}" if near else ""
    raise ConfigError(
        f'None of the {len(labels)} labels of {name} contains "{class_word}"{like}. Name one of its labels with '
        "--class-word, or leave --model out: CLIPSeg takes any words."
    )


def _words(text: str) -> str:
    """In small letters, with single blanks in place of all that is no letter or digit."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()
