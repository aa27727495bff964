"""How much of what LoRA gains over the base model alpha gains alone, for each group of subjects.

Fidelity is DINO with photos masked. A share is the ratio of the two mean gains; its 95 % interval is bootstrapped over
subjects (percentiles, scipy). `tellable` are subjects that a caption could describe and pocket could draw; how near the
caption alone brings the base model to them, `told` says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SCORE = "dino_masked"
# Group -> plan, alpha's arm in it
GROUPS = {
    "eval": ("core", "coeff"),
    "dev": ("depth", "coeff, 56 layers"),
    "tellable": ("tellable", "coeff"),
}
TOLD = "told"
PLANS = (*(plan for plan, _ in GROUPS.values()), TOLD)

Cell = Mapping[str, Any]


def means(cells: Sequence[Cell], arm: str) -> dict[str, float]:
    """Of an arm, for each subject, over its seeds."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        if cell["arm"] == arm and SCORE in cell["scores"]:
            found.setdefault(cell["subject"], []).append(cell["scores"][SCORE])
    return {subject: statistics.fmean(values) for subject, values in found.items()}


def share(base: Sequence[float], lora: Sequence[float], coeff: Sequence[float]) -> tuple[float, float, float]:
    """Alpha's share of LoRA's gain over subjects in one order, and its interval (NaN for fewer than three)."""
    import numpy as np
    from scipy.stats import bootstrap

    def ratio(alone: Any, beside: Any, axis: int = -1) -> Any:
        return np.mean(alone, axis=axis) / np.mean(beside, axis=axis)

    own, other = np.subtract(coeff, base), np.subtract(lora, base)
    if len(own) < 3:
        return float(ratio(own, other)), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    between = bootstrap((own, other), ratio, paired=True, method="percentile", rng=rng).confidence_interval
    return float(ratio(own, other)), float(between.low), float(between.high)


def table(cells: Mapping[str, Sequence[Cell]]) -> str:
    """A row for each group that has its arms, from the cells of each plan."""
    rows = ["| subjects | base | lora | coeff | coeff's share of lora's gain |", "|---" * 5 + "|"]
    for group, (plan, arm) in GROUPS.items():
        scores = {name: means(cells[plan], name) for name in ("base", "lora", arm)}
        everywhere = sorted(set.intersection(*map(set, scores.values())))
        if everywhere:
            columns = [[of[subject] for subject in everywhere] for of in scores.values()]
            ratio, low, high = share(*columns)
            entries = [
                f"{group}, {len(everywhere)}",
                *(f"{statistics.fmean(column):.3f}" for column in columns),
            ]
            between = f" [{100 * low:.0f}, {100 * high:.0f}]" if math.isfinite(low) else ""
            rows.append("| " + " | ".join([*entries, f"{100 * ratio:.0f} %{between}"]) + " |")
    if told := means(cells[TOLD], "base"):
        rows.append(f"| the same, told, {len(told)} | {statistics.fmean(told.values()):.3f} | | | |")
    return "\n".join(rows)
