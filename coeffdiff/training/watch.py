"""What a run shows of itself while it goes on: trackers, scores of validation pictures, the best adapter, curves.

Everything here is the main process's; elsewhere a Watch does nothing. None of it changes what a step computes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image
from torch import Tensor

from coeffdiff.config import Settings, as_tree
from coeffdiff.console import progress, say
from coeffdiff.data.photos import PhotoSet, fill
from coeffdiff.errors import ConfigError
from coeffdiff.files import appearing
from coeffdiff.method.adapter import AdapterHeader
from coeffdiff.metrics import (
    Encoders,
    References,
    joined,
    load_clip,
    load_dino,
    plain_text,
    references_of,
    score_pictures,
)
from coeffdiff.sampling import GRID_FILE
from coeffdiff.training.curves import CURVES, draw_curves
from coeffdiff.training.prepare import Trainables
from coeffdiff.training.state import RunFolder, StepLog

# --- scores ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Encoders, the photos as they see them, and what each validation picture was asked to show, in order."""

    encoders: Encoders
    references: References
    texts: Sequence[str]

    def scores(self, files: Sequence[Path]) -> dict[str, float]:
        """What score_pictures finds with these encoders and photos, and score: what the best adapter is chosen by."""
        pictures = []
        for file in files:
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
        found = score_pictures(self.encoders, self.references, pictures, self.texts)
        return {name: round(value, 6) for name, value in (found | {"score": selection_score(found)}).items()}


def judge_for(settings: Settings, photos: PhotoSet) -> Judge | None:
    """The encoders that the settings name, after a look at the photos; None if there is nothing to score.

    They stay on the CPU: a handful of pictures takes a second there, and the GPU's memory is the training's.
    Raises: ModelError if an encoder cannot be had.
    """
    validation, subject = settings.validation, settings.subject
    if not (validation.prompts and (validation.dino or validation.clip)):
        return None
    encoders = Encoders(
        load_dino(validation.dino) if validation.dino else None,
        load_clip(validation.clip) if validation.clip else None,
    )
    say(f"scores   by {' and '.join(encoders.names().values())} at each validation")
    seen = []
    with progress("looking at the photos", len(photos.photos)) as bar:
        for number, photo in enumerate(photos.photos, 1):
            seen.append(references_of(encoders, [photo.open()], [photo.open_mask()]))
            bar(number)
    token = str(subject.token)
    prompts = dict.fromkeys(fill(prompt, token, subject.class_word) for prompt in validation.prompts)
    texts = [plain_text(prompt, token) for prompt in prompts for _ in validation.seeds]
    return Judge(encoders, joined(seen), texts)


def selection_score(scores: Mapping[str, float]) -> float:
    """One number to choose an adapter by: the geometric mean of subject fidelity and text alignment.

    Subject fidelity is DINO's, which tells individuals of a kind apart better than CLIP-I (DreamBooth, section
    4), or CLIP-I where there is no DINO; where photos have masks, it is fidelity to those without their
    background, so that an adapter is not chosen for having learned that too. Training on raises it and, once
    photos are copied, lowers CLIP-T, so either alone would choose the first or the last step. Their cosines
    live on scales of their own (real photos have a DINO of some 0.8, good prompts a CLIP-T of some 0.3), and a
    sum would hear the larger one only; in a product a loss of one per cent in one is paid for by a gain of one
    per cent in the other, and dividing each by its value at the first validation, or any other, would change no
    order. Where a cosine is negative, as on the first steps, the lower one is the score, so that rising still
    counts. With one encoder that has no partner the score is what there is.
    """
    fidelities = ("dino_masked", "dino", "clip_i_masked", "clip_i")
    subject = next((scores[name] for name in fidelities if name in scores), None)
    parts = [part for part in (subject, scores.get("clip_t")) if part is not None]
    if not parts:
        return 0.0
    if any(math.isnan(part) for part in parts):
        return -1.0  # pictures that are none are the worst
    return min(parts) if min(parts) < 0 else math.prod(parts) ** (1 / len(parts))


# --- trackers --------------------------------------------------------------------------------------------------


