"""The scores of an evaluation as CSV, JSON and lines."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.protocol import Evaluation
from coeffdiff.evaluation.report import RunPage, write_report
from coeffdiff.utils.atomic import atomic_write


def write_results(evaluation: Evaluation, pages: Sequence[RunPage]) -> None:
    """JSON, CSV and page, each whole. Raises: ConfigError if the disk refuses."""
    try:
        with atomic_write(evaluation.numbers) as unfinished:
            unfinished.write_text(
                json.dumps(evaluation.results, indent=1, default=str) + "\n", encoding="utf-8"
            )
        with atomic_write(evaluation.table) as unfinished:
            unfinished.write_text(csv_of(evaluation.results["runs"]), encoding="utf-8")
        with atomic_write(evaluation.report) as unfinished:
            write_report(evaluation.results, pages, unfinished)
    except OSError as error:
        raise ConfigError(f"{evaluation.folder} cannot be written: {error.strerror or error}.") from None


def csv_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row for each run: what it is, then its scores; scores that a run has not are left empty."""
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
        # A mean over steps says nothing; which step is best by which score does
        better = [name for name in ("dino", "dino_masked", "clip_i", "clip_t") if name in names]
        said = []
        for name in better:
            scores = {run["scores"].get(name, -1.0): step for step, run in reversed(by_step.items())}
            said.append(f"{name} is highest at step {scores[max(scores)]}")
        lines.append(", ".join(said))
    elif len(results["runs"]) > 1:
        every = {
            name: [run["scores"][name] for run in results["runs"] if name in run["scores"]] for name in names
        }
        lines.append(line("mean", {name: statistics.fmean(values) for name, values in every.items()}))
    return "\n".join(lines)


def _steps_of_one(results: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The runs by step, if all are steps of one run (RUN@100, RUN@200), else nothing."""
    named = [
        re.fullmatch(r"(?P<run>.+)@(?P<step>\d+)(?P<scale>:[^:]*)?", run["run"]) for run in results["runs"]
    ]
    if (
        len(named) < 2
        or len({(name["run"], name["scale"]) if name else name for name in named}) > 1
        or not named[0]
    ):
        return {}
    return {int(name["step"]): run for name, run in zip(named, results["runs"], strict=True) if name}
