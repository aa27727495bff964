"""How far a run is, read from its folder and from what its training has printed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffdiff.errors import ConfigError
from coeffdiff.sampling.output import GRID_FILE
from coeffdiff.training.run_folder import RUNS, RunFolder
from coeffdiff.training.step_log import read_log
from coeffdiff.ui.training_process import Training, last_training, log_of
from coeffdiff.utils.console import duration

_ERROR = re.compile(r"[A-Za-z.]+(Error|Loss|Mismatch|Memory|Picture): ")
_ASKED = re.compile(r"Interrupted: |KeyboardInterrupt")
_STEP = re.compile(r"step-(\d+)")
MOST_PICTURES = 48
_TAIL_BYTES = 20_000


@dataclass(frozen=True)
class RunState:
    """step: the last one in the log; steps: how many are asked for, None where nothing says so yet.

    error: the sentence that ended the training. stopping: whether the page has asked for its end.
    resumable: whether --resume would have something to do; saved: whether a checkpoint is there.
    begun: whether the training that runs has come to its steps. killed: whether it ended without saying so.
    """

    run: Path
    running: bool
    step: int
    steps: int | None
    line: dict[str, Any]
    finished: bool
    resumable: bool
    error: str | None
    stopping: bool = False
    saved: bool = False
    begun: bool = True
    killed: bool = False

    @property
    def sentence(self) -> str:
        if self.running and self.stopping:
            return stopping_sentence(self.begun)
        if self.running and not (self.begun and self.step):
            return "Starting: photos and model are read."
        if self.running and self.step == self.steps:
            return f"Training: all {self.steps} steps are done; the last pictures are made."
        if self.running:
            return f"Training: step {self.step} of {self.steps}{self._left}."
        if self.finished:
            return f"Finished after {self.steps} steps; the adapter is in {self.run / 'adapter'}."
        if self.error:
            return self.error
        if self.killed:
            return f"The training ended without a word {self._after} (killed, out of memory?); {self._again}."
        if self.saved or self.step:
            return f"Stopped {self._after}; {self._again}."
        return "Nothing was trained yet."

    @property
    def _after(self) -> str:
        of = f" of {self.steps}" if self.steps else ""
        return f"after step {self.step}{of}" if self.step else "before its first step"

    @property
    def _again(self) -> str:
        if self.saved:
            return "Resume goes on from the last checkpoint"
        return "Resume begins anew, as there is no checkpoint" if self.resumable else "Start begins anew"

    @property
    def _left(self) -> str:
        loss, seconds = self.line.get("loss"), self.line.get("seconds")
        said = f", loss {loss:.4f}" if isinstance(loss, int | float) else ""
        if isinstance(seconds, int | float) and self.steps:
            said += f", about {duration(seconds * (self.steps - self.step))} left without pictures"
        return said


def stopping_sentence(begun: bool) -> str:
    """What happens to a training that was asked to stop. begun: whether it has come to its steps."""
    if begun:
        return "Stopping: this step ends first, then a checkpoint is saved."
    return "Stopping: it has not come to its steps, so there is nothing to save."


def has_begun(training: Training) -> bool:
    """Whether a training has come to its steps, since when its log is new."""
    try:
        return RunFolder(Path(training.run)).log.stat().st_mtime >= training.created
    except OSError:
        return False


def read_state(run: Path) -> RunState:
    folder, training = RunFolder(run), last_training()
    running = training is not None and Path(training.run) == run and training.running
    lines = list(read_log(folder.log))
    try:
        steps = int(folder.settings().training.steps) if folder.config.is_file() else None
    except (ConfigError, ValueError):  # of another version
        steps = None
    finished = not running and steps is not None and folder.finished
    return RunState(
        run=run,
        running=running,
        step=lines[-1]["step"] if lines else 0,
        steps=steps,
        line=lines[-1] if lines else {},
        finished=finished,
        resumable=not running and not finished and folder.config.is_file(),
        error=None if running or finished else error_in(printed(run)),
        stopping=running and training is not None and training.stopping,
        saved=bool(folder.checkpoints()),
        begun=training is None or not running or has_begun(training),
        killed=not running and not finished and _ended_silently(run),
    )


def find_runs() -> list[Path]:
    """Runs of the working folder, the newest first, and the one that is just being started."""
    runs = sorted(RUNS.glob("*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    found = [file.parent for file in runs]
    training = last_training()
    if training and training.running and Path(training.run) not in found:
        found.insert(0, Path(training.run))
    return found


def printed(run: Path) -> str:
    """The end of what the training of a run has printed; empty for one that the page did not start."""
    try:
        with log_of(run).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def error_in(text: str) -> str | None:
    """The last line, where it is an error's."""
    lines = text.strip().splitlines()
    return lines[-1] if lines and _ERROR.match(lines[-1]) else None


def _ended_silently(run: Path) -> bool:
    """Whether the page's training of a run ended without an error, a result or a word on Ctrl-C."""
    if not log_of(run).is_file():
        return False
    lines = printed(run).strip().splitlines()
    last = lines[-1] if lines else ""
    return not (_ERROR.match(last) or _ASKED.match(last) or last == str(RunFolder(run).adapter))


def validation_pictures(run: Path) -> list[tuple[str, str]]:
    """Files and their steps in words, those of the newest step first; prompts stand in the files."""
    found = [
        (int(step[1]), file)
        for file in run.glob("samples/step-*/*.png")
        if file.name != GRID_FILE and (step := _STEP.fullmatch(file.parent.name))
    ]
    found.sort(key=lambda pair: (-pair[0], pair[1].name))
    return [(str(file), f"step {step}") for step, file in found[:MOST_PICTURES]]
