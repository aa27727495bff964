"""Tasks on a real Ray cluster of this machine: two workers, one of which is killed; and what is refused."""

from __future__ import annotations

import builtins
import functools
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import coeffdiff
from coeffdiff.errors import Interrupted, LaunchError, PhotoError, TaskDefect, WorkerLost
from coeffdiff.execution.marker import Marker
from coeffdiff.execution.ray_executor import MAX_STARTS, RayExecutor
from coeffdiff.execution.ray_worker import Place, RayWorker
from coeffdiff.execution.rounds import run_round
from coeffdiff.execution.tasks import Progress, Task
from coeffdiff.utils.console import print_info, progress
from coeffdiff.utils.interruptions import Stop


class Deadly:
    """A worker that counts its tasks in a file each; `once` kills it the first time, `always` every time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, time.time()

    def __call__(self, work: str) -> Any:
        with (self.folder / f"{work}.count").open("a") as count:
            count.write("x")
        tries = len((self.folder / f"{work}.count").read_text())
        print_info(f"try {tries}")
        if work == "always" or (work == "once" and tries == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if work == "unsent":
            return threading.Lock()  # which cannot be pickled
        if work == "fails":
            raise PhotoError("There are no photos.")
        return os.getpid(), self.made


class Stopping:
    """A Watcher that asks for a stop as soon as a task is begun."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def at(self, task: Task, progress: Progress) -> None:
        pass

    def waiting(self, workers: int, of: int) -> None:
        self.stop.ask()


def die(folder: Path) -> None:
    with (folder / "made.count").open("a") as count:
        count.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def importable(monkeypatch):
    """Workers find what is defined here."""
    pytest.importorskip("ray", reason="Ray is the extra coeffdiff[ray]")
    paths = [str(Path(__file__).parent), str(Path(coeffdiff.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_workers_that_die_while_they_are_made_end_it(tmp_path, importable):
    with RayExecutor(workers=1).open(functools.partial(die, tmp_path), tmp_path) as pool:
        (tmp_path / "ray.log").unlink()  # as another batch does that ends earlier
        with pytest.raises(LaunchError, match="lost 3 times before it was ready"):
            pool.ask("anything")
    assert (tmp_path / "made.count").read_text() == "x" * MAX_STARTS


def test_lost_workers_tasks_start_again_and_no_other_does(tmp_path, importable):
    """Nine tasks on two workers: one that kills its worker once is done at the second try, one that always kills it is
    given up after three; all others are done once, by workers that are made once in each of their processes. A result
    that cannot be sent is no loss of a worker. After Ctrl-C a lost worker's task is stopped, at its first try."""
    names = ["a", "once", "b", "fails", "always", "c", "d", "e", "unsent"]
    tasks = [Task(name, name, tmp_path / "logs" / f"{name}.log") for name in names]
    executor = RayExecutor(workers=2)
    with executor.open(functools.partial(Deadly, tmp_path), tmp_path) as pool:
        outcomes = {one.task.name: one for one in run_round(pool, tasks, "tasks")}
        pid, _ = pool.ask("asked")
        stop = Stop()
        last = Task("stopping", "always", tmp_path / "logs" / "stopping.log")
        [stopped] = pool.run([last], stop, Stopping(stop))
    assert (stopped.state, stopped.starts) == ("stopped", 1) and isinstance(stopped.error, Interrupted)
    assert isinstance(outcomes["unsent"].error, TaskDefect) and "lock" in str(outcomes["unsent"].error)
    assert outcomes.keys() == set(names)
    counts = {name: len((tmp_path / f"{name}.count").read_text()) for name in names}
    assert counts == dict.fromkeys(names, 1) | {"once": 2, "always": MAX_STARTS + 1}
    counts["always"] -= 1  # the one after Ctrl-C
    assert {name: one.starts for name, one in outcomes.items()} == counts
    assert isinstance(outcomes["always"].error, WorkerLost) and isinstance(
        outcomes["fails"].error, PhotoError
    )
    made = dict(one.result for one in outcomes.values() if one.state == "done")
    assert all(one.result in made.items() for one in outcomes.values() if one.state == "done")
    assert "try 2" in (tmp_path / "logs" / "once.log").read_text()
    assert not list(tmp_path.glob(".seen-*"))  # the mark is gone
    with pytest.raises(ProcessLookupError):  # nothing is left running
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)


def test_without_ray_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    def without(name, *rest, **more):
        if name == "ray":
            raise ImportError(name)
        return real(name, *rest, **more)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    opening = RayExecutor().open(Deadly, tmp_path)
    with pytest.raises(LaunchError, match=r"pip install 'coeffdiff\[ray\]'"), opening:
        pass


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"marker": Marker(Path("elsewhere"), "mark")}, "does not see elsewhere as this machine does"),
        ({"place": Place("0.0", Path.cwd())}, "has coeffdiff 0.0|and this command is 0.0"),
        ({"make_worker": lambda: Deadly()}, None),
    ],
)
def test_a_worker_says_why_it_cannot_be_one(tmp_path, change, sentence):
    """On a machine without the folder, or with another version; a defect in making it comes through."""
    (tmp_path / "mark").touch()
    given = {
        "make_worker": lambda: Deadly(tmp_path),
        "marker": Marker(tmp_path, "mark"),
        "place": Place(coeffdiff.__version__, Path.cwd()),
    }
    assert RayWorker(**given).prepare() is None
    worker = RayWorker(**given | change)
    if sentence is None:
        with pytest.raises(TypeError):
            worker.prepare()
    else:
        assert re.search(sentence, str(worker.prepare()))


def test_a_worker_that_is_told_to_stop_ends_what_it_is_at(tmp_path):
    """At its next bar, with where it was; and so does whatever it is given afterwards."""
    (tmp_path / "mark").touch()

    def count(work):
        with progress("counting", 3) as bar:
            bar(1)
            worker.stop()  # as the thread for control does
            bar(2)
        raise AssertionError("it went on")

    worker = RayWorker(lambda: count, Marker(tmp_path, "mark"), Place(coeffdiff.__version__, Path.cwd()))
    assert worker.prepare() is None
    for name in "ab":
        outcome = worker.do(Task(name, name, tmp_path / f"{name}.log"))
        assert outcome.state == "stopped"
    assert worker.progress().title == "counting"