def check_watching(settings: Settings) -> None:
    """Raises: ConfigError for a tracker that cannot be used, and for a best that nothing could find."""
    for name, wanted in (
        ("tensorboard", settings.tracking.tensorboard),
        ("wandb", settings.tracking.wandb),
    ):
        if wanted and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} needs the package {name}, which is not installed: pip install {name}, or leave "
                "the setting out."
            )
    if settings.tracking.wandb and not _wandb_may_start():
        raise ConfigError(
            "tracking.wandb needs an account: run `wandb login`, or set WANDB_MODE=offline to keep everything in the "
            "run folder."
        )
    validation = settings.validation
    if validation.keep == "best":
        if not (validation.dino or validation.clip):
            raise ConfigError(
                "validation.keep best needs scores, so name an encoder: validation.dino=facebook/dino-vits16, and "
                "validation.clip=openai/clip-vit-base-patch32 so that text counts too."
            )
        if not validation.prompts or not validation.every:
            what = "validation.prompts" if validation.every else "validation.every"
            raise ConfigError(f"validation.keep best chooses among validations, so it needs {what}.")


def _wandb_may_start() -> bool:
    if os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY"):
        return True
    wandb: Any = importlib.import_module("wandb")
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)  # before 0.31


def trackers_for(settings: Settings, run: RunFolder) -> list[GeneralTracker]:
    """Accelerate's trackers that the settings ask for, not started; their files go into the run folder."""
    found: list[GeneralTracker] = []
    if settings.tracking.tensorboard:
        found.append(TensorBoardTracker("tensorboard", run.path))
    if settings.tracking.wandb:
        found.append(WandBTracker(settings.tracking.project))
    return found


def start_trackers(accelerator: Accelerator, settings: Settings, run: RunFolder, step: int) -> None:
    """Start them where the run stands: what an earlier process logged beyond this step is dropped.

    Raises: ConfigError if one refuses.
    """
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.log_with:
        if tracker.name == "tensorboard":
            # Steps from here on are written again; what is there of them, by a run that was killed, counts no more.
            tracker.init_kwargs = {"purge_step": step + 1}
        else:
            # The same run goes on under its own id. Its steps only ever rise: repeated ones are ignored there.
            tracker.init_kwargs = {
                "dir": str(run.path), "name": run.path.name, "id": _wandb_id(run), "resume": "allow",
                "config": as_tree(settings),
            }  # fmt: skip
    try:
        accelerator.init_trackers(settings.tracking.project)
    except Exception as error:  # each service has its own exceptions
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"The trackers cannot be started: {first}.") from error


def _wandb_id(run: RunFolder) -> str:
    file = run.path / "wandb" / "run-id.txt"
    if not file.is_file():
        with appearing(file) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of the log as trackers want it: {"grad_norm": {"lora": 1}} is grad_norm/lora; rates bear the names that
    the norms have, as both come group by group. What is not a finite number is left out."""
    groups = list(line.get("grad_norm") or ())
    flat: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, list | tuple):
            names = groups if len(groups) == len(value) else range(len(value))
            flat |= {f"{key}/{name}": part for name, part in zip(names, value, strict=True)}
        elif isinstance(value, dict):
            flat |= {f"{key}/{name}": part for name, part in value.items()}
        elif key != "step":
            flat[key] = value
    return {
        key: float(value)
        for key, value in flat.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


# --- the run, watched ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """The adapter to be kept, as far as is known. tensors: the trainables by name, on the CPU."""

    step: int
    loss: float
    scores: dict[str, float]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Made:
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
        say(f"scores   step {step}: {_listed(self.scores)}")
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
                say(f"hint     {self._run.path / CURVES} cannot be written: {error.strerror or error}")

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
            say("hint     validation was changed, so the best adapter is looked for anew from here on")
            return
        self.best = Best(best["step"], best["loss"], best["scores"], tensors)

    def _measure(self) -> dict[str, Any]:
        """What must be equal for two scores to be comparable within a run."""
        validation = self._settings.validation.model_dump(mode="json")
        return {name: validation[name] for name in ("prompts", "seeds", "steps", "guidance", "dino", "clip")}

    @contextmanager
    def choice(self, trainables: Trainables, made: Made, last: bool) -> Iterator[Made]:
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
            say(f"kept     the adapter of step {best.step}, score {best.scores['score']:.3f}{of}")
        steps = {"trained_steps": best.step, "run_steps": made.header.trained_steps if last else None}
        pictures = sorted(self._run.samples(best.step).glob("*.png"))  # those that are still there
        before = trainables.tensors()
        trainables.restore(best.tensors)
        try:
            yield Made(made.header.model_copy(update=steps), best.loss, pictures, best.scores)
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


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
