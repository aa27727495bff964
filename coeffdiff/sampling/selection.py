"""Which adapters draw, at which scales or steps. Loads no torch, so that the command line can build it quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Selection:
    """adapters: folders and scales (None: the adapter's recommended one), loaded together; empty: the bare model.

    scales: of the first adapter, at each of which everything is drawn; (None,): at its own.
    steps: of one run, one for each of `adapters`, which are then loaded one after the other; empty: no steps.
    """

    adapters: tuple[tuple[Path, float | None], ...] = ()
    scales: tuple[float | None, ...] = (None,)
    steps: tuple[int, ...] = ()
