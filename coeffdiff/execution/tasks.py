"""Tasks, what becomes of them, and what a pool of workers is: the words that all executors share.

A worker is made once in a process and then does one task after another; what they have in common, such as a base
model, it keeps. Executors know nothing of what tasks are about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from coeffdiff.errors import CoeffDiffError
from coeffdiff.utils.interruptions import Stop

Worker = Callable[[Any], Any]
MakeWorker = Callable[[], Worker]


@dataclass(frozen=True)
class Task:
    """name: unique among the tasks of a pool. work: what the worker is called with; can be pickled. log: the file that
    takes what is printed meanwhile, at its end."""

    name: str
    work: Any
    log: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    state: done, with the worker's result; failed, with the error; stopped before its end, since that was asked for.
    seconds: of the last try, in the worker; cpu_seconds: that it computed meanwhile, over all threads. starts: how
    often it was begun; more than once if its worker was lost.
    """

    task: Task
    state: Literal["done", "failed", "stopped"]
    result: Any = None
    error: CoeffDiffError | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    starts: int = 1


@dataclass(frozen=True)
class Progress:
    """Where a task is: the bar that its worker would draw."""

    title: str = ""
    done: float = 0.0
    total: float = 0.0
    status: str = ""


class Watcher(Protocol):
    """Is told where the tasks are."""

    def at(self, task: Task, progress: Progress) -> None: ...

    def waiting(self, workers: int, of: int) -> None:
        """So many of the workers are there."""


class Pool(Protocol):
    """Workers that are there for several rounds of tasks."""

    def ask(self, work: Any) -> Any:
        """What one of the workers answers, with nothing logged. Raises: what it raises."""

    def run(self, tasks: Iterable[Task], stop: Stop, watcher: Watcher) -> Iterator[Outcome]:
        """The outcomes, as tasks end. After `stop`, or once a task was stopped, none begins, and those that had begun
        end early.

        Tasks that never began have no outcome.
        """


class Executor(Protocol):
    """Where workers are. Calls to `open` do not overlap."""

    def open(self, make_worker: MakeWorker, output: Path) -> AbstractContextManager[Pool]:
        """A pool whose workers `make_worker` makes; it can be pickled. output: a folder that all of them write into.

        Raises: CoeffDiffError if there are none.
        """
