"""An output folder that cannot be written into is found first, by every command that writes one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError
from coeffdiff.pocket.world.subjects.named import DEV
from coeffdiff.pocket.world.subjects.photos import write_photos
from coeffdiff.utils import atomic
from coeffdiff.utils.output_folder import refuse_unwritable, why_unwritable


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def read_only(monkeypatch):
    """A disk that takes nothing below `locked`; root may write wherever permissions alone forbid it."""
    real = atomic.tempfile.TemporaryFile
    Path("locked").mkdir()

    def refuse(*args, dir, **more):
        if Path(dir).resolve().is_relative_to(Path("locked").resolve()):
            raise OSError(30, "Read-only file system")
        return real(*args, dir=dir, **more)

    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", refuse)


def test_a_folder_is_tried_where_it_will_be_and_nothing_is_left():
    """A folder that is there, one that will have to be made, one below a file, one of too long a name."""
    Path("note.txt").write_text("a note")
    assert why_unwritable(Path()) is None
    assert why_unwritable(Path("a/b/c")) is None
    assert list(Path().iterdir()) == [Path("note.txt")]
    assert why_unwritable(Path("note.txt/a/b")) == "note.txt is not a folder"
    assert why_unwritable(Path("n" * 300)) == "File name too long"
    with pytest.raises(ConfigError, match=r"The folder note.txt cannot be written: .*Name another --output"):
        refuse_unwritable(Path("note.txt"))


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_permissions_are_told():
    """Of a folder without the permission to write."""
    Path("locked").mkdir(mode=0o555)
    assert why_unwritable(Path("locked/run")) == "Permission denied"


COMMANDS = [
    "train --model pocket --images photos --token ohwx --output locked/x",
    "sample --model pocket --adapter none --prompt ball --output locked/x",
    "inspect adapter --output locked/x",
    "merge adapter adapter --output locked/x",
    "compare --model pocket --subjects dev --output locked/x",
    "toy --output locked/x",
    "demo --output locked/x",
    "image-text data --model bart --output locked/x",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_it_is_found_before_anything_is_computed(read_only, monkeypatch, replace_everywhere, command):
    """One sentence, exit code 2, no weights loaded and nothing written."""
    from coeffdiff.models.loading import load_pipeline

    monkeypatch.setattr(
        "coeffdiff.cli.inspect.adapters_and_scales",
        lambda given, with_scales=True: [(Path("adapter"), None)] * (given != ["none"]),
    )

    load = load_pipeline

    def too_late(*args, parts=None, **options):
        if parts == ():  # the scheduler alone
            return load(*args, parts=parts, **options)
        raise AssertionError("weights are being loaded")

    replace_everywhere(load, too_late)
    if command.startswith("train"):
        write_photos(DEV[0], Path("photos"))
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2, result.exception
    assert "locked/x cannot be written: Read-only file system" in result.output
    assert sorted(Path().rglob("*")) == before
