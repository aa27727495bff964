"""~ is the home folder wherever a path can be given; variables of the environment are not expanded, and that is said."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from coeffdiff.config.annotations import fields_of, union_members
from coeffdiff.config.loading import load_section, load_settings
from coeffdiff.config.nested import as_tree
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import save_settings, with_values
from coeffdiff.errors import AdapterError, ConfigError
from coeffdiff.evaluation.comparison_plan import Comparison
from coeffdiff.method.adapter_paths import find_adapter
from coeffdiff.utils.paths import expanded, path_argument

# Every setting that may be a path; a new one belongs here, or its name into the list of those that are none
PATHS = {
    Settings: ["model.name", "model.vae", "model.config", "subject.images", "photos.cache", "prior.images",
               "validation.dino", "validation.clip", "output"],
    Comparison: ["model.name", "model.vae", "model.config", "subjects", "prompts", "dino", "clip"],
}  # fmt: skip
WORDS = {
    Settings: ["model.variant", "subject.token", "subject.class_word", "method.coeff.backend", "method.token.init",
               "tracking.project", "training.optimizer"],
    Comparison: ["model.variant", "token", "class_word", "reference"],
}  # fmt: skip
CASES = [(kind, name) for kind, names in PATHS.items() for name in names]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def at(settings, name):
    value = as_tree(settings)
    for part in name.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("kind", PATHS)
def test_every_setting_that_is_text_is_a_path_or_known_to_be_none(kind):
    """So that a new one cannot forget its ~."""
    texts = [
        name for name, field in fields_of(kind) if {str, Path}.intersection(union_members(field.annotation))
    ]
    assert sorted(texts) == sorted([*PATHS[kind], *WORDS[kind]])


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_home_is_expanded_in_every_path_of_every_source(home, kind, name):
    """YAML nested and dotted, --set, flags; stored and read again it is the same."""
    extra = ["prior.weight=1"] if name == "prior.images" else []
    Path("my.yaml").write_text(f"{name}: ~/x y\n")
    for given in (
        load_section(kind, Path("my.yaml"), None, extra),
        load_section(kind, None, {name: "~/x y"}, extra),
        load_section(kind, None, None, [*extra, f"{name}=~/x y"]),
    ):
        assert at(given, name) == str(home / "x y")
        save_settings(given, Path("stored.yaml"))
        assert load_section(kind, Path("stored.yaml")) == given
    assert not Path("~").exists()


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("path", ["$HOME/x", "${HOME}/x", "%USERPROFILE%\\x", "a/$RUNS-1", "~nobody-here/x"])
def test_what_is_not_expanded_says_so(kind, name, path):
    extra = ["prior.weight=1"] if name == "prior.images" else []
    with pytest.raises(ConfigError) as caught:
        load_section(kind, None, None, [*extra, f"{name}={path}"])
    said = str(caught.value)
    assert name in said and path.replace("\\", "\\\\") in said
    assert "no user 'nobody-here'" in said or "are not expanded; write the whole path" in said


def test_what_is_called_so_is_found(home):
    """A folder named $HOME, ~me or ~ in the working directory; ./~ stays there, read as often as one likes."""
    for name in ("$HOME", "~me", "~", "caf%C3%A9"):
        Path(name).mkdir()
    assert expanded("$HOME/new") == "$HOME/new"
    assert expanded("~me") == "~me"
    assert expanded("caf%C3%A9") == "caf%C3%A9" and expanded("50%") == "50%" and expanded("a$") == "a$"
    stays = load_settings(None, {"output": "./~/a"})
    assert stays.output == Path.cwd() / "~" / "a"
    assert with_values(stays, {"training.steps": 3}).output == stays.output
    assert expanded("~") == str(home) and expanded("auto") == "auto" and expanded(None) is None


def test_an_adapter_named_from_python_is_expanded(home):
    with pytest.raises(AdapterError, match=f"There is no adapter {home}/runs/a"):
        find_adapter("~/runs/a")
    with pytest.raises(AdapterError, match="are not expanded"):
        find_adapter(Path("$HOME/runs/a"))


def test_scripts_expand_their_paths_too(home):
    """Shells leave --output=~/x as it is."""
    assert path_argument("~/x") == home / "x"
    with pytest.raises(argparse.ArgumentTypeError, match="are not expanded"):
        path_argument("$HOME/x")
    scripts = (Path(__file__).parents[2] / "scripts").glob("*.py")
    forgetful = [
        file.name
        for file in scripts
        if re.search(r"type=Path\b(?!.*SUPPRESS)", file.read_text(encoding="utf-8"))
    ]
    assert forgetful == []
