"""The scores of an evaluation as CSV, JSON and lines."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from coeffdiff.evaluation.protocol import Evaluation
from coeffdiff.evaluation.report import RunPage, write_report
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.output_folder import write_errors


def write_results(evaluation: Evaluation, pages: Sequence[RunPage]) -> None:
    """JSON, CSV and page, each atomically. Raises: ConfigError if they cannot be written."""
    with write_errors(str(evaluation.folder)):
        with atomic_write(evaluation.numbers) as unfinished:
            unfinished.write_text(
                json.dumps(evaluation.results, indent=1, default=str) + "\n", encoding="utf-8"
            )
        with atomic_write(evaluation.table) as unfinished:
            unfinished.write_text(csv_of(evaluation.results["runs"]), encoding="utf-8")
        with atomic_write(evaluation.report) as unfinished:
            write_report(evaluation.results, pages, unfinished)


def csv_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row for each run: its facts, then its scores; scores that a run lacks are left empty."""
    facts = (
        "run",
        "subject",
        "token",
        "class_word",
        "kind",
        "base_model",
        "trained_steps",
        "scale",
        "prompts",
    )
    scores = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow([*facts, "pictures", *scores])
    for run in runs:
        values = [run["scores"].get(name, "") for name in scores]
        writer.writerow([*(run[name] for name in facts), len(run["pictures"]), *values])
    return content.getvalue()


def summary(results: Mapping[str, Any]) -> str:
    """The scores for the terminal, a line for each run; means where there are several."""
    names = list(dict.fromkeys(name for run in results["runs"] for name in run["scores"]))
    width = max(4, *(len(run["run"]) for run in results["runs"]))

    def line(label: str, values: Mapping[str, float]) -> str:
        cells = (
            f"{values[name]:{max(6, len(name))}.3f}" if name in values else " " * max(6, len(name))
            for name in names
        )
        return "  ".join([label.ljust(width), *cells])

    lines = ["  ".join(["run".ljust(width), *(name.rjust(6) for name in names)])]
    lines += [line(run["run"], run["scores"]) for run in results["runs"]]
    if by_step := _steps_of_one(results):
        # Not a mean over steps, but which step is best by which score
        higher_is_better = [name for name in ("dino", "dino_masked", "clip_i", "clip_t") if name in names]
        best = []
        for name in higher_is_better:
            scores = {run["scores"].get(name, -1.0): step for step, run in reversed(by_step.items())}
            best.append(f"{name} is highest at step {scores[max(scores)]}")
        lines.append(", ".join(best))
    elif len(results["runs"]) > 1:
        lines.append(line("mean", _means(results["runs"], names)))
    return "\n".join(lines)


def _means(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    return {
        name: statistics.fmean(run["scores"][name] for run in runs if name in run["scores"]) for name in names
    }


def _steps_of_one(results: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Scores by step, of several subjects their means, if all are steps of one run (RUN@100, RUN@200), else nothing."""
    named = [
        re.fullmatch(r"(?P<run>.+)@(?P<step>\d+)(?P<scale>:[^:]*)?", _but_subject(run["run"]))
        for run in results["runs"]
    ]
    if (
        len(named) < 2
        or len({(name["run"], name["scale"]) if name else name for name in named}) > 1
        or not named[0]
    ):
        return {}
    runs: dict[int, list[Mapping[str, Any]]] = {}
    for name, run in zip(named, results["runs"], strict=True):
        if name:
            runs.setdefault(int(name["step"]), []).append(run)
    scores = {step: {score for run in of for score in run["scores"]} for step, of in runs.items()}
    return {step: {"scores": _means(of, sorted(scores[step]))} for step, of in runs.items()}


def _but_subject(label: str) -> str:
    """A run's label without the token that tells one of its several subjects."""
    return re.sub(r" \(.*?\)(?=$|:)", "", label)
