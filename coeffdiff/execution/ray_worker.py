"""The actor: a worker in a process of a Ray cluster. It needs no Ray itself, and runs as well without."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffdiff import __version__
from coeffdiff.errors import CoeffDiffError
from coeffdiff.execution.marker import Marker
from coeffdiff.execution.performing import perform
from coeffdiff.execution.tasks import MakeWorker, Outcome, Progress, Task, Worker
from coeffdiff.utils.interruptions import Stop, stoppable


@dataclass(frozen=True)
class Place:
    """Where a command was given: its version and its working directory."""

    version: str
    folder: Path


class RayWorker:
    """`prepare` and `do` are called one at a time; `progress` and `stop` meanwhile, in a thread of their own."""

    def __init__(self, make_worker: MakeWorker, marker: Marker, place: Place) -> None:
        self._make_worker, self._marker, self._place = make_worker, marker, place
        self._worker: Worker | None = None
        self._progress = Progress()
        self._stop: Stop | None = None
        self._stops = False

    def prepare(self) -> str | None:
        """Make the worker. Returns: why there can be none."""
        here = f"The worker on {socket.gethostname()}"
        if __version__ != self._place.version:
            return (
                f"{here} has coeffdiff {__version__}, and this command is {self._place.version}; install the same on "
                "all machines."
            )
        if not self._marker.seen():
            return (
                f"{here} does not see {self._marker.folder} as this machine does; all machines of the cluster need a "
                "file system that they share, with the photos and --output on it."
            )
        if not self._place.folder.is_dir():
            return f"{here} has no folder {self._place.folder}, where this command was given; see to it that it has."
        os.chdir(self._place.folder)  # what paths without a beginning are seen from
        try:
            self._worker = self._worker or self._make_worker()
        except CoeffDiffError as error:
            return f"{here}: {error}"
        return None

    def ask(self, work: Any) -> Any:
        assert self._worker
        return self._worker(work)

    def do(self, task: Task) -> Outcome:
        assert self._worker
        self._progress = Progress()
        with stoppable("stopping") as self._stop:
            if self._stops:
                self._stop.ask()
            return perform(self._worker, task, self._stop, self._at)

    def progress(self) -> Progress:
        return self._progress

    def stop(self) -> None:
        """End what is being done early, and whatever comes after it."""
        self._stops = True
        if self._stop:
            self._stop.ask()

    def _at(self, progress: Progress) -> None:
        self._progress = progress
