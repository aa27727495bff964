"""The cells of a comparison that are there, and where its jobs do their work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coeffdiff.evaluation.cells import CellFolder, slug
from coeffdiff.evaluation.comparison_plan import Job, Point


class MadeCells:
    """The finished cells in the folder of a comparison."""

    def __init__(self, output: Path) -> None:
        self.cells = CellFolder(output / "cells")

    def read(self, job: Job, point: Point) -> dict[str, Any] | None:
        """A cell under the name that this plan gives its arm; None if it is not there, or not whole."""
        cell = self.cells.read(job.cells[point])
        return cell | {"arm": job.arm} if cell else None

    def missing_points(self, job: Job) -> list[Point]:
        """The points of a job that have no cell yet."""
        return [point for point in job.points if self.read(job, point) is None]


def work_folder(output: Path, job: Job) -> Path:
    return output / "work" / f"{slug(f'{job.subject.name}-{job.arm}-s{job.seed}')}-{job.key}"
