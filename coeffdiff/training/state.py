"""The run folder: claimed once, written atomically, exact to resume.

config.yaml                     everything resolved
log.jsonl                       one line a step
checkpoints/step-000500/        trainables.safetensors, optimizer.pt, state.json (and best-*.safetensors), adapter/
adapters/step-000200/           an adapter of every N-th step, with training.keep_adapters_every
samples/step-000500/*.png       validation pictures
curves.png                      the log as a picture
tensorboard/, wandb/            if they were asked for
adapter/                        the result
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from coeffdiff.config import Settings, differences, given_settings, load_settings, save_settings, with_values
from coeffdiff.errors import AdapterError, ConfigError, ResumeError, TrainingError
from coeffdiff.files import appearing, held, sweep
from coeffdiff.method.adapter import read_header

RUNS = Path("runs")
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """All that a step leaves behind. tensors: the trainables by name, float32; the rest are state_dicts.

    watched: what Watch.state() says of the validations so far; best: the trainables of the best of them, if it is to
    be kept, or nothing.
    """

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    photos: list[str]  # what tells them and their captions apart, in order: others would be another run
    samples_a_step: int  # over all processes
    loss: float
    watched: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)  # see fingerprints; nothing in older checkpoints


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def kept_adapter(self, step: int) -> Path:
        return self.path / "adapters" / f"step-{step:06d}"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, newest first."""
        found = [(int(m[1]), p) for p in self.path.glob("checkpoints/*") if (m := _STEP.fullmatch(p.name))]
        return [path for _, path in sorted(found, reverse=True)]

    @property
    def finished(self) -> bool:
        """Whether the adapter has all the steps that the settings ask for, or was chosen after them."""
        try:
            header = read_header(self.adapter)
            made = header.trained_steps if header.run_steps is None else header.run_steps
            return made >= int(self.settings().training.steps)
        except (AdapterError, ValueError):
            return False

    def settings(self) -> Settings:
        return load_settings(self.config)


def new_run(output: Path | Literal["auto"], token: str) -> RunFolder:
    """Where a new run will go; nothing is created yet. Raises: ConfigError if `output` holds something already."""
    if output != "auto":
        path = Path(output)
        if _is_taken(path):
            held = (
                "holds a run; continue it with --resume"
                if (path / "config.yaml").exists()
                else "is not empty"
            )
            raise ConfigError(f"{path} {held}, or name another --output. Nothing was changed.")
        return RunFolder(path)
    return RunFolder(next(path for path in _names(token) if not _is_taken(path)))


def _is_taken(path: Path) -> bool:
    """Raises: ConfigError for a path that cannot be one, such as a name that is too long."""
    try:
        return path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise ConfigError(f"The run folder {path} cannot be: {error.strerror or error}.") from None


