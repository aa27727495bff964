"""toy(): the paper's toy experiment, one attention layer and three ways to tune it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coeffdiff import __version__
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.toy.problem import make_problem
from coeffdiff.evaluation.toy.results import draw, judge
from coeffdiff.evaluation.toy.settings import ARMS, POLISHING, RATES, SETTINGS, TARGETS
from coeffdiff.evaluation.toy.tuning import Trial, tune
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import Bar
from coeffdiff.utils.output_folder import hold, refuse_occupied, refuse_unwritable, write_errors


@dataclass(frozen=True)
class Toy:
    """The result of toy(): its files, its numbers as plain data, and its seconds."""

    folder: Path
    picture: Path
    numbers: Path
    results: dict[str, Any]
    seconds: float


def toy(
    folder: Path,
    *,
    seeds: int = 5,
    steps: int = 1000,
    restarts: int = 3,
    rates: Sequence[float] = RATES,
    polishing: int = POLISHING,
    on_progress: Bar = lambda done, status="": None,
) -> Toy:
    """Tune every arm towards every target from the same starts at the same rates; write toy.json and toy.png.

    Raises: ConfigError before anything is computed, for invalid numbers, or if the folder is not free.
    """
    begun = time.monotonic()
    for name, value in (("seeds", seeds), ("steps", steps), ("restarts", restarts), ("rates", len(rates))):
        if value < 1:
            raise ConfigError(f"The toy experiment needs at least 1 of {name}, not {value}.")
    refuse_occupied(folder)
    refuse_unwritable(folder)
    with hold(folder):
        refuse_occupied(folder)  # another one may just have ended there
        problems = [
            make_problem(setting, target, seed, restarts)
            for setting, target, seed in itertools.product(SETTINGS, TARGETS, range(seeds))
        ]
        trials: dict[tuple[str, str], Trial] = {}
        for done, (setting, arm) in enumerate(itertools.product(SETTINGS, ARMS)):

            def report(part: float, done: int = done, what: str = f"{setting}: {ARMS[arm]}") -> None:
                on_progress(done + part, what)

            mine = [problem for problem in problems if problem.setting == setting]
            trials[setting, arm] = tune(
                mine, arm, steps=steps, rates=rates, polishing=polishing, on_progress=report
            )
        results = judge(problems, trials, rates) | {
            "device": f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}",
            "versions": {"coeffdiff": __version__, "torch": str(torch.__version__)},
            "seeds": seeds,
            "steps": steps,
            "restarts": restarts,
            "rates": list(rates),
            "polishing": polishing,
        }
        results["seconds"] = round(time.monotonic() - begun, 1)
        with write_errors(str(folder)), atomic_write(folder) as unfinished:
            unfinished.mkdir()
            (unfinished / "toy.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            draw(problems, trials, results, unfinished / "toy.png")
    return Toy(folder, folder / "toy.png", folder / "toy.json", results, time.monotonic() - begun)
