"""Checkpoints: everything that an exact resume needs."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from coeffdiff.errors import ResumeError, TrainingError
from coeffdiff.training.run_folder import RunFolder, disk_errors
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import print_info

_AVERAGE_FILE = "average.safetensors"


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
    average: dict[str, Tensor] = field(default_factory=dict)  # of the trainables, if one is kept
    averaged_steps: int = 0


def save_checkpoint(
    run: RunFolder, checkpoint: Checkpoint, keep: int, write_adapter: Callable[[Path], None] | None = None
) -> Path:
    """Write under a temporary name, flush to the disk, rename, and drop all but the newest `keep`.

    Checkpoints of later steps go first: the run has passed them over, since they cannot be read.
    write_adapter: makes the folder that it is given an adapter folder, by which a checkpoint can be tried out.
    Raises: TrainingError if the disk refuses; the checkpoints before it are untouched.
    """
    final = run.checkpoint(checkpoint.step)
    rest = {
        name: getattr(checkpoint, name)
        for name in (
            "step",
            "schedule",
            "photos",
            "samples_a_step",
            "loss",
            "watched",
            "model",
            "averaged_steps",
        )
    }
    try:
        with atomic_write(final, durable=True) as temporary:
            temporary.mkdir()
            states = io.BytesIO()  # written by Python, whose errors say "No space left on device"
            torch.save({"optimizer": checkpoint.optimizer, "scaler": checkpoint.scaler}, states)
            (temporary / "optimizer.pt").write_bytes(states.getbuffer())
            (temporary / "trainables.safetensors").write_bytes(save(checkpoint.tensors))
            if checkpoint.average:
                (temporary / _AVERAGE_FILE).write_bytes(save(checkpoint.average))
            if checkpoint.best:
                (temporary / _best_file(checkpoint.watched)).write_bytes(save(checkpoint.best))
            (temporary / "state.json").write_text(json.dumps(rest), encoding="utf-8")
            if write_adapter:
                write_adapter(temporary / "adapter")
    except (OSError, SafetensorError) as error:
        kept = last_good(run) or "There is no earlier checkpoint."
        raise TrainingError(
            f"The checkpoint of step {checkpoint.step} cannot be written to {final.parent} "
            f"({getattr(error, 'strerror', None) or error}). {kept} Make room, then continue with train --resume."
        ) from None
    found = run.checkpoints()
    place = found.index(final)
    for old in (*found[:place], *found[place + keep :]):
        shutil.rmtree(old, ignore_errors=True)
    for litter in final.parent.glob(".*"):  # what a kill left half-written
        shutil.rmtree(litter, ignore_errors=True)
    return final


def amend_checkpoint(run: RunFolder, step: int, watched: dict[str, Any], best: dict[str, Tensor]) -> None:
    """Add to a step's checkpoint what its validation has found since; at every moment it reads back whole."""
    folder = run.checkpoint(step)
    with disk_errors(f"The checkpoint {folder}"):
        if best and not (folder / _best_file(watched)).exists():
            with atomic_write(folder / _best_file(watched), durable=True) as temporary:
                temporary.write_bytes(save(best))
        rest = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        with atomic_write(folder / "state.json", durable=True) as temporary:
            temporary.write_text(json.dumps(rest | {"watched": watched}), encoding="utf-8")


def _best_file(watched: dict[str, Any]) -> str:
    """Named by its step, so that state.json and the tensors it speaks of can be replaced one after the other."""
    return f"best-{watched['best']['step']:06d}.safetensors"


def load_checkpoint(run: RunFolder) -> Checkpoint | None:
    """The newest checkpoint that reads back whole, or None if there is none; newer ones are named on screen.

    Raises: ResumeError if there are some and none of them reads back.
    """
    newest, damaged = read_newest(run)
    if newest and damaged:
        names, many = ", ".join(folder.name for folder in damaged), len(damaged) > 1
        here = run.checkpoint(newest.step).name
        print_info(f"checkpoint{'s' * many} {names} cannot be read, going on from {here}")
    if damaged and not newest:
        raise ResumeError(f"None of the checkpoints of {run.path} can be read; it cannot be continued.")
    return newest


def last_good(run: RunFolder) -> str:
    """The newest checkpoint that reads back, in a sentence; nothing if there is none."""
    newest, _ = read_newest(run)
    return f"The last good checkpoint is {run.checkpoint(newest.step)}." if newest else ""


def read_newest(run: RunFolder) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint that reads back whole, if any, and the newer ones, which do not."""
    damaged: list[Path] = []
    for folder in run.checkpoints():
        if checkpoint := _read(folder):
            return checkpoint, damaged
        damaged.append(folder)
    return None, damaged


def _read(folder: Path) -> Checkpoint | None:
    """A checkpoint, or None if it does not read back whole. Nothing is ever unpickled freely."""
    try:
        rest = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load((folder / "trainables.safetensors").read_bytes())  # a path must be UTF-8 for it
        states = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        found = bool(rest.get("watched", {}).get("best"))
        best = load((folder / _best_file(rest["watched"])).read_bytes()) if found else {}
        averaged = rest.get("averaged_steps", 0)
        average = load((folder / _AVERAGE_FILE).read_bytes()) if averaged else {}
        return Checkpoint(tensors=tensors, best=best, average=average, **states, **rest)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        EOFError,
        KeyError,
        RecursionError,
        SafetensorError,
        pickle.UnpicklingError,
    ):
        return None
