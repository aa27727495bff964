"""What the page asks is what the command line would ask."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError
from coeffdiff.ui.form import NUMBERS, OPTIONS, Form
from coeffdiff.ui.presets import find_presets


def test_a_form_is_the_command_line_of_the_same_fields(tmp_path, monkeypatch):
    """Its arguments, read by `train`, give the settings that the page checks."""
    preset = tmp_path / "own.yaml"
    preset.write_text("training: {seed: 7, accumulate: 3}\nmethod: {kind: lora}\n")
    form = Form(
        str(tmp_path), "ohwx", "stuffed animal", "pocket", str(preset), "coeff", "12", " 64", "",
        "validation.every=5\n\n method.coeff.dropout=0 ",
    )  # fmt: skip
    given = {}
    monkeypatch.setattr(
        "coeffdiff.training.loop.train", lambda settings, resume: given.update(settings=settings)
    )
    result = CliRunner().invoke(app, ["train", *form.arguments()])
    assert given["settings"] == form.settings(), result.output
    read = form.settings()
    assert (read.training.steps, read.training.seed, read.training.accumulate) == (12, 7, 3)
    assert (read.method.kind, read.method.coeff.dropout, read.validation.every) == ("coeff", 0, 5)


def test_a_value_that_looks_like_an_option_is_a_value(tmp_path):
    """A token of `--resume` would otherwise resume a run."""
    assert "--token=--resume" in Form(str(tmp_path), "--resume").arguments()
    assert Form(str(tmp_path), "--resume").settings().subject.token == "--resume"


def test_an_empty_form_asks_for_nothing():
    assert Form("").arguments() == []
    assert set(OPTIONS) | set(NUMBERS) < set(Form.__dataclass_fields__)


def test_what_settings_refuse_is_refused_here(tmp_path):
    with pytest.raises(ConfigError, match=r"training\.stepz"):
        Form(str(tmp_path), "ohwx", more="training.stepz=3").settings()
    with pytest.raises(ConfigError, match=r"training\.steps .*many"):
        Form(str(tmp_path), "ohwx", steps="many").settings()


def test_presets_of_the_working_folder_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "pocket.yaml").write_text("model: {name: pocket}\n")
    found = find_presets()
    assert found["pocket"] == "configs/pocket.yaml"
    assert found["sdxl-8gb"].endswith("sdxl-8gb.yaml")


def test_a_preset_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("training: {seed: 7}\n")
    form = Form(str(tmp_path), "ohwx", preset="~/own.yaml")
    assert form.settings().training.seed == 7
    assert f"--config={tmp_path / 'own.yaml'}" in form.arguments()
    with pytest.raises(ConfigError, match=r"The preset \$NOWHERE/x\.yaml .*not expanded"):
        Form("", preset="$NOWHERE/x.yaml").settings()
