"""Image-text understanding, several tasks at once: arms tuned with equal effort and scored on the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coeffdiff.errors import ConfigError, ModelError, TrainingError
from coeffdiff.evaluation.cells import Cell, CellFolder
from coeffdiff.tasks.image_text_cells import ARMS, FROZEN, Bench, TuningPlan
from coeffdiff.tasks.image_text_data import ImageTextData, read_questions
from coeffdiff.tasks.image_text_model import LONGEST, ImageText, load_image_text, read_notes
from coeffdiff.tasks.image_text_pictures import Tower, load_tower, picture_features
from coeffdiff.tasks.image_text_results import best_of, summarize
from coeffdiff.tasks.tuning import RANGES, rates_to_try
from coeffdiff.utils.console import Bar, duration, print_info, progress

DEFAULT_ARMS = (FROZEN, "linear", "lora", "coeff", "coeff+lora")
TUNING_SEED = 10_000  # of the tries; it is no seed of a comparison
FULL_RANGE = (1e-5, 1e-3)  # where rates of full fine-tuning are tried: wide, for large models and small ones


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    arms: of image_text_cells.ARMS.  tries: of rates for each arm.

    Raises: ConfigError for an unknown arm, no seed, no try.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    tries: int = 4

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
    _check_lengths(model, data, tower)
    with progress("pictures", len(data.pictures)) as bar:
        features = picture_features(tower, data.pictures, on_progress=bar)
    return Bench(model, tower, features, data, plan)


def _check_lengths(model: ImageText, data: ImageTextData, tower: Tower) -> None:
    """Says how many texts are cut. Raises: ModelError if pictures and words are more than the model can read."""
    questions = [question for part in data.splits.values() for question in part]
    asked, told = (
        [len(ids) for ids in model.tokenizer(texts).input_ids]
        for texts in ([question.text for question in questions], [question.answer for question in questions])
    )
    if cut := sum(length > LONGEST for length in (*asked, *told)):
        print_info(f"warning  {cut} questions or answers are cut after {LONGEST} tokens")
    needed = max(
        len(question.pictures) * tower.count + min(length, LONGEST)
        for question, length in zip(questions, asked, strict=True)
    )
    places = getattr(model.language.config, "max_position_embeddings", None)
    if places is not None and max(needed, min(max(told), LONGEST)) > places:
        raise ModelError(
            f"A question with its pictures has {needed} features and tokens, and the model reads {places}; ask about "
            "fewer pictures at a time, or take a model with more positions."
        )


def compare_arms(bench: Bench, comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Choose each arm's rates on the validation split, tune it with every seed, score it on the test split.

    folder: of the cells.
    Raises: TrainingError if the loss of an arm becomes infinite at all rates tried, or later at those chosen.
    """
    tuned = [arm for arm in comparison.arms if arm != FROZEN]
    tries: dict[str, list[Cell]] = {}
    final: dict[str, list[Cell]] = {}
    with progress("tuning", len(tuned) * (comparison.tries + len(comparison.seeds))) as bar:
        run = _Runner(bench, CellFolder(folder), bar)
        for arm in comparison.arms:
            seeds = comparison.seeds if arm in tuned else comparison.seeds[:1]
            rates: dict[str, float] = {}
            if arm in tuned:
                offered = rates_to_try(arm, comparison.tries, RANGES | {"full": FULL_RANGE})
                tries[arm] = [run(arm, rates, TUNING_SEED, "validation") for rates in offered]
                rates = best_of(tries[arm])["rates"]
            final[arm] = [run(arm, rates, seed, "test") for seed in seeds]
            if failed := [cell for cell in final[arm] if "failed" in cell]:
                raise TrainingError(
                    f"{arm}, seed {failed[0]['seed']}: {failed[0]['failed']} More --tries find others."
                )
    return summarize(tries, final)


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
