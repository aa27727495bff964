"""A comparison as one plot: fidelity against alignment of all arms, and their differences to the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coeffdiff.evaluation.statistics import SCORES
from coeffdiff.utils.plotting import new_figure
from coeffdiff.utils.text_drawing import GRID, INK, SOFT

_COLOURS = (SOFT, "#3b6ea5", "#b4582a", "#4d8b57", "#8a5aa5", "#b59a2b", "#2b9aa5", "#a53b6e")
_MARKERS = "osD^vPXp"
# Scores whose differences to the reference are drawn
_PAIRED = ("dino", "clip_i", "clip_t", "place", "diversity", "drift")


def draw_comparison(results: Mapping[str, Any], file: Path) -> None:
    """Left: mean fidelity (DINO) against mean alignment (CLIP-T), with intervals over subjects, a line
    through an arm's steps and a dotted one through its scales. Right: paired differences to the reference arm.

    Raises: OSError if the file cannot be written.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(figsize=(11, 4.8), dpi=110, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    looks: dict[str, dict[str, Any]] = {
        # The ninth arm has the first one's colour, with another marker
        arm: {"color": _COLOURS[i % 8], "marker": _MARKERS[(i + i // 8) % 8]}
        for i, arm in enumerate(results["arms"])
    }
    _draw_trade(left, results, looks)
    _draw_paired(right, results, looks)
    # One legend below both, since arms that score alike lie on each other
    points = [Line2D([], [], linestyle="none", **look) for look in looks.values()]
    columns = 130 // (max(map(len, looks), default=0) + 7)  # of letters, with room for the marker
    legend = figure.legend(
        points, looks, loc="outside lower center", ncols=max(1, columns), frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    with file.open("wb") as handle:
        figure.savefig(handle, format="png")


def _draw_trade(axes: Any, results: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    for arm, means in results["arms"].items():
        scores = means["scores"]
        x, y = scores.get("clip_t"), scores.get("dino")
        if not x or not y:
            continue
        look = looks[arm]
        for line, style in _lines(results["curves"].get(arm, ())):
            axes.plot(
                *zip(*line, strict=True), color=look["color"], linewidth=1, alpha=0.6, marker=".", **style
            )
        axes.errorbar(
            x["mean"], y["mean"], xerr=_error(x), yerr=_error(y), **look, markersize=8, elinewidth=1,
            capsize=2, linestyle="none",
        )  # fmt: skip
    _plain(axes, "fidelity against alignment", "bars: 95 % over subjects")
    axes.set_xlabel("text alignment (CLIP-T)")
    axes.set_ylabel("subject fidelity (DINO)")
    axes.grid(color=GRID, linewidth=0.8)


def _lines(curve: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[tuple[float, float]], dict[str, Any]]]:
    """An arm's points over its steps, at the scale nearest to 1, and dotted over its scales, at the last step."""
    whole = [point for point in curve if "clip_t" in point["scores"]]
    if not whole:
        return
    last = max(point["steps"] for point in whole)
    scale = min((point["scale"] for point in whole), key=lambda scale: abs(scale - 1.0))
    over_steps = [point["scores"] for point in whole if point["scale"] == scale]
    over_scales = [point["scores"] for point in whole if point["steps"] == last]
    for scores, style in ((over_steps, {}), (over_scales, {"linestyle": ":"})):
        yield [(of["clip_t"], of["dino"]) for of in scores], style


def _draw_paired(axes: Any, results: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    arms = list(results["paired"])
    names = [n for n in _PAIRED if any(n in results["paired"][arm]["scores"] for arm in arms)]
    ticks = []
    for row, name in enumerate(names):
        ticks.append((row, f"{SCORES[name][0]} {SCORES[name][1]}"))
        for place, arm in enumerate(arms):
            found = results["paired"][arm]["scores"].get(name)
            if not found:
                continue
            y = row + 0.7 * ((place + 0.5) / len(arms) - 0.5)
            axes.errorbar(
                found["difference"], y, xerr=_error(found, "difference"), **looks[arm], markersize=5,
                elinewidth=1.4, capsize=2, linestyle="none",
            )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks([row for row, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color=GRID, linewidth=0.8)
    counts = sorted({found["subjects"] for found in results["paired"].values()})
    subjects = " to ".join(str(n) for n in counts[:1] + counts[1:][-1:]) or "no"
    _plain(axes, f"difference to {results['reference']}", f"{subjects} subjects, paired, 95 %")


def _error(score: Mapping[str, Any], centre: str = "mean") -> list[list[float]] | None:
    if score["low"] is None:
        return None
    return [[max(0.0, score[centre] - score["low"])], [max(0.0, score["high"] - score[centre])]]


def _plain(axes: Any, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, parse_math=False)
    axes.set_title(note, loc="right", fontsize=8, color=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=8)
