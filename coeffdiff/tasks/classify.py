"""classify(): arms side by side in few-shot classification, on the same shots of the same seeds.

Each arm tries equally many rates on the validation split, with seeds of their own; the best are trained with every seed
and scored on the test split, which nothing else sees. Each training is a cell in a folder and is not repeated.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.cells import CellFolder
from coeffdiff.evaluation.facts import device_name
from coeffdiff.sampling.device import choose_device
from coeffdiff.tasks.arms import ARMS, lora_layers
from coeffdiff.tasks.classify_report import summarize
from coeffdiff.tasks.encoder import Encoder, load_encoder
from coeffdiff.tasks.examples import Example, Examples, read_examples
from coeffdiff.tasks.few_shot import Recipe, train_few_shot
from coeffdiff.tasks.splits import Split, split_examples
from coeffdiff.tasks.tuning import Rates, best_try, rates_to_try
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import print_info, progress
from coeffdiff.utils.hashing import hash_of
from coeffdiff.utils.output_folder import refuse_unwritable

FORMAT = 1  # of what decides a cell; raised when the same settings would give other numbers
TUNING_SEEDS = ("tune-0", "tune-1")


@dataclass(frozen=True)
class Plan:
    """What to compare. shots: of each class; tries: rates tried by each arm, 1 takes the defaults without tuning;
    test, validation: examples of each class, at most."""

    data: Path
    model: str
    arms: tuple[str, ...] = ARMS
    shots: tuple[int, ...] = (4, 16)
    seeds: int = 6
    tries: int = 6
    test: int = 40
    validation: int = 20
    recipe: Recipe = field(default_factory=Recipe)
    text_column: str = "text"
    label_column: str = "label"


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


def classify(plan: Plan, output: Path, pack_as: str | None = None) -> dict[str, Any]:
    """Train what is missing and write classification.json; returns what that holds (see classify_report.summarize).

    Args:
        output: folder of the cells and results; trainings that are in it are not repeated.
        pack_as: the cells are packed into cells/`pack_as`.jsonl at the end.
    Raises: CoeffDiffError with one sentence; trainings that are finished stay.
    """
    _check(plan)
    refuse_unwritable(output)
    examples = read_examples(plan.data, plan.text_column, plan.label_column)
    split = split_examples(examples, max(plan.shots), plan.test, plan.validation if plan.tries > 1 else 0)
    device, _ = choose_device("fp32")
    work = _Work(
        plan,
        examples,
        split,
        load_encoder(plan.model, examples.items[0], device),
        CellFolder(output / "cells"),
    )
    if any("lora" in arm for arm in plan.arms):
        lora_layers(work.encoder.network, plan.recipe.lora_targets)  # now, not after an hour of other arms
    _say(work)
    trainings = (
        (len(TUNING_SEEDS) * plan.tries * (plan.tries > 1) + plan.seeds) * len(plan.arms) * len(plan.shots)
    )
    results: dict[str, Any] = {}
    with progress("trainings", trainings) as bar:
        for done, label in enumerate(work.all(), 1):
            bar(done, label)
    results = summarize(work.facts(), work.finished, plan.arms)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / "classification.json") as unfinished:
        unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if pack_as:
        work.cells.pack(pack_as, work.keys)
    return results


class _Work:
    """The trainings of a plan, in order, and what has come of them."""

    def __init__(
        self, plan: Plan, examples: Examples, split: Split, encoder: Encoder, cells: CellFolder
    ) -> None:
        self.plan, self.examples, self.split, self.encoder, self.cells = plan, examples, split, encoder, cells
        self.finished: list[dict[str, Any]] = []  # cells on the test split
        self.keys: list[str] = []
        self.device = next(encoder.network.parameters()).device

    def all(self) -> Iterator[str]:
        """Do every training that is missing; yields what it was after each, done or found."""
        for shots in self.plan.shots:
            chosen = {}
            for arm in self.plan.arms:
                tries = rates_to_try(arm, self.plan.tries)
                found: list[list[dict[str, Any]]] = []
                for rates in tries if len(tries) > 1 else ():
                    found.append([])
                    for own in TUNING_SEEDS:
                        found[-1].append(self._cell(arm, shots, own, rates, self.split.validation)["scores"])
                        yield f"{arm}, {shots} shots, tuning"
                chosen[arm] = tries[best_try(found)] if found else tries[0]
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
        if cell is None:
            cell = self._trained(training)
            self.cells.write(training.key, training.words, cell)
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

    def _trained(self, training: _Training) -> dict[str, Any]:
        shots, judged = self._items(training.trained_on), self._items(training.judged_on)
        trained = train_few_shot(
            self.encoder, training.arm, training.rates, self.plan.recipe, training.seed, shots, judged
        )
        moved = trained.mean_abs_alpha
        return {
            "arm": training.arm,
            "shots": training.shots,
            "seed": training.seed,
            "rates": training.rates,
            "scores": trained.scores,
            "numbers": trained.numbers,
            "mean_abs_alpha": None if moved is None else round(moved, 5),
            "seconds": round(trained.seconds, 2),
            "made": {
                "device": device_name(self.device),
                "date": datetime.date.today().isoformat(),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            },
        }


def _check(plan: Plan) -> None:
    """Raises: ConfigError for what cannot be compared."""
    if unknown := [arm for arm in plan.arms if arm not in ARMS]:
        raise ConfigError(f"There is no arm {unknown[0]!r}; there are {', '.join(ARMS)}.")
    for name, values in (("--arm", plan.arms), ("--shots", plan.shots)):
        if len(set(values)) != len(values) or not values:
            raise ConfigError(f"{name} needs at least one value, and each once.")
    if min(plan.shots) < 1:
        raise ConfigError(f"--shots are at least 1 of each class, not {min(plan.shots)}.")


def _say(work: _Work) -> None:
    examples, split = work.examples, work.split
    for note in examples.notes[:10]:
        print_info(f"note     {note}")
    if len(examples.notes) > 10:
        print_info(f"note     {len(examples.notes) - 10} more were left out.")
    pool = [len(part) for part in split.pool]
    print_info(
        f"data     {len(examples.items)} {examples.kind} of {len(examples.classes)} classes: {len(split.test)} to test "
        f"on, {len(split.validation)} to tune rates on, {min(pool)} or more of each class to draw shots from",
        f"model    {work.encoder.name}, {type(work.encoder.network).__name__} on {device_name(work.device)}, "
        f"{'the first token' if work.encoder.pooling == 'first' else 'the mean over tokens'} as features",
    )
