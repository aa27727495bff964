"""Where captions and masks go, and which photos are left as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from coeffdiff.data.photos import read_photos
from coeffdiff.labelling.places import caption_places, mask_places


def make(folder: Path, *names: str, mode: str = "RGB") -> None:
    for number, name in enumerate(names):
        Image.new(mode, (6, 4), (9 * number + 1, len(names), 3, 9)[: len(mode)]).save(folder / name)


def captions(folder: Path, *, overwrite: bool = False) -> tuple[list[str], dict[str, str]]:
    places = caption_places(read_photos(folder, masks=False).photos, overwrite=overwrite)
    return [place.file.name for place in places.new], {
        kept.photo.path.name: kept.reason for kept in places.kept
    }


def masks(folder: Path, *, overwrite: bool = False) -> tuple[list[str], dict[str, str]]:
    photos = read_photos(folder, masks=False if overwrite else "auto").photos
    places = mask_places(photos, overwrite=overwrite)
    return [place.file.name for place in places.new], {
        kept.photo.path.name: kept.reason for kept in places.kept
    }


def test_photos_of_one_stem_get_files_of_their_own(tmp_path):
    """photo.txt would be that of photo.jpg and photo.png; a mask is no picture that shares it."""
    make(tmp_path, "a.jpg", "a.png", "b.jpg", "c.jpg", "c.jpg.png")
    Image.new("L", (6, 4), 255).save(tmp_path / "b.mask.png")
    expected = ["a.jpg", "a.png", "b", "c", "c.jpg.png"]
    assert captions(tmp_path)[0] == [f"{name}.txt" for name in expected]
    assert masks(tmp_path, overwrite=True)[0] == [f"{name}.mask.png" for name in expected]
    for name in captions(tmp_path)[0]:
        (tmp_path / name).write_text(f"of {name}")
    read = read_photos(tmp_path).photos
    assert [photo.caption for photo in read] == [f"of {name}.txt" for name in expected]


def test_a_caption_of_any_kind_is_kept(tmp_path):
    make(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.caption").write_text("a dog")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "c.jpg", "text": "a dog"}))
    (tmp_path / "d.txt").write_text(" \n")  # no caption: the templates would take its place
    new, kept = captions(tmp_path)
    assert new == ["d.txt", "e.txt"]
    assert kept == dict.fromkeys(("a.jpg", "b.jpg", "c.jpg"), "there is a caption already")
    assert captions(tmp_path, overwrite=True) == ([f"{name}.txt" for name in "abcde"], {})


def test_what_is_no_caption_is_not_lost(tmp_path):
    """A text in no known encoding is replaced when asked for; a folder never; another name that is read first, neither."""
    make(tmp_path, "a.jpg", "b.jpg", "c.jpg", "c.png")
    (tmp_path / "a.txt").write_bytes("собака".encode("koi8-r"))
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "c.txt").write_text("of both")
    new, kept = captions(tmp_path)
    assert (
        new == []
        and "--overwrite replaces it" in kept["a.jpg"]
        and kept["b.jpg"] == "b.txt is not an ordinary file"
    )
    new, kept = captions(tmp_path, overwrite=True)
    assert new == ["a.txt"] and kept["c.png"] == "c.txt would be read before c.png.txt; remove it first"


@pytest.mark.parametrize("name", ["a.mask.png", "a-masklabel.png", "a_mask.png", "a.jpg.mask.webp"])
def test_a_mask_of_any_kind_is_kept(tmp_path, name):
    """And replaced, when asked for, by one that is read before it."""
    make(tmp_path, "a.jpg")
    Image.new("L", (6, 4), 255).save(tmp_path / name)
    assert masks(tmp_path) == ([], {"a.jpg": "there is a mask already"})
    assert masks(tmp_path, overwrite=True) == (["a.mask.png"], {})


def test_an_alpha_channel_is_a_mask(tmp_path):
    make(tmp_path, "a.png", mode="RGBA")
    Image.frombytes("RGBA", (2, 1), bytes((9, 9, 9, 255, 9, 9, 9, 0))).save(tmp_path / "a.png")
    assert masks(tmp_path) == ([], {"a.png": "the alpha channel is the mask"})
    assert masks(tmp_path, overwrite=True)[0] == ["a.mask.png"]


def test_a_mask_that_would_not_be_read_is_not_drawn(tmp_path):
    make(tmp_path, "a.jpg")
    Image.new("L", (6, 4), 255).save(tmp_path / "a.mask.jpg")
    _, kept = masks(tmp_path, overwrite=True)
    assert kept == {"a.jpg": "a.mask.jpg would be read before a.mask.png; remove it first"}
