"""What alpha brings by how many attention layers have it, and what a line through that says of a deeper model.

Arms of such a plan are called `coeff, 14 layers` or `coeff+lora, 14 layers`; the first kind is held against `base`, the
second against `lora`. Each subject has a line of its own by least squares, gain = a + b log2(layers). Subjects are what
varies, so all intervals are bootstrapped over them.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SDXL_LAYERS = 140
SHOWN = ("dino_masked", "clip_t")
AGAINST = {"coeff": "base", "coeff+lora": "lora"}
_ARM = re.compile(r"(coeff|coeff\+lora), (\d+) layers")

Cell = Mapping[str, Any]
Gains = dict[str, dict[int, float]]
"""Of each subject, by the number of layers, what an arm scores above the one it is held against."""


def gains(cells: Sequence[Cell], ends: Mapping[str, tuple[int, float]], method: str, score: str) -> Gains:
    """Means over seeds, of those subjects that have every number of layers of the plan."""
    own = {
        (cell["arm"], cell["subject"], cell["seed"]): cell["scores"][score]
        for cell in cells
        if (cell["steps"], cell["scale"]) == ends[cell["arm"]] and score in cell["scores"]
    }
    found: dict[str, dict[int, list[float]]] = {}
    for (arm, subject, seed), value in own.items():
        named, other = _ARM.fullmatch(arm), own.get((AGAINST[method], subject, seed))
        if named and named[1] == method and other is not None:
            found.setdefault(subject, {}).setdefault(int(named[2]), []).append(value - other)
    every = sorted({int(named[2]) for arm in ends if (named := _ARM.fullmatch(arm)) and named[1] == method})
    return {
        subject: {layers: statistics.fmean(of[layers]) for layers in every}
        for subject, of in sorted(found.items())
        if set(of) == set(every)
    }


def fitted(of: Mapping[int, float]) -> tuple[float, float]:
    """Slope for a doubling of the layers, and the gain that the line has at SDXL's."""
    slope, constant = np.polyfit(np.log2(list(of)), list(of.values()), 1)
    return float(slope), float(constant + slope * np.log2(SDXL_LAYERS))


def with_interval(difference: Mapping[str, Any]) -> str:
    """A mean paired difference as tables show it, with its interval if it has one."""
    if difference["low"] is None:
        return f"{difference['difference']:+.3f}"
    return "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)


def table(cells: Sequence[Cell], ends: Mapping[str, tuple[int, float]]) -> str:
    """A row for each method and score: the gain at each number of layers, by doubling, and on the line at SDXL's."""
    from coeffdiff.evaluation.statistics import SCORES, difference

    def shown(values: Sequence[float]) -> str:
        return with_interval(difference(values))

    found = {(method, score): gains(cells, ends, method, score) for method in AGAINST for score in SHOWN}
    found = {key: by_subject for key, by_subject in found.items() if by_subject}
    every = sorted({layers for by_subject in found.values() for of in by_subject.values() for layers in of})
    heads = [*(f"{n} layers" for n in every), "a doubling", "", f"the line at {SDXL_LAYERS}"]
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for (method, score), by_subject in found.items():
        slopes, ends_at = zip(*map(fitted, by_subject.values()), strict=True)
        entries = [f"{method} - {AGAINST[method]}, {SCORES[score][0]}"]
        at = {layers: [of[layers] for of in by_subject.values() if layers in of] for layers in every}
        entries += [shown(at[layers]) if at[layers] else "" for layers in every]
        entries += [shown(slopes), difference(slopes)["says"], shown(ends_at)]
        rows.append("| " + " | ".join(entries) + " |")
    return "\n".join(rows)


def draw(cells: Sequence[Cell], ends: Mapping[str, tuple[int, float]], file: Path) -> None:
    """A panel for each score: gains over layers on a doubling scale, the mean line, and its interval up to SDXL's."""
    from coeffdiff.evaluation.statistics import SCORES
    from coeffdiff.utils.plotting import new_figure
    from coeffdiff.utils.text_drawing import GRID, INK, SOFT

    figure = new_figure(figsize=(11, 4.4), dpi=110, layout="constrained", facecolor="white")
    for axes, score in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        ticks = {SDXL_LAYERS}
        for method, colour in zip(AGAINST, ("#3b6ea5", "#b4582a"), strict=True):
            if by_subject := gains(cells, ends, method, score):
                ticks |= set(_draw_method(axes, by_subject, f"{method} - {AGAINST[method]}", colour))
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axvline(SDXL_LAYERS, color=SOFT, linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [str(layers) for layers in sorted(ticks)])
        axes.set_xlabel("attention layers with alpha; dotted: SDXL's")
        axes.set_title(f"gain in {SCORES[score][0]}", loc="left", fontsize=11, color=INK)
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=SOFT, labelsize=8)
        axes.legend(frameon=False, fontsize=8)
    with file.open("wb") as handle:
        figure.savefig(handle, format="png")


def _draw_method(axes: Any, by_subject: Gains, label: str, colour: str) -> list[int]:
    """Thin lines through each subject's gains, dots at their means, the mean of the fitted lines with its interval.

    Returns: the numbers of layers.
    """
    from coeffdiff.evaluation.statistics import interval

    layers = list(next(iter(by_subject.values())))
    for of in by_subject.values():
        axes.plot(layers, list(of.values()), color=colour, alpha=0.25, linewidth=0.8)
    means = [statistics.fmean(of[n] for of in by_subject.values()) for n in layers]
    axes.plot(layers, means, "o", color=colour, label=label)
    along = np.geomspace(layers[0], SDXL_LAYERS, 40)
    fits = [np.polyfit(np.log2(layers), list(of.values()), 1) for of in by_subject.values()]
    values = np.array([np.polyval(fit, np.log2(along)) for fit in fits])
    axes.plot(along, values.mean(0), color=colour)
    if len(values) > 2:
        low, high = np.array([interval(list(column)) for column in values.T], dtype=float).T
        axes.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
    return layers
