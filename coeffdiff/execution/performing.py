"""A task done in this process: its output in its log, its progress reported, its error in an outcome."""

from __future__ import annotations

import gc
import os
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace

from coeffdiff.errors import CoeffDiffError, Interrupted, OutOfMemory, TaskDefect, TaskError
from coeffdiff.execution.tasks import Outcome, Progress, Task, Worker
from coeffdiff.utils.console import listening, print_error
from coeffdiff.utils.interruptions import Stop
from coeffdiff.utils.oom import is_out_of_memory, oom_sentence
from coeffdiff.utils.sentences import sentence_of
from coeffdiff.utils.tracebacks import strip


def perform(worker: Worker, task: Task, stop: Stop, report: Callable[[Progress], None]) -> Outcome:
    """Do a task. KeyboardInterrupt alone comes through."""
    begun, computed = time.monotonic(), time.process_time()
    try:
        outcome = _logged(worker, task, _Reporter(report, stop))
    except OSError as error:
        what = f"{task.log} cannot be written: {error.strerror or error}."
        outcome = Outcome(task, "failed", error=TaskError(what))
    took, computed = time.monotonic() - begun, time.process_time() - computed
    return replace(outcome, seconds=took, cpu_seconds=computed)


@dataclass(frozen=True)
class _Reporter:
    """A Listener that passes bars on, and ends the task at the next one when it is asked to."""

    report: Callable[[Progress], None]
    stop: Stop

    def line(self, text: str) -> None:
        """The task's log has it."""

    def progress(self, title: str, done: float, total: float, status: str) -> None:
        self.report(Progress(title, done, total, status))
        self.stop.obey()


def _logged(worker: Worker, task: Task, reporter: _Reporter) -> Outcome:
    """Raises: OSError where the log cannot be written."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with (
        task.log.open("a", encoding="utf-8", buffering=1) as log,
        redirect_stdout(log),
        redirect_stderr(log),
        listening(reporter),
    ):
        print_error(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {task.name}, process {os.getpid()} on {socket.gethostname()}"
        )
        outcome = _outcome(worker, task)
        if outcome.error:
            strip(outcome.error)  # it lives on, and would keep the task's tensors
            gc.collect()
            print_error(f"{type(outcome.error).__name__}: {outcome.error}")
    return outcome


def _outcome(worker: Worker, task: Task) -> Outcome:
    try:
        return Outcome(task, "done", worker(task.work))
    except Interrupted as error:
        return Outcome(task, "stopped", error=error)
    except CoeffDiffError as error:
        return Outcome(task, "failed", error=error)
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome(task, "failed", error=OutOfMemory(oom_sentence(error, [])))
        if sentence := sentence_of(error):
            return Outcome(task, "failed", error=TaskError(sentence))
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        return Outcome(task, "failed", error=TaskDefect(f"{what} (its traceback is in {task.log})"))
