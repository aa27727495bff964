"""Which rates are tried, and which are kept."""

from __future__ import annotations

import pytest

from coeffdiff.tasks.arms import DEFAULT_RATES, PARTS
from coeffdiff.tasks.tuning import RANGES, best_try, rates_to_try


@pytest.mark.parametrize("arm", PARTS)
def test_every_arm_has_as_many_tries_inside_the_ranges(arm):
    """The first one is of the defaults; fewer tries are the first of more; all differ."""
    tries = rates_to_try(arm, 9)
    assert tries[0] == {part: DEFAULT_RATES[part] for part in PARTS[arm]}
    assert len({tuple(rates.values()) for rates in tries}) == 9
    for rates in tries:
        assert all(RANGES[part][0] <= rate <= RANGES[part][1] for part, rate in rates.items())
    assert rates_to_try(arm, 4) == tries[:4]


def test_rates_are_tried_jointly():
    """Nine tries of two parts: the upper and the lower half of each range meet both halves of the other."""
    halves = {
        tuple(rates[part] ** 2 > RANGES[part][0] * RANGES[part][1] for part in ("lora", "coeff"))
        for rates in rates_to_try("coeff+lora", 9)
    }
    assert len(halves) == 4


def test_the_best_try_has_the_highest_mean_accuracy():
    """0.6 and 0.8 are more than twice 0.65; of equal ones the lower loss wins, and a loss that is not finite never does."""

    def scores(*pairs):
        return [{"accuracy": accuracy, "loss": loss} for accuracy, loss in pairs]

    assert best_try([scores((0.65, 0.1), (0.65, 0.1)), scores((0.6, 2.0), (0.8, 2.0))]) == 1
    assert best_try([scores((0.5, 2.0)), scores((0.5, 1.0)), scores((0.5, None))]) == 1
