"""Trainings that broke down on the way: their loss is a number still, but has risen for good."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

# A mean over fewer samples says little: noise and timesteps spread their losses by about as much as the mean is
_SAMPLES, _PARTS = 128, 10
# Of some 60 trainings on pocket those that broke down ended at 3.8 times their lowest mean or above, others below 1.3
_TIMES = 2.0


@dataclass(frozen=True)
class Breakdown:
    """From a step on a training's loss was no more what it had been. before, after: its lowest mean, and the last."""

    step: int
    before: float
    after: float

    def __str__(self) -> str:
        return f"from about step {self.step} on the loss rose from {self.before:.3g} to {self.after:.3g}"

    def advice(self, rates: Mapping[str, float | str]) -> str:
        """A sentence for the user. rates: of what learns, by setting."""
        named = " or ".join(f"{name} ({rate})" for name, rate in rates.items())
        return f"{self}: this training broke down. Start anew with a lower {named}, or with fewer steps"


def find_breakdown(lines: Iterable[Mapping[str, Any]], samples_a_step: int) -> Breakdown | None:
    """Of the lines of a log.jsonl, by means over a tenth of them, and over 128 samples at least."""
    losses = [(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), int | float)]
    width = max(math.ceil(_SAMPLES / samples_a_step), len(losses) // _PARTS)
    parts = [losses[end - width : end] for end in range(len(losses), width - 1, -width)][::-1]
    if len(parts) < 2:
        return None
    means = [fmean(loss for _, loss in part) for part in parts]
    lowest = min(means[:-1])
    if means[-1] < _TIMES * lowest:
        return None
    calm = max(number for number, mean in enumerate(means) if mean < _TIMES * lowest)
    return Breakdown(parts[calm + 1][0][0], lowest, means[-1])
