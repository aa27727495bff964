"""The results of an image-text comparison: from its cells to plain data, and to a table in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coeffdiff.errors import ConfigError, TrainingError
from coeffdiff.evaluation.cells import Cell
from coeffdiff.evaluation.statistics import difference
from coeffdiff.tasks.image_text_cells import ARMS, FROZEN
from coeffdiff.tasks.tuning import best_try

REFERENCES = ("linear", "lora")  # arms that the table has differences to
Cells = Mapping[str, Sequence[Cell]]  # of each arm


def summarize(tries: Cells, final: Cells) -> dict[str, Any]:
    """What the table shows, as plain data; each tuned arm is compared with those before it in ARMS.

    Args:
        tries: of each tuned arm its cells on the validation split, one for each try.
        final: of each arm its cells on the test split, at the rates of its best try, one for each seed.
    """
    arms = [arm for arm in ARMS if arm in final]
    first, tuned = final[arms[0]][0], [arm for arm in arms if arm != FROZEN]
    return {
        "arms": {arm: _summary(final[arm], tries.get(arm)) for arm in arms},
        "paired": {
            arm: {other: _paired(final[arm], final[other]) for other in tuned[:place]}
            for place, arm in enumerate(tuned)
            if place
        },
        "questions_scored": first["questions_scored"],
        "made": first["made"],
    }


def gathered(cells: Iterable[Cell]) -> dict[str, Any]:
    """The same from the cells of a folder.

    Raises: ConfigError if there are none, or for arms with cells at other rates than their best.
    """
    tries: dict[str, list[Cell]] = {}
    final: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (ARMS.index(cell["arm"]), cell["seed"])):
        (tries if cell["split"] == "validation" else final).setdefault(cell["arm"], []).append(cell)
    if not final:
        raise ConfigError("There are no cells of an image-text comparison.")
    for arm, arm_tries in tries.items():
        rates = best_of(arm_tries)["rates"]
        if any(cell["rates"] != rates for cell in final.get(arm, ())):
            raise ConfigError(f"The cells of {arm} are of several comparisons; gather one at a time.")
    return summarize(tries, final)


def best_of(tries: Sequence[Cell]) -> Cell:
    """The best try. Raises: TrainingError if the loss became infinite in every one."""
    sound = [cell for cell in tries if "failed" not in cell]
    if not sound:
        raise TrainingError(
            f"{tries[0]['arm']}: {tries[0]['failed']} So it was at all {len(tries)} rates tried."
        )
    return sound[best_try([[{"accuracy": c["mean_accuracy"], "loss": c["loss"]}] for c in sound])]


def _summary(cells: Sequence[Cell], tries: Sequence[Cell] | None) -> dict[str, Any]:
    """tries: None of the frozen arm. An accuracy of None in the result's is that of a loss that became infinite."""
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
        "rates": cells[0]["rates"],
        "tries": [{"rates": cell["rates"], "accuracy": cell.get("mean_accuracy")} for cell in tries or ()],
    }


def _paired(cells: Sequence[Cell], others: Sequence[Cell]) -> dict[str, Any]:
    """Differences of the mean accuracy and of each task's, over the seeds that both arms have."""
    against = {cell["seed"]: cell for cell in others}
    common = [(cell, against[cell["seed"]]) for cell in cells if cell["seed"] in against]
    values = {"mean": [mine["mean_accuracy"] - other["mean_accuracy"] for mine, other in common]} | {
        task: [mine["accuracy"][task] - other["accuracy"][task] for mine, other in common]
        for task in cells[0]["accuracy"]
    }
    return {name: difference(found, unit="seeds") for name, found in values.items() if found}


def as_markdown(results: Mapping[str, Any]) -> str:
    """An arm a row: trained numbers, accuracy of each task and their mean, differences in it, rates."""
    tasks, references = list(results["questions_scored"]), [a for a in REFERENCES if a in results["arms"]]
    head = ["arm", "numbers", *tasks, "mean", *(f"less {reference}'s" for reference in references)]
    head += ["rates", "mean abs alpha", "seconds"]
    rows = [head, ["---"] * len(head)]
    for name, arm in results["arms"].items():
        rates = ", ".join(f"{part} {rate:g}" for part, rate in arm["rates"].items())
        pairs = results["paired"].get(name, {})
        rows.append(
            [
                name,
                _numbers(arm["numbers"]),
                *(f"{100 * arm['accuracy'][task]:.1f}" for task in tasks),
                f"{100 * arm['mean_accuracy']:.1f}",
                *(_difference(pairs.get(reference, {}).get("mean")) for reference in references),
                rates,
                "" if arm["mean_abs_alpha"] is None else f"{arm['mean_abs_alpha']:.3f}",
                f"{arm['seconds']:.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(results: Mapping[str, Any]) -> str:
    """A line for each two arms: the difference of their mean accuracies, its interval and its verdict."""
    return "\n".join(
        f"{arm} - {other}: {_difference(scores['mean'])}, better with {scores['mean']['better_on']} of "
        f"{scores['mean']['of']} seeds: {scores['mean']['says']}"
        for arm, pairs in results["paired"].items()
        for other, scores in pairs.items()
    )


def _numbers(trained: Mapping[str, int]) -> str:
    """What is trained beside the projection, which is in every arm."""
    return f"{sum(count for part, count in trained.items() if part != 'head'):,}"


def _difference(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    between = "" if found["low"] is None else f" [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"{100 * found['difference']:+.1f}{between}"
