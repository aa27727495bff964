"""compare(): methods side by side on the same subjects; statistics.py draws the conclusions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from coeffdiff.config.nested import flattened
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import save_settings, with_values
from coeffdiff.errors import ConfigError, Interrupted, LaunchError
from coeffdiff.evaluation.comparison_plan import Comparison, Job, Outcome, strip_name
from coeffdiff.evaluation.comparison_runner import ComparisonRunner
from coeffdiff.evaluation.comparison_subjects import subject_named
from coeffdiff.evaluation.comparison_text import table_of
from coeffdiff.evaluation.report import write_comparison
from coeffdiff.evaluation.statistics import summarize
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import print_info, progress
from coeffdiff.utils.launch_environment import read_launch
from coeffdiff.utils.output_folder import refuse_unwritable


def compare(
    plan: Comparison, output: Path, part: tuple[int, int] = (1, 1), pack_as: str | None = None
) -> Outcome:
    """Compute the missing cells of a plan, and write the results of all of them.

    Args:
        output: folder of the comparison; cells that are in it are not computed again.
        part: (k, n): only every n-th subject and seed, from the k-th on, for machines that share no folder, all of one
            kind (the precision is a part of a cell). Processes that share a folder need nothing: each takes jobs that
            no other is at.
        pack_as: name of the file below cells/ that the plan's cells are packed into at the end, without .jsonl; None
            leaves each in a file of its own, which is easier to gather from several machines.
    Raises: CoeffDiffError with one sentence; what is finished stays.
    """
    if read_launch().size > 1:
        raise LaunchError(
            "compare shares its work among processes that are started one by one: start the same command several "
            "times (each with a GPU of its own in CUDA_VISIBLE_DEVICES), without accelerate launch."
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name another --output.")
    refuse_unwritable(output)
    _check(plan)
    runner = ComparisonRunner(plan, output)
    jobs = runner.jobs()
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / "asked.yaml") as unfinished:
        save_settings(plan, unfinished)
    # All arms of a subject and seed stay together: they share the base model's pictures, and are compared
    share = [job for i, job in enumerate(jobs) if i // len(plan.arms) % part[1] == part[0] - 1]
    unfinished_jobs = [job for job in share if runner.missing_points(job)]
    cells = sum(len(job.points) for job in jobs)
    done = cells - sum(len(runner.missing_points(job)) for job in jobs)
    print_info(f"plan     {cells} cells, {done} of them computed before")
    try:
        with progress("trainings", len(unfinished_jobs)) as bar:
            for number, job in enumerate(unfinished_jobs):
                bar(number, job.label)
                runner.work(job)
            bar(len(unfinished_jobs))
    except Interrupted:
        _conclude(plan, runner, jobs)
        raise Interrupted("Stopped, and the step is saved. The same command goes on from there.") from None
    except Exception:
        with suppress(Exception):  # the first error is the one to report
            _conclude(plan, runner, jobs)
        raise
    outcome = _conclude(plan, runner, jobs)
    if pack_as:
        runner.cells.pack(pack_as, (runner.key(job, point) for job in jobs for point in job.points))
    return outcome


def _check(plan: Comparison) -> None:
    """Check a plan before a model is loaded. Raises: ConfigError."""
    subject_named(plan.subjects)
    for arm, given in plan.arms.items():
        if given is not None:
            try:
                with_values(Settings(), flattened(plan.settings) | flattened(given))
            except ConfigError as error:
                raise ConfigError(f"The arm {arm!r}: {error}") from None


def _conclude(plan: Comparison, runner: ComparisonRunner, jobs: Sequence[Job]) -> Outcome:
    """Read every cell of the plan that is there, and write the summary, the table, the plot and the page."""
    cells: list[dict[str, Any]] = []
    missing: list[str] = []
    for job in jobs:
        for point in job.points:
            cell = runner.read(job, point)
            if cell:
                cells.append(cell)
            else:
                missing.append(f"{job.label}, {point.steps} steps at scale {point.scale:g}")
    ends = {job.arm: job.end for job in jobs}
    results = summarize(
        cells, {arm: (end.steps, end.scale) for arm, end in ends.items()}, plan.reference, missing
    )
    output, report = runner.output, runner.output / "report.html"
    with atomic_write(output / "comparison.json") as unfinished:
        unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with atomic_write(output / "comparison.csv") as unfinished:
        unfinished.write_text(table_of(cells), encoding="utf-8")
    for subject in {job.subject.name: job.subject for job in jobs}.values():
        subject.write_photos()
    photos = {job.subject.name: job.subject.folder for job in jobs}
    strips = {
        (job.subject.name, job.arm): strip
        for job in reversed(jobs)
        if (strip := runner.work_folder(job) / strip_name(job.end)).is_file()
    }
    write_comparison(results, cells, photos, strips, output)
    return Outcome(output, report, results, missing)
