"""compare(): methods side by side on the same subjects; statistics.py draws the conclusions."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from coeffdiff.config.nested import flattened
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import save_settings, with_values
from coeffdiff.errors import ConfigError, Interrupted, LaunchError
from coeffdiff.evaluation.comparison_cells import MadeCells, work_folder
from coeffdiff.evaluation.comparison_plan import Comparison, Job, Outcome, strip_name
from coeffdiff.evaluation.comparison_runner import ComparisonRunner
from coeffdiff.evaluation.comparison_subjects import subject_named
from coeffdiff.evaluation.comparison_text import table_of
from coeffdiff.evaluation.report import write_comparison
from coeffdiff.evaluation.statistics import summarize
from coeffdiff.execution.local import LocalExecutor
from coeffdiff.execution.rounds import run_round
from coeffdiff.execution.tasks import Executor, Pool, Task
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import print_info
from coeffdiff.utils.launch_environment import read_launch
from coeffdiff.utils.locks import try_lock
from coeffdiff.utils.output_folder import refuse_unwritable

LOCAL = LocalExecutor()


def compare(
    plan: Comparison,
    output: Path,
    executor: Executor = LOCAL,
    part: tuple[int, int] = (1, 1),
    pack_as: str | None = None,
) -> Outcome:
    """Compute the missing cells of a plan, and write the results of all of them.

    Args:
        output: folder of the comparison; cells that are in it are not computed again.
        executor: whose workers train and score; machines of one kind (the precision is a part of a cell).
        part: (k, n): only every n-th subject and seed, from the k-th on, for machines that share no folder.
        pack_as: name of the file below cells/ that the plan's cells are packed into at the end, without .jsonl; None
            leaves each in a file of its own, which is easier to gather from several machines.
    Raises: CoeffDiffError with one sentence, after all jobs that can be done; what is finished stays.
    """
    if read_launch().size > 1:
        raise LaunchError(
            "compare shares its work among workers of its own: start it once, with --executor ray --workers N, "
            "without accelerate launch."
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name another --output.")
    refuse_unwritable(output)
    _check(plan)
    made = MadeCells(output)
    with executor.open(functools.partial(ComparisonRunner, plan, output), output) as pool:
        jobs: list[Job] = pool.ask(None)
        output.mkdir(parents=True, exist_ok=True)
        with _alone(output):
            return _compared(plan, made, output, jobs, pool, part, pack_as)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Raises: ConfigError if another process compares in this folder."""
    with try_lock(output) as mine:
        if mine is False:
            raise ConfigError(
                f"Another compare is at work in {output}; wait for its end, or share its work among workers with "
                "--executor ray --workers N."
            )
        yield


def _compared(
    plan: Comparison,
    made: MadeCells,
    output: Path,
    jobs: list[Job],
    pool: Pool,
    part: tuple[int, int],
    pack_as: str | None,
) -> Outcome:
    with atomic_write(output / "asked.yaml") as unfinished:
        save_settings(plan, unfinished)
    # All arms of a subject and seed stay together: they share the base model's pictures, and are compared
    share = [job for i, job in enumerate(jobs) if i // len(plan.arms) % part[1] == part[0] - 1]
    unfinished_jobs = [job for job in share if made.missing_points(job)]
    cells = sum(len(job.points) for job in jobs)
    done = cells - sum(len(made.missing_points(job)) for job in jobs)
    print_info(f"plan     {cells} cells, {done} of them computed before")
    for subject in {job.subject.name: job.subject for job in unfinished_jobs}.values():
        subject.write_photos()
    tasks = [Task(job.label, job, work_folder(output, job) / "log.txt") for job in unfinished_jobs]
    try:
        ended = list(run_round(pool, tasks, "trainings"))
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            _conclude(plan, made, output, jobs)
        raise
    outcome = _conclude(plan, made, output, jobs)
    if len(ended) < len(tasks) or any(one.state == "stopped" for one in ended):
        raise Interrupted("Stopped, and the step is saved. The same command goes on from there.")
    if error := next((one.error for one in ended if one.error), None):
        raise error
    if pack_as:
        made.cells.pack(pack_as, (cell for job in jobs for cell in job.cells.values()))
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


def _conclude(plan: Comparison, made: MadeCells, output: Path, jobs: Sequence[Job]) -> Outcome:
    """Read every cell of the plan that is there, and write the summary, the table, the plot and the page."""
    cells: list[dict[str, Any]] = []
    missing: list[str] = []
    for job in jobs:
        for point in job.points:
            cell = made.read(job, point)
            if cell:
                cells.append(cell)
            else:
                missing.append(f"{job.label}, {point.steps} steps at scale {point.scale:g}")
    ends = {job.arm: job.end for job in jobs}
    results = summarize(
        cells, {arm: (end.steps, end.scale) for arm, end in ends.items()}, plan.reference, missing
    )
    report = output / "report.html"
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
        if (strip := work_folder(output, job) / strip_name(job.end)).is_file()
    }
    write_comparison(results, cells, photos, strips, output)
    return Outcome(output, report, results, missing)
