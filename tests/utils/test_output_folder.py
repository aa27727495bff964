"""--output is a folder: a file, a path below a file and a file's name are said by every command, before anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError
from coeffdiff.utils.output_folder import check_output

COMMANDS = {
    "train": ["--images", "photos", "--token", "sks"],
    "sample": ["--prompt", "a", "--adapter", "none"],
    "inspect": ["somewhere"],
    "merge": ["one", "two"],
    "demo": [],
    "evaluate": ["one"],
    "compare": [],
    "batch": ["subjects.yaml"],
    "toy": [],
    "image-text": ["data", "--model", "bart"],
    "classify": ["data", "--model", "vit"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("note.txt", "--output note.txt is a file, and a folder is wanted"),
        ("note.txt/below/it", "--output note.txt/below/it cannot be a folder, since note.txt is a file"),
        ("new/out.PNG", "out.PNG would be one that is called like a .PNG file; name for instance new/out."),
        ("out.safetensors", "called like a .safetensors file; name for instance out."),
    ],
)
def test_a_file_is_no_folder(command, output, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("mine")
    result = CliRunner().invoke(app, [command, *COMMANDS[command], "--output", output])
    assert result.exit_code == 2 and sentence in result.output, result.output
    assert Path("note.txt").read_text() == "mine" and [f.name for f in tmp_path.iterdir()] == ["note.txt"]


def test_every_command_with_an_output_is_in_this_test():
    """But for export, whose output is a file."""
    described = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
    assert {*COMMANDS, "export"} == {
        name for name, of in described.items() if "output" in of.__wrapped__.__annotations__
    }


def test_what_is_a_folder_stays_one(tmp_path):
    """There already, of any name; new ones; a dot that is no file's ending."""
    (tmp_path / "old.png").mkdir()
    for path in (None, tmp_path / "old.png", tmp_path / "run-1.5", tmp_path / "a/b", tmp_path / ("x" * 300)):
        check_output(path)
    with pytest.raises(ConfigError, match="called like"):
        check_output(tmp_path / "new.png")