def claim(run: RunFolder, settings: Settings) -> None:
    """Create the folder and its config.yaml. Raises: ConfigError if another process was faster, or the disk refuses."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / "checkpoints").mkdir()  # exclusive: of two runs that chose the same name, one fails here
        with appearing(run.config) as temporary:
            save_settings(settings, temporary)
    except FileExistsError:
        raise ConfigError(
            f"{run.path} has just been taken by another run; start again or name an --output."
        ) from None
    except OSError as error:
        with suppress(OSError):
            (run.path / "checkpoints").rmdir()
            run.path.rmdir()
        raise ConfigError(f"The run folder {run.path} cannot be written: {error.strerror}.") from None


@contextmanager
def alone_in(run: RunFolder) -> Iterator[None]:
    """Hold a run's folder until the block ends or the process does, and clear what a kill left in it.

    Where folders cannot be held (see files.held) nothing is held and nothing cleared.
    Raises: ResumeError if another process trains there.
    """
    with held(run.path) as mine:
        if mine is False:
            raise ResumeError(
                f"Another process is training in {run.path} now; wait for its end, or name another --output."
            )
        if mine:
            sweep(run.path)
        yield


def store(run: RunFolder, settings: Settings) -> None:
    """Replace config.yaml, since a continued run may have more steps to go."""
    with appearing(run.config) as temporary:
        save_settings(settings, temporary)


def run_to_resume(output: Path | Literal["auto"], token: str | None) -> RunFolder:
    """The run that --resume means: `output`, or else the newest unfinished one (of this token).

    Raises: ResumeError if there is none.
    """
    if output != "auto":
        run = RunFolder(Path(output))
        if not run.config.is_file():
            raise ResumeError(f"{run.path} holds no run to resume (it has no config.yaml).")
        return run
    paths = _existing(token) if token else [p for p in sorted(RUNS.glob("*")) if p.is_dir()]
    runs = [RunFolder(path) for path in paths if (path / "config.yaml").is_file()]
    if not runs:
        raise ResumeError(f"There is no run to resume under {RUNS}/{_folder_name(token) if token else ''}.")
    unfinished = [run for run in runs if not run.finished]
    return max(unfinished or runs, key=lambda run: run.config.stat().st_mtime)


# What may differ between a run and its continuation: none of it changes what a step computes, or by its rounding alone.
_FREE = (
    *("output", "photos.cache", "validation.", "tracking.", "method.coeff.backend"),
    *("training.checkpoint_every", "training.keep_checkpoints", "training.keep_adapters_every"),
    *("training.log_every", "training.compile", "training.gradient_checkpointing"),
    *("training.batch_size", "training.accumulate"),  # their product with the processes counts: continuing.py
)
# Where something lies, which is known by its content: continuing.py compares that
_PLACES = ("subject.images", "prior.images", "model.name", "model.vae", "model.config")


def settings_to_resume(
    run: RunFolder, file: Path | None, flags: dict[str, Any], assignments: Iterable[str]
) -> Settings:
    """The run's own settings with what was asked for on top; "auto" asks for nothing.

    More steps are fine as long as the learning rate does not depend on how many there are.
    Raises: ResumeError naming the settings that would make it another run, with both values.
    """
    stored, asked = run.settings(), given_settings(file, flags, assignments)
    asked = {name: value for name, value in asked.items() if value != "auto" and name != "output"}
    continued = with_values(stored, asked)
    free = (*_FREE, *_idle(stored))
    changed = {
        name: pair
        for name, pair in differences(stored, continued).items()
        if not name.startswith(free) and not (name in _PLACES and _known_by_content(run, name, pair))
    }
    if stored.training.lr_schedule in ("constant", "constant_with_warmup"):
        changed.pop("training.steps", None)
    if changed:
        shown = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
        raise ResumeError(f"{run.path} began with other settings: {shown}. Drop them, or start a new run.")
    return continued


def _idle(settings: Settings) -> tuple[str, ...]:
    """Beginnings of the settings' names that take no part, as the method has no such part."""
    kind = settings.method.kind
    learning = {"coeff": "coeff" in kind, "lora": "lora" in kind, "token": settings.learns_token}
    parts = [part for part, learns in learning.items() if not learns]
    return tuple(name for part in parts for name in (f"method.{part}.", f"training.clip_{part}"))


def _known_by_content(run: RunFolder, name: str, pair: tuple[Any, Any]) -> bool:
    """Whether another place for something is no other setting, since a checkpoint says what has to be there."""
    old, new = pair
    if name == "prior.images" and (old is None or new is None):  # another kind of prior preservation
        return False
    if not name.startswith("model.") or not run.checkpoints():  # nothing has been learned of the model yet
        return True
    try:
        newest = json.loads((run.checkpoints()[0] / "state.json").read_text(encoding="utf-8"))
        if newest.get("model"):
            return True
    except (OSError, ValueError, AttributeError):
        return True  # load_checkpoint says what there is to say
    # An older version's checkpoint does not say what its model was
    return None not in pair and Path(old).expanduser().resolve() == Path(new).expanduser().resolve()


