"""Which photos an adapter is scored against: those that its run names for its token, or those that are given."""

from __future__ import annotations

import pytest
from PIL import Image

from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import save_settings, with_values
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.runs import find_candidates
from coeffdiff.method.adapter_file import pack_coefficients
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import COEFF_FILE


@pytest.fixture
def run(tmp_path):
    """A run of "dog" with its photos; its folder of adapters holds one of "cat" too, which somebody put there."""
    for name in ("dogs", "cats"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), "grey").save(tmp_path / name / "photo.png")
    folder = tmp_path / "run"
    for name, token in (("adapter", "dog"), ("cat", "cat")):
        header = AdapterHeader(
            format_version=1, kind="token", vectors=1, base_model="some/model", token=token, class_word="animal",
            heads={}, trained_steps=7, resolution=64,
        )  # fmt: skip
        (folder / name).mkdir(parents=True)
        (folder / name / COEFF_FILE).write_bytes(pack_coefficients({}, header))
    settings = with_values(Settings(), {"subject.images": str(tmp_path / "dogs"), "subject.token": "dog"})
    save_settings(settings, folder / "config.yaml")
    (folder / "log.jsonl").touch()
    return folder


def photos_of(adapter, images=None) -> str:
    (found,) = find_candidates(
        [(str(adapter), None)], images=images, prompts="object", limit=None, protocol=lambda prompts: prompts
    )
    return found.subject.name


def test_a_run_gives_photos_for_its_own_token_alone(run, tmp_path):
    """Another token's adapter in it would be scored against the wrong photos, and nobody would see that."""
    assert photos_of(run) == "dogs"
    with pytest.raises(ConfigError, match="cat does not say which photos it was trained on; name them with"):
        photos_of(run / "cat")
    assert photos_of(run / "cat", tmp_path / "cats") == "cats"


def test_settings_that_cannot_be_read_are_not_asked_where_photos_are_given(run, tmp_path):
    """A config.yaml of another version, or of another tool."""
    (run / "config.yaml").write_text("model_name_or_path: somebody/else\n")
    assert photos_of(run, tmp_path / "dogs") == "dogs"
    with pytest.raises(ConfigError, match="model_name_or_path"):
        photos_of(run)
