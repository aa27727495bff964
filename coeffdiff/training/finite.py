"""Losses, gradients and adapters that are not finite end a run before anything is saved of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from coeffdiff.errors import NonFiniteLoss
from coeffdiff.training.blame import first_not_finite
from coeffdiff.training.checkpoints import last_good
from coeffdiff.training.run_folder import RunFolder

# Steps in a row that an fp16 scaler may skip: it halves its scale at each, and begins at 2^16
MOST_OVERFLOWS = 40


def check_finite(
    line: Mapping[str, Any],
    run: RunFolder,
    precision: str,
    overflowed: int,
    cause: Callable[[int, list[str]], str],
) -> None:
    """Raises: NonFiniteLoss for a step of the log with a loss or gradient that is not finite.

    Args:
        line: of log.jsonl.
        overflowed: steps in a row that an fp16 scaler has skipped, this one included.
        cause: of a step and the names of its groups of parameters, what is at fault.
    """
    step, groups = line["step"], list(line["grad_norm"])
    if overflowed > MOST_OVERFLOWS:
        raise NonFiniteLoss(
            f"The gradient has overflowed in fp16 at each of the last {overflowed} steps, so nothing is learned: try "
            f"--set training.precision=bf16. {_last_good(run)}"
        )
    # With fp16 a gradient that overflows is the scaler's business: it skips the step and lowers its scale.
    if math.isfinite(line["loss"]) and (
        precision == "fp16" or all(map(math.isfinite, line["grad_norm"].values()))
    ):
        return
    what = "loss" if not math.isfinite(line["loss"]) else "gradient"
    raise NonFiniteLoss(f"The {what} is not finite at step {step}; {cause(step, groups)}. {_last_good(run)}")


def check_learned(tensors: Mapping[str, Tensor], step: int, run: RunFolder) -> None:
    """Nothing that is not finite is ever saved: the step that the optimizer has just made may have overflowed."""
    broken = first_not_finite(tensors.items())
    if broken:
        raise NonFiniteLoss(
            f"{broken} is not finite after step {step}: the learning rate is too high. {_last_good(run)}"
        )


def _last_good(run: RunFolder) -> str:
    return last_good(run) or "No checkpoint had been written yet."
