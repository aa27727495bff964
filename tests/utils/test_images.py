"""PNGs that carry their recipe, labelled grids, and figures."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from coeffdiff import __version__
from coeffdiff.errors import ConfigError
from coeffdiff.utils.figures import Band, figure
from coeffdiff.utils.grids import fitted, labelled_grid
from coeffdiff.utils.png import read_recipe, save_png


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(st.characters(codec=None), max_size=80), negative=st.text(max_size=20))
def test_any_prompt_comes_back_out_of_its_png(tmp_path, prompt, negative):
    """Emoji, quotes, newlines, zero bytes and lone surrogates included."""
    written = {"prompt": prompt, "negative_prompt": negative, "seed": 3, "nested": {"a": [1, None, 0.1]}}
    save_png(Image.new("RGB", (3, 5)), tmp_path / "x.png", written)
    assert read_recipe(tmp_path / "x.png") == written
    with Image.open(tmp_path / "x.png") as image:
        text = image.text["parameters"]
    assert text.startswith(prompt.replace("\0", " ").encode("utf-8", "replace").decode())


def test_the_widespread_form_of_the_parameters(tmp_path):
    """Three lines: prompt, negative prompt, settings; values with commas or colons are quoted."""
    written = {
        "prompt": 'a "red" 🎉',
        "negative_prompt": "blur",
        "seed": 4,
        "steps": 25,
        "guidance": 5.0,
        "scheduler": "DDIMScheduler",
        "width": 64,
        "height": 96,
        "model": "C:\\sdxl",
        "adapters": [{"path": "runs/sks", "scale": 0.5}, {"path": "b", "scale": 1.0}],
    }
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", written)
    with Image.open(tmp_path / "x.png") as image:
        assert set(image.text) == {"coeffdiff", "parameters"}
        assert image.text["parameters"].splitlines() == [
            'a "red" 🎉',
            "Negative prompt: blur",
            'Steps: 25, Sampler: DDIM, CFG scale: 5.0, Seed: 4, Size: 64x96, Model: "C:\\\\sdxl", '
            f"Adapters: runs/sks at 0.5; b at 1, Version: coeffdiff {__version__}",
        ]


def test_a_file_without_our_recipe_is_refused(tmp_path):
    """Another tool's PNG, a JPEG, damaged bytes, JSON that is none, and nothing at all."""
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "broken.png").write_bytes((tmp_path / "plain.png").read_bytes()[:20])
    save_png(Image.new("RGB", (8, 8)), tmp_path / "grid.png")
    with pytest.raises(ConfigError, match=r"plain.png carries no recipe"):
        read_recipe(tmp_path / "plain.png")
    with pytest.raises(ConfigError, match=r"grid.png carries no recipe"):
        read_recipe(tmp_path / "grid.png")
    for name in ("photo.jpg", "broken.png"):
        with pytest.raises(ConfigError, match=f"{name} is not a PNG with a readable recipe"):
            read_recipe(tmp_path / name)
    with pytest.raises(ConfigError, match="There is no picture"):
        read_recipe(tmp_path / "none.png")


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """One sentence, the old picture as it was, and no temporary file."""

    def full_disk(_image, path, **_options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "x.png"
    file.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full_disk)
        with pytest.raises(
            ConfigError, match=r"The picture .*x.png cannot be written: No space left on device"
        ):
            save_png(Image.new("RGB", (8, 8)), file)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"old"
    with pytest.raises(ConfigError, match=r"x.png.y.png cannot be written"):
        save_png(Image.new("RGB", (8, 8)), file / "y.png")


