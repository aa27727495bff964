"""What a run shows of itself: scalars, validation pictures, the best adapter, curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from coeffdiff.config.schema import Settings
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.sampling.output import GRID_FILE
from coeffdiff.training.curves import CURVES, draw_curves
from coeffdiff.training.judge import Judge
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.step_log import StepLog
from coeffdiff.training.trackers import scalars
from coeffdiff.training.trainables import Trainables
from coeffdiff.utils.console import print_info


@dataclass(frozen=True)
class Best:
    """The adapter to be kept, as far as is known. tensors: the trainables by name, on the CPU."""

    step: int
    loss: float
    scores: dict[str, float]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class FinalState:
    """What a run would leave: the adapter's header, the loss of its step, its validation pictures and their scores."""

    header: AdapterHeader
    loss: float
    pictures: Sequence[Path]
    scores: Mapping[str, float]


class Watch:
    """Takes what the loop has to tell and passes it on; knows the best validation so far.

    Its state goes into checkpoints, so that a resumed run chooses as an unbroken one does.
    """

    def __init__(
        self, run: RunFolder, settings: Settings, accelerator: Accelerator, judge: Judge | None
    ) -> None:
        self.best: Best | None = None
        self.scores: dict[str, float] = {}  # of the newest validation
        self._validated = 0  # step of it
        self._run, self._settings, self._accelerator, self._judge = run, settings, accelerator, judge

    def due(self, step: int) -> bool:
        """Whether this step's pictures are asked for and have not been made; every process gives the same answer."""
        every = self._settings.validation.every
        return bool(every and step and step % every == 0 and self._validated < step)

    def step(self, line: Mapping[str, Any]) -> None:
        """Pass a line of the log on to the trackers."""
        if self._accelerator.trackers:
            self._accelerator.log(scalars(line), step=line["step"])

    def validated(
        self, step: int, loss: float, files: Sequence[Path], log: StepLog, trainables: Trainables
    ) -> None:
        """Score the pictures of a step (files: with their grid), tell log and trackers, remember the best.

        A step that has been told before is passed over; without pictures, as after a failure, nothing is scored.
        """
        if step <= self._validated:
            return
        self._validated, self.scores = step, {}
        pictures = [file for file in files if file.name != GRID_FILE]
        self._show(step, pictures)
        if self._judge is None or not pictures:
            return
        self.scores = self._judge.scores(pictures)
        log.amend(step, {"scores": self.scores})
        self._accelerator.log({f"scores/{name}": value for name, value in self.scores.items()}, step=step)
        for line in _listed(self.scores):
            print_info(f"scores   step {step}: {line}")
        # The earlier one of equals: fewer steps, nearer to the base model.
        if self._settings.validation.keep == "best" and (
            self.best is None or self.scores["score"] > self.best.scores["score"]
        ):
            self.best = Best(step, loss, self.scores, trainables.tensors())

    def _show(self, step: int, pictures: Sequence[Path]) -> None:
        for tracker in self._accelerator.trackers:
            shown = {f"samples/{file.stem}": [Image.open(file).convert("RGB")] for file in pictures}
            if tracker.name == "tensorboard":
                for name, (picture,) in shown.items():
                    tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images(shown, step=step)

    def draw(self) -> None:
        """curves.png as the log stands. A disk that refuses it is said, and no reason to end a run."""
        if self._accelerator.is_main_process:
            try:
                draw_curves(self._run.log, self._run.path / CURVES, self.best.step if self.best else None)
            except OSError as error:
                print_info(f"hint     {self._run.path / CURVES} cannot be written: {error.strerror or error}")

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint keeps: plain values, and the best adapter's tensors."""
        best = self.best
        values: dict[str, Any] = {"validated": self._validated, "by": self._measure(), "best": None}
        values["scores"] = self.scores
        if best:
            values["best"] = {"step": best.step, "loss": best.loss, "scores": best.scores}
        return values, best.tensors if best else {}

    def restore(self, values: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of state(). A best that was measured otherwise than now is no measure any more."""
        self._validated = int(values.get("validated", 0))
        self.scores = dict(values.get("scores", {}))
        best = values.get("best")
        if not best or self._settings.validation.keep != "best":
            return
        if values.get("by") != self._measure():
            print_info("hint     validation was changed, so the best adapter is looked for anew from here on")
            return
        self.best = Best(best["step"], best["loss"], best["scores"], tensors)

    def _measure(self) -> dict[str, Any]:
        """What must be equal for two scores to be comparable within a run."""
        validation = self._settings.validation.model_dump(mode="json")
        return {name: validation[name] for name in ("prompts", "seeds", "steps", "guidance", "dino", "clip")}

    @contextmanager
    def choice(self, trainables: Trainables, made: FinalState, last: bool) -> Iterator[FinalState]:
        """Inside, the adapter to keep is on the network: what was made at the end, or the best validation's.

        Afterwards the last one is there again. last: whether all validations are in. Before that a best adapter does
        not say how many steps the run made, so that the run counts as unfinished.
        """
        best = self.best
        if best is None:
            yield made
            return
        if last:
            of = "" if best.step == self._validated else f"; the last, of step {self._validated}"
            of += f", has {self.scores['score']:.3f}" if of and self.scores else ""
            print_info(f"kept     the adapter of step {best.step}, score {best.scores['score']:.3f}{of}")
        steps = {"trained_steps": best.step, "run_steps": made.header.trained_steps if last else None}
        pictures = sorted(self._run.samples(best.step).glob("*.png"))  # those that are still there
        before = trainables.tensors()
        trainables.restore(best.tensors)
        try:
            yield FinalState(made.header.model_copy(update=steps), best.loss, pictures, best.scores)
        finally:
            trainables.restore(before)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.close()

    def close(self) -> None:
        """Let the trackers write what they hold. Accelerate's end_training would end the process group as well."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []


def _listed(scores: Mapping[str, float]) -> list[str]:
    """A line of scores; of several subjects one for each, and one of their means."""
    lines: dict[str, list[str]] = {}
    for name, value in scores.items():
        token, _, kind = name.rpartition("/")
        lines.setdefault(token, []).append(f"{kind} {value:.3f}")
    mean = "mean of all: " if len(lines) > 1 else ""
    return [(f"{token}: " if token else mean) + ", ".join(parts) for token, parts in lines.items()]
