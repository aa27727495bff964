"""A comparison as text: for the terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from coeffdiff.evaluation.statistics import SCORES, Cell


def table_of(cells: Sequence[Cell]) -> str:
    """CSV, a row for each cell: its facts, scores and costs; what a cell lacks is left empty."""
    facts = ("subject", "class_word", "arm", "seed", "steps", "scale")
    scores = [name for name in SCORES if any(name in cell["scores"] for cell in cells)]
    costs = list(dict.fromkeys(name for cell in cells for name in cell.get("cost", {})))
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow([*facts, *scores, *costs, "failed"])
    for cell in cells:
        values = [cell["scores"].get(name, "") for name in scores]
        values += [cell.get("cost", {}).get(name, "") for name in costs]
        writer.writerow([*(cell[name] for name in facts), *values, cell.get("failed", "")])
    return content.getvalue()


def as_text(results: Mapping[str, Any]) -> str:
    """For the terminal: an arm a line with its means, then the differences to the reference with their intervals."""
    arms = results["arms"]
    names = [name for name in SCORES if any(name in arm["scores"] for arm in arms.values())]
    width = max([12, *map(len, arms)])

    def line(label: str, values: Sequence[str], cells: str) -> str:
        shown = (value.rjust(max(7, len(SCORES[name][0]))) for name, value in zip(names, values, strict=True))
        return "  ".join([label.ljust(width), cells.rjust(8), *shown])

    lines = [line("arm", [SCORES[name][0] for name in names], "subjects")]
    for arm, arm_results in arms.items():
        means = [
            f"{arm_results['scores'][n]['mean']:.3f}" if n in arm_results["scores"] else "" for n in names
        ]
        lines.append(line(arm, means, str(arm_results["subjects"])))
    for arm, pair in results["paired"].items():
        lines += ["", f"{arm} - {results['reference']}, {pair['subjects']} subjects, {pair['pairs']} pairs"]
        for name, score in pair["scores"].items():
            between = "" if score["low"] is None else f"[{score['low']:+.3f}, {score['high']:+.3f}]"
            lines.append(
                f"  {SCORES[name][0]:<22} {score['difference']:+.3f} {between:<18} "
                f"better on {score['better_on']} of {score['of']}: {score['says']}"
            )
    for family, point in results["best"].items():
        lines.append(
            f"best of {family}: {point['arm']} after {point['steps']} steps at scale {point['scale']:g}"
        )
    lines += [f"failed: {sentence}" for sentence in results["failed"]]
    if results["missing"]:
        lines.append(f"{len(results['missing'])} cells are missing, the first: {results['missing'][0]}")
    return "\n".join(lines)
