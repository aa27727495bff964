"""An exponential moving average of what learns, by diffusers' EMAModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from coeffdiff.errors import ResumeError
from coeffdiff.training.trainables import Trainables


class Average:
    """The average of trainables since the first step.

    The first step takes the new values as they are, step n the share 1 - min(decay, n / (9 + n)) of them, so that the
    beginning is soon forgotten.
    """

    def __init__(self, trainables: Trainables, decay: float) -> None:
        self._trainables = trainables
        self._average = EMAModel(trainables.parameters(), decay=decay)

    @property
    def steps(self) -> int:
        return int(self._average.optimization_step)

    def update(self) -> None:
        """After each optimizer step."""
        self._average.step(self._trainables.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU under the names that checkpoints use."""
        names = self._trainables.tensors()
        shadows = self._average.shadow_params
        return {name: s.detach().cpu().clone() for name, s in zip(names, shadows, strict=True)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """The inverse of tensors() and steps. Raises: ResumeError if they are not exactly these."""
        own = self.tensors()
        if own.keys() != tensors.keys() or any(own[k].shape != t.shape for k, t in tensors.items()):
            raise ResumeError(
                "The checkpoint holds no average of what this run trains; it belongs to another run."
            )
        for name, shadow in zip(own, self._average.shadow_params, strict=True):
            shadow.copy_(tensors[name])
        self._average.optimization_step = steps

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the trainables are the average; afterwards they are as they were."""
        before = self._trainables.tensors()
        self._trainables.restore(self.tensors())
        try:
            yield
        finally:
            self._trainables.restore(before)


def average_for(trainables: Trainables, decay: float | None) -> Average | None:
    return None if decay is None else Average(trainables, decay)
