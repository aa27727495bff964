"""Dropped photos are kept where a person finds them, and take nobody's place."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from coeffdiff.errors import PhotoError
from coeffdiff.ui import photo_store
from coeffdiff.ui.photo_store import store_photos


@pytest.fixture
def dropped(tmp_path, monkeypatch):
    """dropped(name, grey): a file as the page receives it, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def drop(name: str, grey: int = 0) -> Path:
        file = tmp_path / "uploads" / f"{name}-{grey}" / name
        file.parent.mkdir(parents=True)
        if file.suffix == ".png":
            Image.new("L", (8, 8), grey).save(file)
        else:
            file.write_text("a caption")
        return file

    return drop


def test_equal_photos_stay_and_others_get_a_folder_of_their_own(dropped):
    one, other = dropped("a.png"), dropped("a.png", 9)
    first = store_photos([one], "ohwx")
    assert first == Path("runs/photos/ohwx")
    assert store_photos([one], "ohwx") == first
    assert store_photos([other], "ohwx") == Path("runs/photos/ohwx-2")
    assert store_photos([one, dropped("a.txt")], "ohwx") == Path("runs/photos/ohwx-3")
    assert (first / "a.png").read_bytes() == one.read_bytes()
    assert sorted(path.name for path in first.iterdir()) == ["a.png"]


@pytest.mark.parametrize("token", ["../../up", "/root", "..", "a/b", ""])
def test_no_token_leads_out_of_the_folder(dropped, token):
    folder = store_photos([dropped("a.png")], token)
    assert folder.resolve().parent == Path("runs/photos").resolve()


def test_other_files_are_refused(dropped, monkeypatch):
    with pytest.raises(PhotoError, match="There are no photos yet"):
        store_photos([], "ohwx")
    with pytest.raises(PhotoError, match=r"run\.sh is no photo"):
        store_photos([dropped("run.sh")], "ohwx")
    with pytest.raises(PhotoError, match=r"Two files are called b\.png"):
        store_photos([dropped("b.png"), dropped("b.png", 5)], "ohwx")
    monkeypatch.setattr(photo_store, "MOST_FILES", 1)
    with pytest.raises(PhotoError, match="2 files are more"):
        store_photos([dropped("c.png"), dropped("d.png")], "ohwx")
    assert not Path("runs").exists()


def test_photos_that_the_page_has_cleared_are_to_be_dropped_again(dropped):
    one = dropped("a.png")
    folder = store_photos([one], "ohwx")
    one.unlink()
    with pytest.raises(PhotoError, match="drop them again"):
        store_photos([one], "ohwx")
    assert [path.name for path in folder.iterdir()] == ["a.png"]
