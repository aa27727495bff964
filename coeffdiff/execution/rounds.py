"""A round of tasks in front of a person: progress in one place, Ctrl-C ends it with everything saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coeffdiff.execution.tasks import Outcome, Pool, Progress, Task
from coeffdiff.utils.board import Board, board
from coeffdiff.utils.interruptions import stoppable

STOPPING = "stopping: what is being done is saved first (press Ctrl-C again to stop at once, without saving)"


def run_round(pool: Pool, tasks: Sequence[Task], title: str) -> Iterator[Outcome]:
    """The outcomes, as tasks end; of those that a Ctrl-C kept from beginning there are none."""
    with stoppable(STOPPING) as stop, board(title, len(tasks)) as seen:
        for outcome in pool.run(tasks, stop, _OnBoard(seen)):
            seen.ended(outcome.task.name, outcome.state != "done")
            yield outcome


class _OnBoard:
    """A Watcher that shows what it is told."""

    def __init__(self, seen: Board) -> None:
        self._seen = seen

    def at(self, task: Task, progress: Progress) -> None:
        self._seen.at(task.name, progress.title, progress.done, progress.total, progress.status)

    def waiting(self, workers: int, of: int) -> None:
        self._seen.note(f"{workers} of {of} workers" if workers < of else "")
