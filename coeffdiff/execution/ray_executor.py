"""Tasks on the actors of a Ray cluster; for one that is lost another is made, and its task goes to the next free one.

Ray's own max_restarts would start an actor for ever that ends while it is made, and its ActorPool and max_task_retries
would wait for the same actor to come back, which it does not when its machine is gone for good.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coeffdiff import __version__
from coeffdiff.errors import Interrupted, LaunchError, TaskDefect, WorkerLost
from coeffdiff.execution.marker import marked
from coeffdiff.execution.ray_cluster import Cluster, cluster
from coeffdiff.execution.ray_worker import Place, RayWorker
from coeffdiff.execution.tasks import MakeWorker, Outcome, Progress, Task, Watcher
from coeffdiff.utils.console import print_error
from coeffdiff.utils.interruptions import Stop

MAX_STARTS = 3  # of a task, before it is what ends its workers; and of a worker, before it is ready
_LOOK_SECONDS = 0.5  # between looks at where tasks are


@dataclass(frozen=True)
class RayExecutor:
    """See cluster() for address and workers."""

    address: str | None = None
    workers: int | None = None

    @contextmanager
    def open(self, make_worker: MakeWorker, output: Path) -> Iterator[RayPool]:
        """Raises: LaunchError without Ray or such a cluster."""
        output.mkdir(parents=True, exist_ok=True)
        with marked(output) as marker, cluster(self.address, self.workers, output / "ray.log") as joined:
            kind = joined.ray.remote(**joined.options)(RayWorker)
            place = Place(__version__, Path.cwd())
            yield RayPool(joined, lambda: kind.remote(make_worker, marker, place))


class RayPool:
    """Actors, each of which is being prepared, free, or at a task."""

    def __init__(self, joined: Cluster, make_actor: Callable[[], Any]) -> None:
        self._ray, self._joined, self._make_actor = joined.ray, joined, make_actor
        # What `prepare` will give -> its actor, and how many were lost in its place before any was ready
        self._prepared_by: dict[Any, tuple[Any, int]] = {}
        self._free: list[Any] = []
        self._at: dict[Any, tuple[Any, Task]] = {}  # what a task will give -> its actor, the task
        for _ in range(joined.workers):
            self._begin_actor()

    def ask(self, work: Any) -> Any:
        """See Pool."""
        while not self._free:
            self._next(_Nobody())
        actor = self._free[0]
        try:
            return self._ray.get(actor.ask.remote(work))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError:
            self._free.remove(actor)
            self._replace(actor)
            raise WorkerLost(
                "The worker was lost before it could plan (killed, or out of memory?)."
            ) from None

    def run(self, tasks: Iterable[Task], stop: Stop, watcher: Watcher) -> Iterator[Outcome]:
        """See Pool. Raises: LaunchError if no worker can be made."""
        waiting, starts = deque(tasks), Counter[str]()
        told = False
        while self._at or (waiting and not stop.asked):
            while self._free and waiting and not stop.asked:
                task = waiting.popleft()
                starts[task.name] += 1
                actor = self._free.pop()
                self._at[actor.do.remote(task)] = (actor, task)
            if stop.asked and not told:
                told = True
                for actor, _ in self._at.values():
                    self._control(actor, "stop")
            ended = self._next(watcher)
            if ended is None:
                continue
            task, outcome = ended
            if outcome is None:
                outcome = _lost(task, starts[task.name], stopping=stop.asked)
            if outcome is None:
                waiting.appendleft(task)
                continue
            if outcome.state == "stopped":
                stop.ask()
            yield replace(outcome, starts=starts[task.name])

    def _next(self, watcher: Watcher) -> tuple[Task, Outcome | None] | None:
        """Wait for an actor. Returns: the task that it was at, if any, and its outcome, None if it was lost."""
        watcher.waiting(len(self._free) + len(self._at), self._joined.workers)
        ended, _ = self._ray.wait([*self._at, *self._prepared_by], timeout=_LOOK_SECONDS)
        if not ended:
            self._look(watcher)
            return None
        if ended[0] in self._prepared_by:
            self._settle(ended[0])
            return None
        actor, task = self._at.pop(ended[0])
        outcome: Outcome | None = None
        try:
            outcome = self._ray.get(ended[0])
        except self._ray.exceptions.RayTaskError as error:
            # Around the task, as an outcome that cannot be sent
            outcome = Outcome(task, "failed", error=TaskDefect(f"The task's worker failed: {_cause(error)}"))
        except self._ray.exceptions.RayError:
            self._replace(actor)
            return task, None
        self._free.append(actor)
        return task, outcome

    def _settle(self, prepared: Any) -> None:
        """An actor is ready, or will never be. Raises: LaunchError if it was the last."""
        actor, lost = self._prepared_by.pop(prepared)
        try:
            complaint = self._ray.get(prepared)
        except self._ray.exceptions.RayTaskError as error:
            complaint = f"A worker cannot be made: {_cause(error)}."
        except self._ray.exceptions.RayError as error:
            if lost + 1 < MAX_STARTS:
                self._replace(actor, lost + 1)
                return
            complaint = (
                f"A worker cannot be made: it was lost {MAX_STARTS} times before it was ready (killed, or out of "
                f"memory?): {' '.join(str(error).split())[-300:]}"
            )
        if complaint is None:
            self._free.append(actor)
            return
        if not (self._free or self._at or self._prepared_by):
            raise LaunchError(complaint)
        print_error(f"{complaint} The others go on without it.")

    def _begin_actor(self, lost: int = 0) -> None:
        actor = self._make_actor()
        self._prepared_by[actor.prepare.remote()] = (actor, lost)

    def _replace(self, actor: Any, lost: int = 0) -> None:
        # It could not be reached, perhaps, and would be at the task together with another
        self._ray.kill(actor)
        self._begin_actor(lost)

    def _look(self, watcher: Watcher) -> None:
        """Ask all that are at a task where they are; those that do not answer are lost, or will answer next time."""
        asked = {self._control(actor, "progress"): task for actor, task in self._at.values()}
        answered, _ = (
            self._ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_SECONDS) if asked else ([], [])
        )
        for answer in answered:
            try:
                watcher.at(asked[answer], self._ray.get(answer))
            except self._ray.exceptions.RayError:
                continue

    def _control(self, actor: Any, method: str) -> Any:
        return getattr(actor, method).options(concurrency_group="control").remote()


def _lost(task: Task, starts: int, *, stopping: bool) -> Outcome | None:
    """What became of a task whose worker was lost; None: it begins again. starts: how often it had begun."""
    if starts >= MAX_STARTS:
        what = f"The worker was lost {starts} times with it (killed, or out of memory?); see {task.log}."
        return Outcome(task, "failed", error=WorkerLost(what))
    if stopping:
        return Outcome(task, "stopped", error=Interrupted("The worker was lost while it was to stop."))
    return None


def _cause(error: Any) -> str:
    """What a RayTaskError came of, in a line."""
    return f"{type(error.cause).__name__}: {error.cause}".split("\n")[0][:300]


class _Nobody:
    """A Watcher that does not look."""

    def at(self, task: Task, progress: Progress) -> None:
        pass

    def waiting(self, workers: int, of: int) -> None:
        pass
