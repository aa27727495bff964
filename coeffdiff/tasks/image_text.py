"""Image-text understanding, several tasks at once: arms tuned with equal effort and scored on the same questions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coeffdiff.errors import ConfigError, TrainingError
from coeffdiff.evaluation.cells import Cell, CellFolder
from coeffdiff.evaluation.statistics import difference
from coeffdiff.tasks.image_text_cells import ARMS, FROZEN, Bench, TuningPlan
from coeffdiff.tasks.image_text_data import ImageTextData, read_questions
from coeffdiff.tasks.image_text_model import load_image_text, read_notes
from coeffdiff.tasks.image_text_pictures import load_tower, picture_features
from coeffdiff.tasks.tuning import RANGES, best_try, rates_to_try
from coeffdiff.utils.console import Bar, duration, print_info, progress

DEFAULT_ARMS = (FROZEN, "linear", "lora", "coeff", "coeff+lora")
TUNING_SEED = 10_000  # of the tries; it is no seed of a comparison
FULL_RANGE = (1e-5, 1e-3)  # where rates of full fine-tuning are tried: wide, for large models and small ones


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    arms: of image_text_cells.ARMS.  tries: of rates for each arm.  reference: the arm that others are compared with.

    Raises: ConfigError for an unknown arm, no seed, no try.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    tries: int = 4
    reference: str = "lora"

    def __post_init__(self) -> None:
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ConfigError(f"There is no arm {unknown[0]!r}; there are {', '.join(ARMS)}.")
        if not self.seeds or TUNING_SEED in self.seeds:
            raise ConfigError(
                f"Seeds are wanted, and not {TUNING_SEED}, with which learning rates are chosen."
            )
        if self.tries < 1:
            raise ConfigError(f"tries must be at least 1, not {self.tries}.")


def open_bench(
    folder: Path, model_name: str, tower_name: str | None, plan: TuningPlan, device: torch.device
) -> Bench:
    """Read the questions, load tower and model, and encode the pictures once.

    Raises: what read_questions, load_tower and load_image_text raise.
    """
    data = read_questions(folder)
    notes = read_notes(model_name)
    tower = load_tower(tower_name or notes.tower, grid=notes.grid, device=device)
    model = load_image_text(model_name, tower.width, device=device)
    with progress("pictures", len(data.pictures)) as bar:
        features = picture_features(tower, data.pictures, on_progress=bar)
    return Bench(model, features, data, plan)


def compare_arms(bench: Bench, comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Choose each arm's rates on the validation split, tune it with every seed, score it on the test split.

    folder: of the cells.
    Raises: TrainingError if the loss of an arm becomes infinite at all rates tried, or later at those chosen.
    """
    tuned = [arm for arm in comparison.arms if arm != FROZEN]
    chosen: dict[str, dict[str, Any]] = {}
    final: dict[str, list[Cell]] = {}
    with progress("tuning", len(tuned) * (comparison.tries + len(comparison.seeds))) as bar:
        run = _Runner(bench, CellFolder(folder), bar)
        for arm in comparison.arms:
            seeds = comparison.seeds if arm in tuned else comparison.seeds[:1]
            if arm in tuned:
                tries = rates_to_try(arm, comparison.tries, RANGES | {"full": FULL_RANGE})
                chosen[arm] = _best(arm, [run(arm, rates, TUNING_SEED, "validation") for rates in tries])
            rates = chosen[arm]["rates"] if arm in tuned else {}
            final[arm] = [run(arm, rates, seed, "test") for seed in seeds]
            if failed := [cell for cell in final[arm] if "failed" in cell]:
                raise TrainingError(
                    f"{arm}, seed {failed[0]['seed']}: {failed[0]['failed']} More --tries find others."
                )
    return {
        "reference": comparison.reference,
        "tasks": list(bench.data.tasks),
        "arms": {arm: _summary(arm_cells, chosen.get(arm)) for arm, arm_cells in final.items()},
        "paired": _paired(final, comparison.reference),
        "made": final[comparison.arms[0]][0]["made"],
        "plan": vars(bench.plan) | {"seeds": list(comparison.seeds), "tries": comparison.tries},
        "questions": _counts(bench.data),
    }


class _Runner:
    """Runs cells, and tells the user of each."""

    def __init__(self, bench: Bench, cells: CellFolder, bar: Bar) -> None:
        self.bench, self.cells, self.bar, self.done = bench, cells, bar, 0

    def __call__(self, arm: str, rates: Mapping[str, float], seed: int, split: str) -> Cell:
        steps = self.bench.plan.steps

        def told(step: int, loss: float) -> None:
            if step < steps:
                self.bar(self.done + step / steps, f"{arm}, loss {loss:.3f}")

        cell = self.bench.cell(self.cells, arm, rates, seed, split, told)
        self.done += arm != FROZEN
        self.bar(self.done)
        found = cell.get("failed") or f"accuracy {cell['mean_accuracy']:.3f}"
        at = ", ".join(f"{part} {rate:g}" for part, rate in rates.items())
        what = "trying" if split == "validation" else f"seed {seed}"
        print_info(f"{arm}, {what} {at}: {found} ({duration(cell['seconds'])})")
        return cell


def _best(arm: str, tries: Sequence[Cell]) -> dict[str, Any]:
    """The rates of the best try, and how all came out; an accuracy of None is a loss that became infinite."""
    sound = [cell for cell in tries if "failed" not in cell]
    if not sound:
        raise TrainingError(f"{arm}: {tries[0]['failed']} So it was at all {len(tries)} rates tried.")
    best = sound[best_try([[{"accuracy": c["mean_accuracy"], "loss": c["loss"]}] for c in sound])]
    return {
        "rates": best["rates"],
        "tries": [{"rates": cell["rates"], "accuracy": cell.get("mean_accuracy")} for cell in tries],
    }


def _summary(cells: Sequence[Cell], chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    tasks = list(cells[0]["accuracy"])
    alphas = [cell["mean_abs_alpha"] for cell in cells if "mean_abs_alpha" in cell]
    return {
        "seeds": [cell["seed"] for cell in cells],
        "accuracy": {task: statistics.fmean(cell["accuracy"][task] for cell in cells) for task in tasks},
        "f1": {task: statistics.fmean(cell["f1"][task] for cell in cells) for task in tasks},
        "mean_accuracy": statistics.fmean(cell["mean_accuracy"] for cell in cells),
        "numbers": cells[0]["numbers"],
        "mean_abs_alpha": statistics.fmean(alphas) if alphas else None,
        "seconds": statistics.median(cell["seconds"] for cell in cells),
        "chosen": chosen,
    }


def _paired(final: Mapping[str, Sequence[Cell]], reference: str) -> dict[str, Any]:
    """Of each other tuned arm the difference to the reference, seed by seed, of the mean and of each task."""
    if reference not in final:
        return {}
    against = {cell["seed"]: cell for cell in final[reference]}
    result = {}
    for arm, cells in final.items():
        common = [(cell, against[cell["seed"]]) for cell in cells if cell["seed"] in against]
        if arm in (reference, FROZEN) or not common:
            continue
        result[arm] = {
            "mean": difference([a["mean_accuracy"] - b["mean_accuracy"] for a, b in common], unit="seeds")
        } | {
            task: difference([a["accuracy"][task] - b["accuracy"][task] for a, b in common], unit="seeds")
            for task in common[0][0]["accuracy"]
        }
    return result


def _counts(data: ImageTextData) -> dict[str, dict[str, int]]:
    return {
        split: {task: sum(question.task == task for question in part) for task in data.tasks}
        for split, part in data.splits.items()
    }
