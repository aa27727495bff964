"""Figures of steps that nobody has waited for yet: between two flushes nothing waits for a GPU.

(With fp16 every step does: its scaler has to know whether a gradient overflowed.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from coeffdiff.training.collective import on_main
from coeffdiff.training.memory import peak_gib

# Seconds. Several processes hear of Ctrl-C at flushes alone, and torchrun kills them 30 seconds after it
_BETWEEN_FLUSHES = 10.0


@dataclass(frozen=True)
class PendingStep:
    """A step that is done or on its way, and its figures: 0-d tensors, or None."""

    step: int
    means: dict[str, Tensor]  # loss, and loss_prior: what the class's rows came to before their weight
    norms: dict[str, Tensor]  # of the gradients, before clipping
    moved: dict[str, Tensor | None]  # how far each part has come
    rates: list[float]
    skipped: bool


class MetricBuffer:
    """PendingSteps, and when they are to become lines of the log.

    log_every: steps between flushes. Several processes decide at a flush when the next one is.
    """

    def __init__(self, log_every: int, state: PartialState) -> None:
        self._most, self._state = log_every, state
        self._every = log_every if state.num_processes == 1 else 1
        self._steps: list[PendingStep] = []
        self.restart()

    def restart(self) -> None:
        """The time of the next steps counts from here."""
        self._since = time.perf_counter()

    def add(self, step: PendingStep) -> None:
        self._steps.append(step)

    @property
    def due(self) -> bool:
        return len(self._steps) >= self._every

    def flush(self, stop: bool) -> tuple[list[dict[str, Any]], bool, float, float]:
        """Wait for the device once, for all figures of all steps; losses become the mean over all processes.

        Returns: a line for the log for each step; whether any process was asked to stop; seconds a step; peak GiB.
        """
        lines, stop = _lines_of(self._steps, stop, self._state)
        self._steps = []
        seconds = (time.perf_counter() - self._since) / len(lines)
        peak = peak_gib(self._state.device)
        if self._state.num_processes > 1:
            self._every = on_main(self._state, partial(steps_until_flush, seconds, self._most))
        for line in lines:
            line |= {"seconds": round(seconds, 4), "peak_gib": round(peak, 3)}
        return lines, stop, seconds, peak


def steps_until_flush(seconds: float, most: int) -> int:
    """After how many steps, each of so many seconds, several processes flush again: `most`, or fewer slow ones."""
    return max(1, min(most, int(_BETWEEN_FLUSHES / max(seconds, 1e-6))))


def _lines_of(steps: list[PendingStep], stop: bool, state: PartialState) -> tuple[list[dict[str, Any]], bool]:
    means, norms = list(steps[0].means), list(steps[0].norms)
    moved = [name for name, value in steps[0].moved.items() if value is not None]
    table = torch.stack(
        [
            torch.stack([*s.means.values(), *s.norms.values(), *(s.moved[name] for name in moved)]).float()
            for s in steps
        ]
    )
    if state.num_processes > 1:
        of_all = table[:, : len(means)] / state.num_processes
        shared = torch.cat([of_all.flatten(), table.new_tensor([float(stop)])])
        torch.distributed.all_reduce(shared)
        table[:, : len(means)], stop = shared[:-1].view_as(of_all), bool(shared[-1] > 0)
    lines = []
    for one, row in zip(steps, table.tolist(), strict=True):
        of_mean, rest = row[: len(means)], row[len(means) :]
        lines.append(
            {"step": one.step}
            | dict(zip(means, of_mean, strict=True))
            | {"lr": one.rates, "alpha": None}
            | dict(zip(moved, rest[len(norms) :], strict=True))
            | {"grad_norm": dict(zip(norms, rest, strict=False)), "skipped": one.skipped}
        )
    return lines, stop