def save_checkpoint(
    run: RunFolder, checkpoint: Checkpoint, keep: int, write_adapter: Callable[[Path], None] | None = None
) -> Path:
    """Write under a temporary name, flush to the disk, rename, and drop all but the newest `keep`.

    write_adapter: makes the folder that it is given an adapter folder, by which a checkpoint can be tried out.
    Raises: TrainingError if the disk refuses; the checkpoints before it are untouched.
    """
    final = run.checkpoint(checkpoint.step)
    rest = {
        name: getattr(checkpoint, name)
        for name in ("step", "schedule", "photos", "samples_a_step", "loss", "watched", "model")
    }
    try:
        with appearing(final, durable=True) as temporary:
            temporary.mkdir()
            states = io.BytesIO()  # written by Python, whose errors say "No space left on device"
            torch.save({"optimizer": checkpoint.optimizer, "scaler": checkpoint.scaler}, states)
            (temporary / "optimizer.pt").write_bytes(states.getbuffer())
            (temporary / "trainables.safetensors").write_bytes(save(checkpoint.tensors))
            if checkpoint.best:
                (temporary / _best_file(checkpoint.watched)).write_bytes(save(checkpoint.best))
            (temporary / "state.json").write_text(json.dumps(rest), encoding="utf-8")
            if write_adapter:
                write_adapter(temporary / "adapter")
    except (OSError, SafetensorError) as error:
        last = next(iter(run.checkpoints()), None)
        kept = f"The last good checkpoint is {last}." if last else "There is no earlier checkpoint."
        raise TrainingError(
            f"The checkpoint of step {checkpoint.step} cannot be written to {final.parent} "
            f"({getattr(error, 'strerror', None) or error}). {kept} Make room, then continue with train --resume."
        ) from None
    for old in run.checkpoints()[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for litter in final.parent.glob(".*"):  # what a kill left half-written
        shutil.rmtree(litter, ignore_errors=True)
    return final


def amend_checkpoint(run: RunFolder, step: int, watched: dict[str, Any], best: dict[str, Tensor]) -> None:
    """Add to a step's checkpoint what its validation has found since; at every moment it reads back whole."""
    folder = run.checkpoint(step)
    with disk_errors(f"The checkpoint {folder}"):
        if best and not (folder / _best_file(watched)).exists():
            with appearing(folder / _best_file(watched), durable=True) as temporary:
                temporary.write_bytes(save(best))
        rest = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        with appearing(folder / "state.json", durable=True) as temporary:
            temporary.write_text(json.dumps(rest | {"watched": watched}), encoding="utf-8")


def _best_file(watched: dict[str, Any]) -> str:
    """Named by its step, so that state.json and the tensors it speaks of can be replaced one after the other."""
    return f"best-{watched['best']['step']:06d}.safetensors"


def load_checkpoint(run: RunFolder) -> Checkpoint | None:
    """The newest checkpoint that reads back whole, or None if there is none. Nothing is ever unpickled freely.

    Raises: ResumeError if there are some and none of them reads back.
    """
    for folder in run.checkpoints():
        try:
            rest = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            tensors = load((folder / "trainables.safetensors").read_bytes())  # a path must be UTF-8 for it
            states = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            found = bool(rest.get("watched", {}).get("best"))
            best = load((folder / _best_file(rest["watched"])).read_bytes()) if found else {}
            return Checkpoint(tensors=tensors, best=best, **states, **rest)
        except (
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
            EOFError,
            KeyError,
            RecursionError,
            SafetensorError,
            pickle.UnpicklingError,
        ):
            continue
    if run.checkpoints():
        raise ResumeError(f"None of the checkpoints of {run.path} can be read; it cannot be continued.")
    return None


class StepLog:
    """log.jsonl: one line a step, on the disk as soon as it is written; lines beyond a resumed step are dropped.

    Only the main process writes; elsewhere `writes` is False and nothing happens.
    """

    def __init__(self, file: Path, begun_at: int, writes: bool = True) -> None:
        self._file = None
        if not writes:
            return
        with disk_errors(f"The log {file}"):
            kept = [json.dumps(line) + "\n" for line in read_log(file) if line["step"] <= begun_at]
            with appearing(file) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
            self._file = file.open("a", encoding="utf-8")

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            with suppress(OSError):  # on a full disk the line that could not be written has been told already
                self._file.close()

    def amend(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the line of a step that has been written, of the log as a whole or not at all.

        Raises: TrainingError if the disk is full.
        """
        if not self._file:
            return
        file, closed = Path(self._file.name), self._file.closed
        with disk_errors(f"The log {file}"):
            self._file.close()
            lines = [line | _finite(values) if line["step"] == step else line for line in read_log(file)]
            with appearing(file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            if not closed:
                self._file = file.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Numbers that are not finite become null, as JSON has none. Raises: TrainingError if the disk is full."""
        if self._file:
            with disk_errors(f"The log {self._file.name}"):
                self._file.write(json.dumps(_finite(line)) + "\n")
                self._file.flush()


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a disk that is full or read-only into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"{what} cannot be written: {reason}. Make room, then continue with --resume."
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log.jsonl, one a step; what cannot be read is left out."""
    if not file.is_file():
        return
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the line that a kill cut short
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def _folder_name(token: str) -> str:
    return re.sub(r"[^\w.-]+", "-", token).strip(".-") or "subject"


def _names(token: str) -> Iterator[Path]:
    """runs/sks, runs/sks-2, runs/sks-3, ..."""
    name, number = _folder_name(token), 1
    while True:
        yield RUNS / (name if number == 1 else f"{name}-{number}")
        number += 1


def _existing(token: str) -> list[Path]:
    pattern = re.compile(re.escape(_folder_name(token)) + r"(-\d+)?")
    return [path for path in sorted(RUNS.glob("*")) if path.is_dir() and pattern.fullmatch(path.name)]