def filled(colour: str, size=(64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_a_grid_of_known_pictures():
    """Two rows of 3 and 1: pictures at their places, grey where one is missing, labels in ink on their margins."""
    rows = [("first", [filled("red"), None, filled("blue")]), ("second", [filled("lime")])]
    grid = np.asarray(labelled_grid(rows, ["a", "b", "c"], cell=64))
    height, width, _ = grid.shape
    assert width == 8 + 150 + 8 + 3 * (64 + 8)
    assert height == 8 + 18 + 8 + 2 * (64 + 8)
    left, top = 8 + 150 + 8, 8 + 18 + 8
    expected = [[(255, 0, 0), (236,) * 3, (0, 0, 255)], [(0, 255, 0), (236,) * 3, (236,) * 3]]
    for row, colours in enumerate(expected):
        for column, colour in enumerate(colours):
            y, x = top + row * 72, left + column * 72
            assert (grid[y : y + 64, x : x + 64] == colour).all()
    assert (grid[top : top + 64, :150] < 100).any() and (grid[top + 72 : top + 136, :150] < 100).any()
    for column in range(3):
        assert (grid[8 : top - 8, left + column * 72 : left + column * 72 + 64] < 100).any()


def test_labels_stay_in_their_margin():
    """A long prompt is wrapped, an endless word broken, too much text cut; the picture's columns are untouched."""
    for label in ("a photo of " * 60, "w" * 900, "猫" * 300, "line\n" * 40):
        grid = np.asarray(labelled_grid([(label, [filled("red", (128, 128))])], cell=128))
        assert grid.shape[0] == 8 + 128 + 8
        assert (grid[:, 8 + 150 : 8 + 150 + 8] == 255).all()
        assert (grid[8:136, 166:294] == (255, 0, 0)).all()


@pytest.mark.parametrize("text", ["猫と犬", "кот 🎉", "قط", "\0\x1b[0m", "\ud800", "", "  ", "é" * 3])
def test_labels_in_any_script_do_not_crash(text):
    """Row, column and title alike."""
    grid = labelled_grid([(text, [filled("red")])], [text], title=text, cell=64)
    assert grid.width >= 64


def test_pictures_are_fitted_into_their_cells():
    """Large ones shrink to the cell, small ones grow by whole pixels, shapes are kept, modes do not matter."""
    assert fitted(filled("red", (1024, 512)), 256).size == (256, 128)
    assert fitted(filled("red", (100, 50)), 256).size == (200, 100)
    assert fitted(filled("red", (200, 50)), 256).size == (200, 50)
    assert fitted(Image.new("LA", (4096, 1)), 64).size == (64, 1)
    assert fitted(filled("red", (100, 50)), 256, smoothly=True).size == (256, 128)


def test_an_empty_grid_is_a_picture():
    """No rows, or rows without pictures."""
    assert labelled_grid([]).width > 0
    assert labelled_grid([("nothing", [])], title="empty").height > 0


def test_a_figure_of_known_pictures():
    """Three pictures of a cell, then two a quarter larger: at their places on light paper, words above them."""
    rows = [
        Band("first", [filled("red"), filled("lime"), filled("blue")], "a note", ["a", "b", "c"]),
        Band("second", [filled("red", (256, 256)), filled("blue", (256, 256))]),
    ]
    sheet = np.asarray(figure(rows, title="Title", facts="facts", footer="footer", cell=100)).astype(int)
    paper = sheet[0, 0]
    assert (paper > 240).all()
    assert sheet.shape[1] == 16 + 3 * 100 + 2 * 6 + 16
    lime = (sheet == (0, 255, 0)).all(2)
    top, left = np.argwhere(lime)[0]
    assert (left, lime.sum()) == (16 + 106, 100 * 100)
    assert (sheet[top : top + 100, 16:116] == (255, 0, 0)).all()
    assert (sheet[top : top + 100, 228:328] == (0, 0, 255)).all()
    for column in (16, 122, 228):
        assert (sheet[top - 20 : top, column : column + 100] < 100).any()
    below = sheet[top + 100 :]
    red = np.argwhere((below == (255, 0, 0)).all(2))
    assert (red.max(0) - red.min(0) + 1 == 125).all() and red[0][1] == 16
    assert (below[red[0][0], 16 + 131 : 16 + 131 + 125] == (0, 0, 255)).all()
    assert (below[red.max(0)[0] + 1 :] < 200).any()  # the footer


def test_words_of_a_figure_stay_on_it():
    """Whatever its length and script, text keeps to the width; the same figure is made twice."""
    for text in ("words " * 200, "w" * 900, "猫" * 300, "", "line\n" * 40, "\0\ud800"):
        rows = [Band(text, [filled("red")], text, [text])]
        made = [figure(rows, title=text, facts=text, footer=text, cell=128) for _ in range(2)]
        assert made[0].tobytes() == made[1].tobytes()
        sheet = np.asarray(made[0]).astype(int)
        assert sheet.shape[1] == 128 + 2 * 20
        assert (sheet[:, :10] == sheet[0, 0]).all() and (sheet[:, -10:] == sheet[0, 0]).all()
    for rows in ([], [Band("empty", [])]):
        assert figure(rows, title="nothing").width > 256
