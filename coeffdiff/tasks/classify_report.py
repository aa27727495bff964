"""What a few-shot comparison says: means, paired differences between arms, and the table on screen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from coeffdiff.evaluation.statistics import difference, interval

Cell = Mapping[str, Any]


def failure_of(cell: Cell) -> str | None:
    """Why a training came to no classifier, in a sentence; None for one that did."""
    if "failed" in cell:
        return str(cell["failed"])
    # Older cells have an accuracy all the same: NaN in place of answers is taken for the first class
    return "The loss is not finite: the training diverged." if cell["scores"]["loss"] is None else None


def summarize(facts: Mapping[str, Any], cells: Sequence[Cell], arms: Sequence[str]) -> dict[str, Any]:
    """The results of cells on the test split.

    Args:
        facts: what holds for all of them; kept as it is.
        cells: as classify writes them.
        arms: in the order of the table; each is compared with those before it.
    Returns: the facts, and
        shots: for each number of shots
            arms: accuracy (mean over seeds, with its 95 % interval), seeds, numbers, rates, mean |alpha|, seconds;
            paired: arm -> earlier arm -> the mean difference in accuracy over the seeds that both have, its interval,
                and a verdict (see evaluation.statistics.difference);
        failed: a sentence for each training that diverged, which is left out above;
        made: devices, dates and versions.
    """
    sound = [cell for cell in cells if failure_of(cell) is None]
    of = {
        shots: {arm: {c["seed"]: c for c in sound if (c["shots"], c["arm"]) == (shots, arm)} for arm in arms}
        for shots in sorted({cell["shots"] for cell in cells})
    }
    return {
        **facts,
        "shots": {
            str(shots): {
                "arms": {arm: _arm(list(found.values())) for arm, found in by_arm.items() if found},
                "paired": {
                    arm: {
                        other: _paired(by_arm[arm], by_arm[other]) for other in arms[:place] if by_arm[other]
                    }
                    for place, arm in enumerate(arms)
                    if place and by_arm[arm]
                },
            }
            for shots, by_arm in of.items()
        },
        "failed": [
            f"{cell['arm']}, {cell['shots']} shots, seed {cell['seed']}: {failure}"
            for cell in cells
            if (failure := failure_of(cell))
        ],
        "made": {
            "devices": sorted({cell["made"]["device"] for cell in cells}),
            "dates": sorted({cell["made"]["date"] for cell in cells}),
            "versions": sorted(
                {f"{name} {of}" for cell in cells for name, of in cell["made"]["versions"].items()}
            ),
        },
    }


def _arm(cells: Sequence[Cell]) -> dict[str, Any]:
    values = [cell["scores"]["accuracy"] for cell in cells]
    low, high = interval(values)
    moved = [cell["mean_abs_alpha"] for cell in cells if cell["mean_abs_alpha"] is not None]
    return {
        "accuracy": {"mean": statistics.fmean(values), "low": low, "high": high},
        "seeds": len(cells),
        "numbers": cells[0]["numbers"],
        "rates": cells[0]["rates"],
        "mean_abs_alpha": statistics.fmean(moved) if moved else None,
        "seconds": statistics.median(cell["seconds"] for cell in cells),
    }


def _paired(ours: Mapping[Any, Cell], theirs: Mapping[Any, Cell]) -> dict[str, Any]:
    common = sorted(set(ours) & set(theirs))
    return difference(
        [ours[s]["scores"]["accuracy"] - theirs[s]["scores"]["accuracy"] for s in common], unit="seeds"
    )


def as_text(results: Mapping[str, Any]) -> str:
    """For the terminal: a line an arm, then the paired differences with their intervals."""
    lines = []
    for shots, found in results["shots"].items():
        seeds = max((arm["seeds"] for arm in found["arms"].values()), default=0)
        lines += [
            "",
            f"{shots} shots of each of {len(results['classes'])} classes, {seeds} seeds, "
            f"{results['tested_on']} {results['kind']} tested",
            f"{'arm':<12}{'numbers':>10}  {'accuracy':<22}{'|alpha|':>8}  rates",
        ]
        for arm, values in found["arms"].items():
            numbers = sum(count for part, count in values["numbers"].items() if part != "head")
            accuracy = _with_interval(values["accuracy"]["mean"], values["accuracy"])
            moved = "" if values["mean_abs_alpha"] is None else f"{values['mean_abs_alpha']:.3f}"
            rates = ", ".join(f"{part} {rate:g}" for part, rate in values["rates"].items())
            lines.append(f"{arm:<12}{numbers:>10,}  {accuracy:<22}{moved:>8}  {rates}")
        for arm, others in found["paired"].items():
            lines += [
                f"  {f'{arm} - {other}':<22} {_with_interval(pair['difference'], pair, sign='+')}  "
                f"better on {pair['better_on']} of {pair['of']}: {pair['says']}"
                for other, pair in others.items()
            ]
    lines += [f"failed: {sentence}" for sentence in results["failed"]]
    lines.append(
        "numbers: trained beside the head; accuracy: mean over classes; in brackets: 95 % intervals over seeds"
    )
    return "\n".join(lines).lstrip("\n")


def _with_interval(mean: float, bounds: Mapping[str, Any], sign: str = "") -> str:
    low, high = bounds["low"], bounds["high"]
    between = "" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{mean:{sign}.3f}{between}"
