"""Training in a process of its own: it goes on when the page ends, and a new page finds it again.

A record beside the runs names the process; it counts as running only while a process of that number and start exists.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from coeffdiff.errors import ConfigError
from coeffdiff.training.run_folder import RUNS, new_run
from coeffdiff.ui.form import Form
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.locks import try_lock
from coeffdiff.utils.output_folder import write_errors
from coeffdiff.utils.threads import users_environment

RECORDS = RUNS / ".ui"
_RECORD = "training.json"


@dataclass(frozen=True)
class Training:
    """The process that the page started last. created: when it began, in seconds since 1970, as the system has it.

    stopping: whether it was asked to stop.
    """

    run: str
    pid: int
    created: float
    stopping: bool = False

    @property
    def running(self) -> bool:
        process = self._process()
        return process is not None

    def stop(self) -> None:
        """As Ctrl-C does: a step that has begun ends, and a checkpoint is saved.

        Asked once: a second Ctrl-C would end it unsaved.

        Raises: ConfigError if the record cannot be written; the training goes on.
        """
        process = self._process()
        if process and not self.stopping:
            _keep(replace(self, stopping=True))
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            with suppress(psutil.TimeoutExpired):
                process.wait(timeout=0)  # takes note of the end of a child, which would stay a zombie
            same = abs(process.create_time() - self.created) < 1
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def last_training() -> Training | None:
    """What the page started last, in this working folder; it may have ended."""
    try:
        return Training(**json.loads((RECORDS / _RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def log_of(run: Path) -> Path:
    """What the training of a run has printed."""
    where = run.resolve()
    elsewhere = where.parent != RUNS.resolve()
    mark = f"-{hashlib.sha256(str(where).encode()).hexdigest()[:12]}" if elsewhere else ""
    return RECORDS / f"{run.name}{mark}.log"


def start_training(form: Form) -> Training:
    """Raises: ConfigError if the settings are refused, or a training runs; later errors are in the log."""
    settings = form.settings()
    with _only_one():
        run = new_run(settings.output, settings.run_name or "subject").path
        return _start(run, [*form.arguments(), f"--output={run}"], "w")


def resume_training(run: Path) -> Training:
    """Continue a run from its newest checkpoint, or from its settings. Raises: ConfigError if a training runs."""
    with _only_one():
        return _start(run, ["--resume", f"--output={run}"], "a")


@contextmanager
def _only_one() -> Iterator[None]:
    """Of two clicks one starts. Raises: ConfigError if a training runs, or is being started."""
    with write_errors(f"The folder {RECORDS}"):
        RECORDS.mkdir(parents=True, exist_ok=True)
    with try_lock(RECORDS) as mine:
        before = last_training()
        if mine is False or (before and before.running):
            raise ConfigError(
                f"A training runs already{f' in {before.run}' if before else ''}; stop it, or wait for its end."
            )
        yield


def _start(run: Path, arguments: Sequence[str], mode: str) -> Training:
    command = [sys.executable, "-m", "coeffdiff", "train", *arguments]
    with write_errors(f"The log {log_of(run)}"), log_of(run).open(mode, encoding="utf-8") as log:
        # A session of its own: neither the page's end nor Ctrl-C in its terminal reaches it
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=users_environment(),
        )
    try:
        training = Training(str(run), process.pid, psutil.Process(process.pid).create_time())
        _keep(training)
    except BaseException:  # no page would find it again
        process.kill()
        process.wait()
        raise
    return training


def _keep(training: Training) -> None:
    with write_errors(f"The record {RECORDS / _RECORD}"), atomic_write(RECORDS / _RECORD) as temporary:
        temporary.write_text(json.dumps(asdict(training)), encoding="utf-8")
