"""Statistics of cells: means, paired differences with intervals, curves, costs. Plain data in, plain data out.

Subjects are what varies, so they are resampled: seeds of a subject are averaged first, then the mean over
subjects, or over the subjects' differences to the reference arm, gets its 95 % interval from 10,000 bootstrap samples
of subjects. The plain percentiles of ten values hold the truth nine times in ten, not 95 in a hundred; so they are
moved out by as much as makes the interval of normal values Student's (expanded percentiles; Hesterberg, What Teachers
Should Know About the Bootstrap, The American Statistician 2015, section 3.3).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from coeffdiff.training.judge import selection_score

Cell = Mapping[str, Any]
RESAMPLES = 10_000
FEWEST = 6  # subjects for a verdict: by chance all of fewer are of one sign too often (2 / 2**6 is 3 %)
PLACES_KEPT = 0.95  # an adapter that forgets where its subject should be is not the best of its kind
# An arm at one of the rates that it was tried at: "lora 1e-3", "coeff+lora 1e-3 1e-2"
_TRY = re.compile(r"(\S+)(?: \d[\d.]*(?:e[+-]?\d+)?)+")

# Score -> title of its column, and which direction is better
SCORES = {
    "dino": ("DINO", "↑"),
    "dino_masked": ("DINO, photos masked", "↑"),
    "clip_i": ("CLIP-I", "↑"),
    "clip_i_masked": ("CLIP-I, photos masked", "↑"),
    "clip_t": ("CLIP-T", "↑"),
    "place": ("place", "↑"),
    "diversity": ("diversity", "↑"),
    "drift": ("drift", "↓"),
    "drift_class": ("drift, class", "↓"),
    "drift_unrelated": ("drift, unrelated", "↓"),
}


def summarize(
    cells: Sequence[Cell], ends: Mapping[str, tuple[int, float]], reference: str, missing: Sequence[str] = ()
) -> dict[str, Any]:
    """The results that a comparison's page, table and plot show.

    Args:
        cells: as in their files; several points (steps, scale) of an adapter are several cells.
        ends: of all planned arms, in order: the steps and the scale at which an arm is judged.
        missing: names of cells that do not exist yet.
    Returns: reference, missing, failed, and
        arms: for each arm with cells at its end their number and that of subjects, steps and scale, means and intervals
            of the scores, and costs;
        paired: for each other arm the subjects and seeds it has in common with the reference, and for each score the
            mean difference, its interval, on how many subjects it is better, and a verdict;
        curves: for each arm the mean scores at every point, where there are several;
        best: where arms are tries of one (`lora 1e-3`, `lora 3e-3`), which of them has, at which step and scale, the
            best selection score (see training.judge.selection_score), of those that keep 95 % of the places, if any do.
    """
    whole = [cell for cell in cells if not cell.get("failed")]
    of = {arm: [cell for cell in whole if cell["arm"] == arm] for arm in ends}
    final = {arm: [cell for cell in of[arm] if (cell["steps"], cell["scale"]) == ends[arm]] for arm in ends}
    final = {arm: arm_cells for arm, arm_cells in final.items() if arm_cells}
    curves = {arm: curve for arm in ends if (curve := _curve(of[arm]))}
    return {
        "reference": reference,
        "missing": list(missing),
        "failed": [
            f"{cell['subject']}, {cell['arm']}, seed {cell['seed']}: {cell['failed']}"
            for cell in cells
            if cell.get("failed")
        ],
        "arms": {
            arm: _arm(arm_cells) | {"steps": ends[arm][0], "scale": ends[arm][1]}
            for arm, arm_cells in final.items()
        },
        "paired": {
            arm: paired(arm_cells, final[reference])
            for arm, arm_cells in final.items()
            if arm != reference and reference in final
        },
        "curves": {arm: curve for arm, curve in curves.items() if len(curve) > 1},
        "best": _best(curves),
        "made": _made(whole),
    }


def paired(cells: Sequence[Cell], reference: Sequence[Cell]) -> dict[str, Any]:
    """One arm against another, on the subjects and seeds that both have."""
    ours, theirs = ({(cell["subject"], cell["seed"]): cell for cell in some} for some in (cells, reference))
    common = sorted(set(ours) & set(theirs))
    scores = {}
    for name, (_, better) in SCORES.items():
        differences: dict[str, list[float]] = {}
        for subject, seed in common:
            mine, other = (of[subject, seed]["scores"].get(name) for of in (ours, theirs))
            if mine is not None and other is not None:
                differences.setdefault(subject, []).append(mine - other)
        if not differences:
            continue
        sign = 1 if better == "↑" else -1
        scores[name] = difference([statistics.fmean(values) for values in differences.values()], sign)
    return {"subjects": len({subject for subject, _ in common}), "pairs": len(common), "scores": scores}


def difference(values: Sequence[float], sign: int = 1, unit: str = "subjects") -> dict[str, Any]:
    """The mean of paired differences, its interval, how many are better, and a verdict.

    Args:
        values: one for each of what varies (subjects; draws of examples), an arm's less the reference's.
        sign: 1 where more is better, else -1.
        unit: what varies, in the plural, for the words where there are too few of them for a verdict.
    """
    low, high = interval(values)
    return {
        "difference": statistics.fmean(values),
        "low": low,
        "high": high,
        "better_on": sum(sign * value > 0 for value in values),
        "of": len(values),
        "says": _verdict(sign, low, high) if len(values) >= FEWEST else f"too few {unit}",
    }


def interval(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean, by bootstrap over the values; none where there are fewer than three."""
    count = len(values)
    if count < 3:
        return None, None
    drawn = np.random.default_rng(0).integers(count, size=(resamples, count))
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student(count - 1))
    low, high = np.quantile(np.asarray(values)[drawn].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by Fisher's expansion (Abramowitz and Stegun, 26.7.5): for 5 degrees of
    freedom 0.1 % too small, for 2 degrees 4 %."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _verdict(sign: int, low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 0 <= high:
        return "undecided"
    return "better" if sign * low > 0 else "worse"


def _arm(cells: Sequence[Cell]) -> dict[str, Any]:
    """Means over subjects of one arm's cells, a point each."""
    scores = {}
    for name in SCORES:
        by_subject = _by_subject(cells, name)
        if by_subject:
            low, high = interval(by_subject)
            scores[name] = {"mean": statistics.fmean(by_subject), "low": low, "high": high}
    costs = [cell["cost"] for cell in cells if cell.get("cost")]
    names = dict.fromkeys(name for cost in costs for name in cost)
    return {
        "cells": len(cells),
        "subjects": len({cell["subject"] for cell in cells}),
        "scores": scores,
        "cost": {name: statistics.median(cost[name] for cost in costs if name in cost) for name in names},
    }


def _by_subject(cells: Sequence[Cell], name: str) -> list[float]:
    values_of: dict[str, list[float]] = {}
    for cell in cells:
        if name in cell["scores"]:
            values_of.setdefault(cell["subject"], []).append(cell["scores"][name])
    return [statistics.fmean(values) for values in values_of.values()]


def _curve(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Means at every point, of those subjects and seeds that have all points."""
    points: dict[tuple[int, float], dict[tuple[str, int], Cell]] = {}
    for cell in cells:
        points.setdefault((cell["steps"], cell["scale"]), {})[cell["subject"], cell["seed"]] = cell
    everywhere = set.intersection(*(set(cells_at) for cells_at in points.values())) if points else set()
    return [
        {
            "steps": steps,
            "scale": scale,
            "cells": len(everywhere),
            "scores": {
                name: statistics.fmean(values)
                for name in SCORES
                if (values := _by_subject([cells_at[one] for one in everywhere], name))
            },
        }
        for (steps, scale), cells_at in sorted(points.items())
        if everywhere
    ]


def _best(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The best point of the tries of an arm, among the tries that have the most complete cells."""
    tries: dict[str, list[dict[str, Any]]] = {}
    for arm, curve in curves.items():
        points = [{"arm": arm, **point, "choice": selection_score(point["scores"])} for point in curve]
        tried = _TRY.fullmatch(arm)
        tries.setdefault(tried[1] if tried else arm, []).extend(points)
    best = {}
    for family, points in tries.items():
        most = max(point["cells"] for point in points)
        full = [point for point in points if point["cells"] == most]
        keeping = [point for point in full if point["scores"].get("place", 1.0) >= PLACES_KEPT]
        if len({point["arm"] for point in points}) > 1:
            best[family] = max(keeping or full, key=lambda point: point["choice"])
    return best


def _made(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Device, precision, model and versions that cells were computed with, each combination with its cells."""
    ways: dict[str, dict[str, Any]] = {}
    for cell in cells:
        made = {name: value for name, value in cell["made"].items() if name != "date"}
        way = ways.setdefault(repr(sorted(made.items())), {**made, "cells": 0, "dates": []})
        way["cells"] += 1
        way["dates"] = sorted({*way["dates"], cell["made"]["date"]})
    return list(ways.values())
