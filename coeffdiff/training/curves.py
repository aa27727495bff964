"""curves.png: loss, how far alpha moved, and the scores of validation pictures over steps, drawn from log.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coeffdiff.training.step_log import read_log
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.plotting import new_figure
from coeffdiff.utils.text_drawing import GRID, INK, SOFT

CURVES = "curves.png"
_LOSS, _ALPHA = "#3b6ea5", "#b4582a"
# What is drawn of a validation's scores, with colour and name; alone: against the photos without their background.
SCORES = {
    "dino": ("#3b6ea5", "subject (DINO)"),
    "dino_masked": ("#5b3fa0", "subject alone (DINO)"),
    "clip_i": ("#7aa6d6", "subject (CLIP-I)"),
    "clip_i_masked": ("#a58fd6", "subject alone (CLIP-I)"),
    "clip_t": ("#b4582a", "text (CLIP-T)"),
    "score": (INK, "both (geometric mean)"),
}


def draw_curves(log: Path, file: Path, kept: int | None = None) -> None:
    """Draw a run's log; a panel for each of loss, alpha and scores that it has anything to say of.

    Of several subjects the scores are means, and a panel below shows each one's own.

    kept: the step whose adapter is the best so far, marked by a dotted line.
    Raises: OSError if the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    lines = list(read_log(log))
    losses = _series(lines, "loss")
    alphas = _series(lines, "alpha")
    scores = {name: [(s, of[name]) for s, of in _scored(lines) if name in of] for name in SCORES}
    scores = {name: points for name, points in scores.items() if points}
    subjects = _of_subjects(lines)
    drawn = (("loss", losses), ("alpha", alphas), ("scores", scores), ("subjects", subjects))
    panels = [name for name, there in drawn if there]
    if not panels:
        return
    figure = new_figure(
        figsize=(7.2, 0.7 + 2.1 * len(panels)), dpi=110, layout="constrained", facecolor="white"
    )
    axes = dict(zip(panels, figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], strict=True))
    if losses:
        steps, values = zip(*losses, strict=True)
        width = smoothing_width(len(values))
        axes["loss"].plot(steps, values, color=_LOSS, alpha=0.25, linewidth=0.8)
        axes["loss"].plot(steps, smoothed(values, width), color=_LOSS, linewidth=1.8)
        note = f"pale: every step; line: mean over about {width} steps" if width > 1 else "every step"
        _titled(axes["loss"], "loss", note)
    if alphas:
        axes["alpha"].plot(*zip(*alphas, strict=True), color=_ALPHA, linewidth=1.8)
        axes["alpha"].set_ylim(bottom=0)
        _titled(axes["alpha"], "mean |alpha|", "0 is ordinary attention")
    for name, points in scores.items():
        colour, label = SCORES[name]
        style = {"linestyle": "--"} if name == "score" else {}
        axes["scores"].plot(
            *zip(*points, strict=True), color=colour, label=label, marker="o", markersize=4, **style
        )
    if scores:
        _titled(
            axes["scores"],
            "validation",
            "cosine, higher is better" + (f"; best: step {kept}" if kept else ""),
        )
        if kept:
            axes["scores"].axvline(kept, color=SOFT, linewidth=0.8, linestyle=":", zorder=0)
        figure.legend(
            loc="outside lower center", ncols=len(scores) if len(scores) < 5 else 3, frameon=False, fontsize=8
        )
    for token, points in subjects.items():
        axes["subjects"].plot(*zip(*points, strict=True), label=token, marker="o", markersize=4)
    if subjects:
        _titled(axes["subjects"], "each subject", "its own score (geometric mean)")
        axes["subjects"].legend(frameon=False, fontsize=8)
    bottom = axes[panels[-1]]
    bottom.set_xlabel("step", fontsize=9, color=INK)
    bottom.set_xlim(0, max(line["step"] for line in lines) * 1.02)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png")


def smoothing_width(count: int) -> int:
    """Over about how many steps a curve of so many is averaged: a thirtieth of it."""
    return max(1, round(count / 30))


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Exponential means: each value weighs 1 - 1/width of the next; the first are the plain mean of few.

    Without the division by the weights' sum the curve would creep up from zero.
    """
    decay, total, weight, means = 1.0 - 1.0 / width, 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        means.append(total / weight)
    return means


def _series(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) where there is a finite one."""
    found = [(line["step"], line.get(key)) for line in lines]
    return [(step, float(v)) for step, v in found if isinstance(v, int | float) and math.isfinite(v)]


def _scored(lines: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    found = [(line["step"], line.get("scores")) for line in lines]
    return [(step, scores) for step, scores in found if isinstance(scores, dict)]


def _of_subjects(lines: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The score of each of several subjects over the steps, by token."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, scores in _scored(lines):
        for name, value in scores.items():
            if name.endswith("/score") and isinstance(value, int | float):
                found.setdefault(name.removesuffix("/score"), []).append((step, value))
    return found


def _titled(axes: Any, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_title(note, loc="right", fontsize=8, color=SOFT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(labelsize=8, colors=SOFT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
