"""A file of subjects: its paths, a subject that is alone, and one sentence for whatever cannot be learned together."""

from __future__ import annotations

from pathlib import Path

import pytest

from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import Settings
from coeffdiff.config.subjects_file import settings_of_subjects
from coeffdiff.config.tree import save_settings
from coeffdiff.errors import ConfigError

TWO = (
    "- {images: mug, token: ohwx, class_word: mug}\n- {images: /toys/sloth, token: zwx, templates: '<V>!'}\n"
)


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "subjects.yaml").write_text(text)
        return tmp_path / "subjects.yaml"

    return write


def test_each_subject_has_its_own_words_and_the_rest_of_subject(written, tmp_path):
    """Paths begin at the file; a config.yaml of them reads back."""
    flags = settings_of_subjects(written(TWO)) | {"subject.templates": ["seen: {token}"]}
    settings = load_settings(None, flags)
    mug, sloth = settings.each_subject
    assert (mug.images, sloth.images) == (tmp_path / "mug", Path("/toys/sloth"))
    assert (mug.templates, sloth.templates) == (["seen: {token}"], ["<V>!"])
    assert (sloth.token, sloth.class_word, settings.run_name) == ("zwx", None, "ohwx-zwx")
    save_settings(settings, tmp_path / "config.yaml")
    assert load_settings(tmp_path / "config.yaml") == settings


def test_one_subject_alone_is_an_ordinary_run(written, tmp_path):
    """Its settings are those of --images, --token and --class-word, and config.yaml knows no list."""
    flags = settings_of_subjects(written(TWO.splitlines()[0]))
    options = {
        "subject.images": str(tmp_path / "mug"),
        "subject.token": "ohwx",
        "subject.class_word": "mug",
    }
    assert load_settings(None, flags) == load_settings(None, options)
    save_settings(Settings(), tmp_path / "config.yaml")
    assert "subjects" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1", "should hold a list of subjects, such as"),
        ("[]", "should hold a list of subjects, such as"),
        ("- 5", "subject 1 is not a subject's settings"),
        ("- {images: a, tokn: x}", "line 1: a subject has no setting tokn; it has images, token,"),
        ("- images: a\n  token: ''", r"line 2: token \(given: ''\): it must be 1 to 100 visible"),
        ("- token: a", "subject 1 has no images"),
        ("- {images: a, token: x}\n- {images: b, token: X}", "two subjects have the token x"),
        ("- {images: a, token: x}\n- {images: b, token: my x}", "x of one subject is a word of my x"),
        ("- {images: a, prior_images: p}\n- {images: b}", "some subjects have prior_images and others"),
    ],
)
def test_what_cannot_be_learned_together_is_refused_in_a_sentence(written, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_settings(None, settings_of_subjects(written(text)))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("subject.token", "sks", "leave those of subject .* out"),
        ("prior.images", "dogs", "give each its own prior_images"),
    ],
)
def test_what_is_each_subjects_own_is_not_said_for_all(written, name, value, sentence):
    flags = settings_of_subjects(written(TWO)) | {"prior.weight": 1, name: value}
    with pytest.raises(ConfigError, match=sentence):
        load_settings(None, flags)
