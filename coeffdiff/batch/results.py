"""What became of a batch: a JSON file for each subject, one for all of them, and a table.

A subject's state is done (how: trained, continued or unchanged), failed or stopped; begun, while a batch is at it or if
that was killed; or missing, where none has come to it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from coeffdiff.batch.entries import Entry, read_entry, write_entry, write_text
from coeffdiff.batch.plan import BatchPlan
from coeffdiff.batch.subject_worker import SubjectBusy
from coeffdiff.evaluation.statistics import SCORES
from coeffdiff.execution.tasks import Outcome
from coeffdiff.utils.console import duration, visible
from coeffdiff.utils.locks import lock
from coeffdiff.utils.output_folder import write_errors


def store_outcome(plan: BatchPlan, outcome: Outcome) -> None:
    """Write a subject's file. One that another batch trains has its file from that one."""
    if isinstance(outcome.error, SubjectBusy):
        return
    entry = {
        "name": outcome.task.name,
        "state": outcome.state,
        **(outcome.result or {}),
        "error": f"{type(outcome.error).__name__}: {outcome.error}" if outcome.error else None,
        "seconds": round(outcome.seconds, 1),
        "cpu_seconds": round(outcome.cpu_seconds, 1),
        "starts": outcome.starts,
    }
    write_entry(plan.outcome(outcome.task.name), entry)


def gather(plan: BatchPlan, names: Sequence[str]) -> dict[str, Any]:
    """The entries of these subjects as their files say, with how many there are of each state."""
    entries = [read_entry(plan.outcome(name), name) for name in names]
    return {"counts": dict(Counter(entry["state"] for entry in entries)), "subjects": entries}


def write_results(plan: BatchPlan) -> None:
    """OUTPUT/batch.json and batch.txt, of all subjects of the plan, whichever part of them was worked on.

    Raises: ConfigError where the disk refuses.
    """
    with write_errors(str(plan.output)):
        plan.output.mkdir(parents=True, exist_ok=True)
    with lock(plan.output):  # of two batches that end together the later writes what both have done
        results = gather(plan, list(plan.settings))
        write_text(plan.output / "batch.json", json.dumps(results, indent=1) + "\n")
        write_text(plan.output / "batch.txt", as_text(results) + "\n")


def as_text(results: Mapping[str, Any]) -> str:
    """The table, a subject a line; sentences of those that failed behind it."""
    entries: list[Entry] = results["subjects"]
    scored = [name for name in SCORES if any(name in entry.get("scores", {}) for entry in entries)]
    head = ["subject", "state", "steps", "loss", "training", *(SCORES[name][0] for name in scored)]
    rows = [head, *(_row(entry, scored) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [visible(f"{entry['name']}: {entry['error']}") for entry in entries if entry.get("error")]
    again = [f"{entry['name']} {entry['starts']} times" for entry in entries if entry.get("starts", 1) > 1]
    lines += [visible(f"begun again after a lost worker: {', '.join(again)}")] if again else []
    counts = ", ".join(f"{count} {state}" for state, count in results["counts"].items())
    return "\n".join([*lines, f"{len(entries)} subject{'' if len(entries) == 1 else 's'}: {counts}"])


def _row(entry: Entry, scored: Sequence[str]) -> list[str]:
    scores = entry.get("scores", {})
    loss, seconds = entry.get("loss"), entry.get("training_seconds")
    return [
        visible(entry["name"]),
        str(entry.get("how", entry["state"])),
        str(entry.get("steps", "")),
        "" if loss is None else f"{loss:.4f}",
        "" if seconds is None else duration(seconds),
        *(f"{scores[name]:.3f}" if name in scores else "" for name in scored),
    ]
