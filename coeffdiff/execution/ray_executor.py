"""Tasks on the actors of a Ray cluster, which starts lost actors again; what they were at goes to the next free one.

Ray's own ActorPool and max_task_retries would wait for the same actor to come back, which it does not when its machine
is gone for good.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coeffdiff import __version__
from coeffdiff.errors import LaunchError, WorkerLost
from coeffdiff.execution.marker import marked
from coeffdiff.execution.ray_cluster import Cluster, cluster
from coeffdiff.execution.ray_worker import Place, RayWorker
from coeffdiff.execution.tasks import MakeWorker, Outcome, Progress, Task, Watcher
from coeffdiff.utils.console import print_error
from coeffdiff.utils.interruptions import Stop

MAX_STARTS = 3  # of a task, before it is what ends its workers
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
            actors = [kind.remote(make_worker, marker, place) for _ in range(joined.workers)]
            yield RayPool(joined, actors)


class RayPool:
    """Actors, each of which is being prepared, free, or at a task."""

    def __init__(self, joined: Cluster, actors: list[Any]) -> None:
        self._ray, self._joined = joined.ray, joined
        self._prepared_by = {self._prepare(actor): actor for actor in actors}
        self._free: list[Any] = []
        self._at: dict[Any, tuple[Any, Task]] = {}  # what a task will give -> its actor, the task

    def ask(self, work: Any) -> Any:
        """See Pool."""
        while not self._free:
            self._next(_Nobody())
        try:
            return self._ray.get(self._free[0].ask.remote(work))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError:
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
            outcome = self._next(watcher)
            if outcome is None:
                continue
            if outcome.state == "stopped":
                stop.ask()
            outcome = replace(outcome, starts=starts[outcome.task.name])
            if isinstance(outcome.error, WorkerLost) and outcome.starts < MAX_STARTS and not stop.asked:
                waiting.appendleft(outcome.task)
                continue
            yield outcome

    def _next(self, watcher: Watcher) -> Outcome | None:
        """Wait a moment for an actor. Returns: what became of its task, if it was at one."""
        watcher.waiting(len(self._free) + len(self._at), self._joined.workers)
        ended, _ = self._ray.wait([*self._at, *self._prepared_by], timeout=_LOOK_SECONDS)
        if not ended:
            self._look(watcher)
            return None
        if ended[0] in self._prepared_by:
            self._settle(ended[0])
            return None
        actor, task = self._at.pop(ended[0])
        try:
            outcome: Outcome = self._ray.get(ended[0])
        except self._ray.exceptions.RayError:
            self._prepared_by[self._prepare(actor)] = actor
            lost = (
                f"The worker was lost {MAX_STARTS} times with it (killed, or out of memory?); see {task.log}."
            )
            return Outcome(task, "failed", error=WorkerLost(lost))
        self._free.append(actor)
        return outcome

    def _settle(self, prepared: Any) -> None:
        """An actor is ready, or will never be. Raises: LaunchError if it was the last."""
        actor = self._prepared_by.pop(prepared)
        try:
            complaint = self._ray.get(prepared)
        except self._ray.exceptions.RayError as error:
            complaint = f"A worker cannot be made: {' '.join(str(error).split())[-300:]}"
        if complaint is None:
            self._free.append(actor)
            return
        if not (self._free or self._at or self._prepared_by):
            raise LaunchError(complaint)
        print_error(f"{complaint} The others go on without it.")

    def _prepare(self, actor: Any) -> Any:
        return actor.prepare.options(max_task_retries=-1).remote()  # as soon as Ray has started it again

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


class _Nobody:
    """A Watcher that does not look."""

    def at(self, task: Task, progress: Progress) -> None:
        pass

    def waiting(self, workers: int, of: int) -> None:
        pass
