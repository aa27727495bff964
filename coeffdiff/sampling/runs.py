"""Runs and their steps: the newest run, and the adapters that a run keeps. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from coeffdiff.errors import AdapterError
from coeffdiff.method.adapter_paths import COEFF_FILE, kept_steps


def find_newest_run(runs: Path) -> Path:
    """The run under `runs` whose adapter is the newest. Raises: AdapterError if none has one."""
    finished = [file for file in runs.glob(f"*/adapter/{COEFF_FILE}") if file.is_file()]
    if finished:
        return max(finished, key=lambda file: (file.stat().st_mtime_ns, str(file))).parents[1]
    begun = sorted(config.parent for config in runs.glob("*/config.yaml"))
    if begun:
        raise AdapterError(
            f"No run under {runs} has finished yet ({', '.join(str(run) for run in begun[:3])}): continue one with "
            "coeffdiff train --resume, or name an adapter."
        )
    raise AdapterError(
        f"There is no finished run under {runs}: train one with coeffdiff train --images photos/ --token ohwx, or "
        "name an adapter."
    )


def steps_of(path: str) -> tuple[Path, dict[int, Path]]:
    """The run of a run or adapter folder, and the adapters that it keeps, by step. Raises: AdapterError for none."""
    given = Path(path)
    run = next((place for place in (given, given.parent) if (place / "config.yaml").is_file()), None)
    if run is None:
        step = re.fullmatch(r"(.+)@(\w+)", path)
        hint = f"; {step[1]} has all its steps" if step and Path(step[1]).is_dir() else ""
        raise AdapterError(f"--checkpoints needs a run folder, and {path} is none{hint}.")
    kept = kept_steps(run)
    if not kept:
        raise AdapterError(
            f"{run} keeps no adapter yet. It will have one at its first checkpoint (training.checkpoint_every), and "
            "those of every N-th step with training.keep_adapters_every=N."
        )
    return run, kept


def every_step(runs: Iterable[tuple[str, float | None]]) -> list[tuple[str, float | None]]:
    """RUN and its scale -> RUN@100, RUN@200, ... at that scale."""
    found = [(*steps_of(path), scale) for path, scale in runs]
    return [(f"{run}@{step}", scale) for run, kept, scale in found for step in kept]
