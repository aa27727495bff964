"""The plot of a comparison: every arm can be told from the others, and found in the legend under its own name."""

from __future__ import annotations

from typing import Any

import pytest

from coeffdiff.evaluation import plots

ARMS = [
    "base",
    "$lora$",
    "_hidden",
    r"coeff\frac",
    *(f"values+lora 3e-4 {number}e-3" for number in range(16)),
]


def score(value: float) -> dict[str, Any]:
    return {"mean": value, "low": value - 0.01, "high": value + 0.01}


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """Of arms that score alike, with names that matplotlib would read as mathematics or leave out."""
    made = []
    new = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda **options: made.append(new(**options)) or made[-1])
    results = {
        "arms": {arm: {"scores": {"dino": score(0.5), "clip_t": score(0.3)}} for arm in ARMS},
        "paired": {
            arm: {"subjects": 3, "scores": {"dino": {"difference": 0.0, "low": -0.1, "high": 0.1}}}
            for arm in ARMS[1:]
        },
        "curves": {},
        "reference": "base",
    }
    plots.draw_comparison(results, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    return made[0]


def test_the_legend_names_every_arm_as_it_is_called(figure):
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ARMS


def test_no_two_arms_look_the_same(figure):
    (legend,) = figure.legends
    looks = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
    assert len(looks) == len(ARMS)


def test_the_legend_covers_neither_panel(figure):
    (legend,) = figure.legends
    below = legend.get_window_extent()
    assert all(axes.get_window_extent().y0 >= below.y1 for axes in figure.axes)
    assert below.x0 >= 0 and below.y0 >= 0 and below.x1 <= figure.bbox.x1
