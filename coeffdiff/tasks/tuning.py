"""Learning rates to try: as many for each arm, whichever parts it has, so that no arm is tuned harder than another.

The rates of an arm's parts are tried jointly. The first try is of the default rates, the others lie in RANGES as points
of a Sobol sequence, which covers several dimensions more evenly than as many random points, and in each dimension has
more values than a grid has (Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, JMLR 2012).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from coeffdiff.tasks.arms import DEFAULT_RATES, PARTS
from coeffdiff.utils.seeding import stable_seed

Rates = dict[str, float]

RANGES = {"head": (3e-4, 1e-2), "lora": (1e-3, 1e-2), "coeff": (1e-2, 1e-1), "full": (1e-5, 3e-4)}


def rates_to_try(arm: str, tries: int, ranges: Mapping[str, tuple[float, float]] = RANGES) -> list[Rates]:
    """The rates of each try of an arm, logarithmically even in their ranges, with two digits.

    Fewer tries are the first of more.
    """
    parts = PARTS[arm]
    result = [{part: DEFAULT_RATES[part] for part in parts}]
    sobol = torch.quasirandom.SobolEngine(len(parts), scramble=True, seed=stable_seed("rates", arm) % 2**31)
    for point in sobol.draw(tries - 1).tolist() if tries > 1 else ():
        result.append({part: _between(*ranges[part], at) for part, at in zip(parts, point, strict=True)})
    return result


def best_try(tries: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    """Which try to keep.

    Args:
        tries: of each its scores on the validation split, one for every seed: accuracy, and loss or None where it is
            not finite.
    Returns: the index of the highest mean accuracy; of equal ones the lowest mean loss, then the first.
    """

    def merit(index: int) -> tuple[float, float]:
        scores = tries[index]
        accuracy = statistics.fmean(score["accuracy"] for score in scores)
        losses = [score["loss"] for score in scores]
        return round(accuracy, 9), -math.inf if None in losses else -statistics.fmean(losses)

    return max(range(len(tries)), key=merit)


def _between(low: float, high: float, at: float) -> float:
    return float(f"{low * (high / low) ** at:.1e}")
