"""Tables of what `coeffdiff classify --output scripts/evidence/classify --pack NAME` left, for evidence_tables.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tables(folder: Path) -> dict[str, str]:
    """Markdown by name, `classify_NAME` for each packed file of cells."""
    return {f"classify_{file.stem}": table(read(file)) for file in sorted(folder.glob("cells/*.jsonl"))}


def read(file: Path) -> list[dict[str, Any]]:
    """The cells on the test split; those that rates were tuned with have no number as their seed."""
    cells = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [cell for cell in cells if isinstance(cell["seed"], int)]


def table(cells: list[dict[str, Any]]) -> str:
    """A row for each number of shots and arm: accuracy, and the paired differences to linear and to lora.

    Raises: ValueError if a cell stands there twice, as when the same was done with other rates.
    """
    from coeffdiff.tasks.arms import ARMS
    from coeffdiff.tasks.classify_report import summarize

    names = [(cell["shots"], cell["arm"], cell["seed"]) for cell in cells]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two cells of {twice}: one file is of one plan")
    found = summarize({}, cells, ARMS)
    lines = [
        "| shots | arm | numbers | accuracy | less linear's | less lora's | mean abs alpha | rates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shots, of in found["shots"].items():
        for arm, values in of["arms"].items():
            pairs = of["paired"].get(arm, {})
            numbers = sum(count for part, count in values["numbers"].items() if part != "head")
            moved = values["mean_abs_alpha"]
            row = (
                shots, arm, f"{numbers:,}", between(values["accuracy"]["mean"], values["accuracy"]),
                *(between(one["difference"], one, "+") + f", {one['says']}" if (one := pairs.get(other)) else ""
                  for other in ("linear", "lora")),
                "" if moved is None else f"{moved:.2f}",
                ", ".join(f"{part} {rate:g}" for part, rate in values["rates"].items()),
            )  # fmt: skip
            lines.append("| " + " | ".join(row) + " |")
    seeds = sorted({values["seeds"] for of in found["shots"].values() for values in of["arms"].values()})
    made = found["made"]
    lines += [
        "",
        f"{' to '.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))} seeds; "
        f"{' to '.join(dict.fromkeys((made['dates'][0], made['dates'][-1])))}, {' and '.join(made['devices'])}, "
        f"{', '.join(made['versions'])}.",
    ]
    return "\n".join(lines)


def between(mean: float, bounds: Mapping[str, Any], sign: str = "") -> str:
    low, high = bounds["low"], bounds["high"]
    return f"{mean:{sign}.3f}" + ("" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]")
