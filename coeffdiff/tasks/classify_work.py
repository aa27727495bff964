"""The trainings of a few-shot comparison: which there are, which are missing, and what a finished one says."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coeffdiff.errors import NonFiniteLoss, TrainingError
from coeffdiff.evaluation.cells import Cell, CellFolder, slug
from coeffdiff.evaluation.facts import device_name
from coeffdiff.tasks.classify_plan import Plan
from coeffdiff.tasks.classify_report import failure_of
from coeffdiff.tasks.encoder import Encoder
from coeffdiff.tasks.examples import Example, Examples
from coeffdiff.tasks.few_shot import train_few_shot
from coeffdiff.tasks.saving import save_classifier
from coeffdiff.tasks.splits import Split
from coeffdiff.tasks.tuning import Rates, best_try, rates_to_try
from coeffdiff.utils.hashing import hash_of

FORMAT = 1  # of what decides a cell; raised when the same settings would give other numbers
TUNING_SEEDS = ("tune-0", "tune-1")


@dataclass(frozen=True)
class _Training:
    """A training to do: its key is a hash of all that decides it."""

    key: str
    arm: str
    shots: int
    seed: int | str
    rates: Rates
    trained_on: tuple[int, ...]
    judged_on: tuple[int, ...]

    @property
    def words(self) -> str:
        return f"{self.arm}-{self.shots}-{self.seed}"


class Work:
    """The trainings of a plan, in order, and what has come of them."""

    def __init__(
        self,
        plan: Plan,
        examples: Examples,
        split: Split,
        encoder: Encoder,
        cells: CellFolder,
        kept: Path | None,
    ) -> None:
        self.plan, self.examples, self.split, self.encoder, self.cells = plan, examples, split, encoder, cells
        self.kept = kept  # where trained classifiers go
        self.finished: list[dict[str, Any]] = []  # cells on the test split
        self.keys: list[str] = []
        self.device = next(encoder.network.parameters()).device

    @property
    def trainings(self) -> int:
        """How many there are in all, finished or missing."""
        tuning = len(TUNING_SEEDS) * self.plan.tries if self.plan.tries > 1 else 0
        return (tuning + self.plan.seeds) * len(self.plan.arms) * len(self.plan.shots)

    def all(self) -> Iterator[str]:
        """Do every training that is missing; yields what it was after each, done or found.

        Raises: TrainingError if an arm diverges at all rates tried.
        """
        for shots in self.plan.shots:
            chosen = {}
            for arm in self.plan.arms:
                tries = rates_to_try(arm, self.plan.tries)
                found: list[list[dict[str, Any]]] = []
                for rates in tries if len(tries) > 1 else ():
                    found.append([])
                    for own in TUNING_SEEDS:
                        found[-1].append(self._cell(arm, shots, own, rates, self.split.validation))
                        yield f"{arm}, {shots} shots, tuning"
                chosen[arm] = best_rates(tries, found) if found else tries[0]
            for seed in range(self.plan.seeds):
                for arm in self.plan.arms:
                    self.finished.append(self._cell(arm, shots, seed, chosen[arm], self.split.test))
                    yield f"{arm}, {shots} shots, seed {seed}"

    def facts(self) -> dict[str, Any]:
        """What holds for all cells."""
        plan = self.plan
        return {
            "data": str(plan.data),
            "kind": self.examples.kind,
            "classes": list(self.examples.classes),
            "model": plan.model,
            "pooling": self.encoder.pooling,
            "tested_on": len(self.split.test),
            "tuned_on": len(self.split.validation),
            "tries": plan.tries,
            "recipe": asdict(plan.recipe),
        }

    def _cell(
        self, arm: str, shots: int, seed: int | str, rates: Rates, judged_on: tuple[int, ...]
    ) -> dict[str, Any]:
        training = self._training(arm, shots, seed, rates, judged_on)
        self.keys.append(training.key)
        cell = self.cells.read(training.key)
        folder = None
        if self.kept and isinstance(seed, int):
            folder = self.kept / slug(f"{training.words}-{training.key}")
        if cell is None or (folder and failure_of(cell) is None and not folder.is_dir()):
            cell = self._trained(training, folder)
        return cell

    def _training(
        self, arm: str, shots: int, seed: int | str, rates: Rates, judged_on: tuple[int, ...]
    ) -> _Training:
        trained_on = self.split.shots(shots, seed)
        key = hash_of(
            FORMAT, self.encoder.digest, self.encoder.kind, self.encoder.pooling, arm, seed, sorted(rates.items()),
            asdict(self.plan.recipe), self._contents(trained_on), self._contents(judged_on),
        )  # fmt: skip
        return _Training(key, arm, shots, seed, rates, trained_on, judged_on)

    def _contents(self, indices: tuple[int, ...]) -> list[tuple[str, int]]:
        return [(self.examples.items[index].digest, self.examples.items[index].label) for index in indices]

    def _items(self, indices: tuple[int, ...]) -> list[Example]:
        return [self.examples.items[index] for index in indices]

    def _trained(self, training: _Training, folder: Path | None) -> dict[str, Any]:
        """The cell of a training, written before its classifier: on a full disk that alone is lost."""
        shots, judged = self._items(training.trained_on), self._items(training.judged_on)
        try:
            trained = train_few_shot(
                self.encoder, training.arm, training.rates, self.plan.recipe, training.seed, shots, judged
            )
        except NonFiniteLoss as error:  # rates that are too high are a finding, too
            cell = self._facts_of(training, {"scores": {}, "failed": str(error)})
            self.cells.write(training.key, training.words, cell)
            return cell
        moved = trained.mean_abs_alpha
        cell = self._facts_of(
            training,
            {
                "scores": trained.scores,
                "numbers": trained.numbers,
                "mean_abs_alpha": None if moved is None else round(moved, 5),
                "seconds": round(trained.seconds, 2),
            },
        )
        self.cells.write(training.key, training.words, cell)
        if folder:
            save_classifier(trained, self.examples.classes, self.encoder, folder)
        return cell

    def _facts_of(self, training: _Training, found: dict[str, Any]) -> dict[str, Any]:
        """A cell. found: what came of the training."""
        return {
            "arm": training.arm,
            "shots": training.shots,
            "seed": training.seed,
            "rates": training.rates,
            **found,
            "made": {
                "device": device_name(self.device),
                "date": datetime.date.today().isoformat(),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            },
        }


def best_rates(tries: Sequence[Rates], cells: Sequence[Sequence[Cell]]) -> Rates:
    """The best rates of those at which no training diverged. cells: of each try, one for every seed.

    Raises: TrainingError if there are none.
    """
    sound = [
        (rates, own)
        for rates, own in zip(tries, cells, strict=True)
        if all(failure_of(cell) is None for cell in own)
    ]
    if not sound:
        cell = next(cell for cell in cells[0] if failure_of(cell))
        raise TrainingError(
            f"{cell['arm']}, {cell['shots']} shots: {failure_of(cell)} So it was at all {len(tries)} rates tried."
        )
    return sound[best_try([[cell["scores"] for cell in own] for _, own in sound])][0]
