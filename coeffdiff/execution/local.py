"""Tasks one after the other in this process, which is the only worker."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coeffdiff.execution.performing import perform
from coeffdiff.execution.tasks import MakeWorker, Outcome, Progress, Task, Watcher, Worker
from coeffdiff.utils.interruptions import Stop


class LocalExecutor:
    @contextmanager
    def open(self, make_worker: MakeWorker, output: Path) -> Iterator[LocalPool]:
        """Raises: what `make_worker` raises."""
        yield LocalPool(make_worker())


class LocalPool:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def ask(self, work: Any) -> Any:
        """See Pool."""
        return self._worker(work)

    def run(self, tasks: Iterable[Task], stop: Stop, watcher: Watcher) -> Iterator[Outcome]:
        """See Pool."""
        for task in tasks:
            if stop.asked:
                return
            watcher.at(task, Progress())
            outcome = perform(self._worker, task, stop, functools.partial(watcher.at, task))
            if outcome.state == "stopped":
                stop.ask()
            yield outcome
