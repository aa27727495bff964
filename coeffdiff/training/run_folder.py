"""The run folder: claimed once, locked by one process, written atomically."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import save_settings
from coeffdiff.errors import AdapterError, ConfigError, ResumeError, TrainingError
from coeffdiff.method.adapter_file import read_header
from coeffdiff.utils.atomic import atomic_write, sweep
from coeffdiff.utils.locks import try_lock

RUNS = Path("runs")


_STEP = re.compile(r"step-(\d+)")


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
        except (AdapterError, ConfigError, ValueError):  # perhaps of another version
            return False

    def settings(self) -> Settings:
        return load_settings(self.config)


def new_run(output: Path | Literal["auto"], token: str) -> RunFolder:
    """Where a new run will go; nothing is created yet. Raises: ConfigError if `output` holds something already."""
    if output != "auto":
        path = Path(output)
        if _is_taken(path):
            what = (
                "holds a run; continue it with --resume"
                if (path / "config.yaml").exists()
                else "is not empty"
            )
            raise ConfigError(f"{path} {what}, or name another --output. Nothing was changed.")
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
        with atomic_write(run.config) as temporary:
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
def lock_run(run: RunFolder) -> Iterator[None]:
    """Hold a run's folder until the block ends or the process does, and clear what a kill left in it.

    Where folders cannot be held (see utils/locks.try_lock) nothing is held and nothing cleared.
    Raises: ResumeError if another process trains there.
    """
    with try_lock(run.path) as mine:
        if mine is False:
            raise ResumeError(
                f"Another process is training in {run.path} now; wait for its end, or name another --output."
            )
        if mine:
            sweep(run.path)
        yield


def store(run: RunFolder, settings: Settings) -> None:
    """Replace config.yaml, since a continued run may have more steps to go."""
    with atomic_write(run.config) as temporary:
        save_settings(settings, temporary)


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


def folder_name_of(token: str) -> str:
    return re.sub(r"[^\w.-]+", "-", token).strip(".-") or "subject"


def _names(token: str) -> Iterator[Path]:
    """runs/sks, runs/sks-2, runs/sks-3, ..."""
    name, number = folder_name_of(token), 1
    while True:
        yield RUNS / (name if number == 1 else f"{name}-{number}")
        number += 1


def first_existing(token: str) -> list[Path]:
    pattern = re.compile(re.escape(folder_name_of(token)) + r"(-\d+)?")
    return [path for path in sorted(RUNS.glob("*")) if path.is_dir() and pattern.fullmatch(path.name)]
