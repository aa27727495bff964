"""A worker of a batch: it keeps the base model, and trains and scores one subject after another."""

from __future__ import annotations

import datetime
import functools
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from coeffdiff.batch.entries import write_entry
from coeffdiff.batch.finished import asked_settings, check_contents
from coeffdiff.batch.plan import Scoring, SubjectTask
from coeffdiff.batch.scores import load_judges, scores_of_run
from coeffdiff.config.schema import Settings
from coeffdiff.errors import TrainingError
from coeffdiff.evaluation.facts import device_name
from coeffdiff.method.adapter_file import read_header
from coeffdiff.models.kept import KeptModel
from coeffdiff.training.launch import start_processes
from coeffdiff.training.loop import train
from coeffdiff.training.resolve import free_memory
from coeffdiff.training.resuming import with_asked
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.step_log import read_log
from coeffdiff.utils.atomic import unfinished
from coeffdiff.utils.locks import try_lock
from coeffdiff.utils.tracebacks import forget_locals


class SubjectBusy(TrainingError):  # noqa: N818
    """Another batch trains this subject now."""


class SubjectWorker:
    """Called with a task, it leaves the subject's run finished, whatever was there of it before."""

    def __init__(self) -> None:
        self._model = KeptModel()
        self._judges = functools.cache(load_judges)

    def __call__(self, task: SubjectTask) -> dict[str, Any]:
        """Returns: what the table says of it. Raises: CoeffDiffError; SubjectBusy if another batch is at it."""
        with try_lock(task.log) as mine:
            if mine is False:
                raise SubjectBusy(f"Another batch trains {task.name} now.")
            # In place of what an earlier batch had made of it, lest that is taken for this one's work
            write_entry(task.entry, {"name": task.name, "state": "begun"})
            try:
                return self._done(task)
            except BaseException as error:
                forget_locals(error)  # or what the training held would outlive what is freed here
                raise
            finally:
                free_memory(start_processes())
                if task.settings.training.compile:
                    torch._dynamo.reset()  # what it keeps of this loan of the model is of no use for the next

    def _done(self, task: SubjectTask) -> dict[str, Any]:
        run, reads = RunFolder(Path(task.settings.output)), self._model.reads
        how = self._trained(run, task.settings)
        scores = self._scored(run, task.scoring) if task.scoring else {}
        made = {"device": device_name(start_processes().device), "date": datetime.date.today().isoformat()}
        read = self._model.reads - reads
        return {"how": how, **_facts(run), "scores": scores, "networks_read": read, "made": made}

    def _trained(self, run: RunFolder, settings: Settings) -> str:
        """Returns: trained, continued or unchanged. Raises: ResumeError for other settings or photos than before."""
        if not run.config.is_file():
            _clear_unclaimed(run)
            train(settings, load=self._model.load)
            return "trained"
        continued = with_asked(run, asked_settings(settings))
        if run.finished and continued.training.steps == run.settings().training.steps:
            check_contents(run, continued)
            return "unchanged"
        train(continued, resume=run, load=self._model.load)
        return "continued"

    def _scored(self, run: RunFolder, scoring: Scoring) -> dict[str, float]:
        return scores_of_run(run, scoring, load=self._model.load, judges=self._judges)


def _clear_unclaimed(run: RunFolder) -> None:
    """Remove what claim() leaves if it is killed: an unfinished config.yaml, an empty folder of checkpoints. Where
    anything else lies beside them all of it stays, and is refused."""
    left = set(run.path.iterdir()) if run.path.is_dir() else set()
    checkpoints, begun = run.path / "checkpoints", unfinished(run.config)
    if left <= {checkpoints, *begun}:
        with suppress(OSError):  # not empty, or no folder: somebody else's
            if checkpoints in left:
                checkpoints.rmdir()
            for file in begun:
                file.unlink()


def _facts(run: RunFolder) -> dict[str, Any]:
    lines = list(read_log(run.log))
    return {
        "adapter": str(run.adapter),
        "steps": read_header(run.adapter).trained_steps,
        "loss": lines[-1]["loss"] if lines else None,
        "training_seconds": round(sum(line["seconds"] for line in lines), 1),
    }
