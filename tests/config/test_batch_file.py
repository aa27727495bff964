"""A file of batch: names, shared and own settings, and one sentence with the line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from coeffdiff.config.batch_file import settings_of_batch
from coeffdiff.config.loading import load_settings
from coeffdiff.errors import ConfigError


@pytest.fixture
def read(tmp_path):
    def of(text: str, **shared):
        (tmp_path / "subjects.yaml").write_text(text)
        return settings_of_batch(tmp_path / "subjects.yaml", load_settings(None, shared))

    return of


def test_own_settings_lie_over_shared_ones(read, tmp_path):
    """Nested or dotted; a subject without a name is called like its folder; paths begin at the file."""
    text = (
        "- {images: toys/mug, token: zwx, set: {training.steps: 7, method: {kind: lora}}}\n"
        "- {images: /toys/sloth, name: my sloth, class_word: sloth, templates: '<V>!', prior_images: sloths}\n"
    )
    found = read(text, **{"subject.token": "ohwx", "training.steps": 5, "prior.weight": 1})
    mug, sloth = found["mug"], found["my sloth"]
    assert (mug.subject.images, mug.subject.token) == (tmp_path / "toys/mug", "zwx")
    assert (mug.training.steps, mug.method.kind, mug.prior.images) == (7, "lora", None)
    assert (sloth.training.steps, sloth.method.kind, sloth.subject.token) == (5, "auto", "ohwx")
    assert (sloth.subject.class_word, sloth.subject.templates) == ("sloth", ["<V>!"])
    assert sloth.prior.images == Path(tmp_path / "sloths") and not sloth.subjects


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1", "should hold a list of subjects"),
        ("- {images: a}\n- {image: b}", "line 2: a subject has no setting image; it has images, token,"),
        ("- {images: a}\n- {token: b}", "subject 2 has no images"),
        ("- {images: a}\n- {images: b, name: A}", "line 2: the name A is taken by subject 1"),
        ("- {images: x/a}\n\n- {images: y/a}", "line 3: the name a is taken by subject 1"),
        ("- {images: tasks}", "line 1: the name tasks is taken by what the batch itself writes"),
        ("- {images: a, name: b/c}", "line 1: name .given: 'b/c'.: it must be able to name a folder"),
        ("- {images: a, name: .b}", "it must be able to name a folder"),
        ("- {images: /}", "subject 1 needs a name"),
        ("- {images: ..}", "subject 1 needs a name"),
        ("- {images: .hidden}", "subject 1 needs a name"),
        ("- {images: a}\n- {images: batch.json}", "line 2: the name batch.json is taken by what the batch"),
        ("- {images: a, set: {prior.images: b}}", "write prior_images beside set"),
        ("- {images: a, set: {subjects: [{images: b}]}}", "each subject of a batch is trained by itself"),
        (
            "- {images: a}\n- images: b\n  set:\n    training.stps: 4",
            "training.stps in .*, line 4. Did you mean",
        ),
        ("- {images: a, set: {training: {steps: -4}}}", "line 1: training.steps .given: -4."),
        (
            "- {images: a, set: {subject.token: x}}",
            "line 1: subject.token cannot be in set of a; write token",
        ),
        ("- {images: a, set: {output: x}}", "output cannot be in set of a; the batch decides it"),
        ("- {images: a, set: 4}", "set .given: 4.: it must be settings by their names"),
        ("- {images: a, token: ''}", "line 1: token"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(read, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(text)


def test_a_list_of_subjects_in_the_settings_is_refused(read):
    with pytest.raises(ConfigError, match="leave `subjects` out"):
        read("- {images: a}", subjects=[{"images": "b", "token": "x"}, {"images": "c", "token": "y"}])
