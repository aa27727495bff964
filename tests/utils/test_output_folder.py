"""--output is a folder: a file, a path below a file and a file's name are said by every command, before anything.
Of commands that run at once each has a folder of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError
from coeffdiff.utils.distributed import DistributedContext
from coeffdiff.utils.locks import try_lock
from coeffdiff.utils.output_folder import check_output, hold, output_folder

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


def test_commands_that_begin_at_once_get_numbers_of_their_own(tmp_path):
    """Eight that look at the same moment; a number that is there already is left out."""
    (tmp_path / "003").mkdir()
    ready = Barrier(8, timeout=30)

    def take(_: int) -> str:
        ready.wait()
        with output_folder(None, tmp_path) as folder:
            ready.wait()
            return folder.name

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(take, range(8))) == [f"{n:03d}" for n in (1, 2, 4, 5, 6, 7, 8, 9)]


def test_a_named_folder_is_held(tmp_path):
    """The second command is refused, and leaves the first one's folder, empty as it still is."""
    with output_folder(tmp_path / "a" / "b", tmp_path) as folder:
        with (
            pytest.raises(ConfigError, match=r"Another command is at work in .*b; .* --output"),
            hold(folder),
        ):
            pass
        assert folder.is_dir()
    with hold(folder), try_lock(folder) as mine:
        assert mine is not True


@pytest.mark.parametrize("named", [None, "out/here"])
def test_a_command_that_fails_leaves_no_empty_folder(named, tmp_path):
    """Nor the folders above, as far as they were made for it; what was there, or holds something, stays."""
    parent, named = tmp_path / "numbers", tmp_path / named if named else None

    def fail(write: bool = False) -> None:
        with pytest.raises(KeyError), output_folder(named, parent) as folder:
            if write:
                (folder / "picture.png").touch()
            raise KeyError

    fail()
    assert [*tmp_path.iterdir()] == []
    (named or parent).mkdir(parents=True)
    fail()
    assert (named or parent).is_dir() and [*(named or parent).iterdir()] == []
    fail(write=True)
    assert [file.name for file in (named or parent).rglob("*.png")] == ["picture.png"]


def test_only_the_main_process_of_a_launch_chooses(tmp_path):
    """The others are told, make nothing and hold nothing."""

    class Second(DistributedContext):
        is_main = False

        def gather(self, item):
            assert item is None
            return [tmp_path / "007", item]

    with output_folder(None, tmp_path, Second()) as folder:
        assert folder == tmp_path / "007"
    assert [*tmp_path.iterdir()] == []


def test_a_place_that_cannot_hold_folders_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), output_folder(None, tmp_path / "file"):
        pass
