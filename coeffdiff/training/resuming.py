"""Which run is resumed, and with which settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from coeffdiff.config.idle import idle_settings
from coeffdiff.config.loading import given_settings
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import differences, with_values
from coeffdiff.errors import ConfigError, ResumeError
from coeffdiff.training.checkpoints import read_newest
from coeffdiff.training.run_folder import RUNS, RunFolder, first_existing, folder_name_of


def run_to_resume(output: Path | Literal["auto"], token: str | None) -> RunFolder:
    """The run that --resume means: `output`, or else the newest unfinished one (of this token).

    Raises: ResumeError if there is none.
    """
    if output != "auto":
        run = RunFolder(Path(output))
        if not run.config.is_file():
            raise ResumeError(f"{run.path} holds no run to resume (it has no config.yaml).")
        return run
    paths = first_existing(token) if token else [p for p in sorted(RUNS.glob("*")) if p.is_dir()]
    runs = [RunFolder(path) for path in paths if (path / "config.yaml").is_file()]
    if not runs:
        raise ResumeError(f"There is no run to resume under {RUNS}/{folder_name_of(token) if token else ''}.")
    readable = [run for run in runs if _is_readable(run)]
    unfinished = [run for run in readable if not run.finished]
    return max(unfinished or readable or runs, key=lambda run: run.config.stat().st_mtime)


def _is_readable(run: RunFolder) -> bool:
    """Whether its settings are this version's."""
    try:
        run.settings()
    except ConfigError:
        return False
    return True


# What may differ between a run and its continuation: none of it changes what a step computes, or by its rounding alone.
_FREE = (
    *("output", "photos.cache", "validation.", "tracking.", "method.coeff.backend"),
    *("training.checkpoint_every", "training.keep_checkpoints", "training.keep_adapters_every"),
    *("training.log_every", "training.compile", "training.gradient_checkpointing"),
    *("training.batch_size", "training.accumulate"),  # their product with the processes counts: continuing.py
)


# Where something lies, which is known by its content: continuing.py compares that
_PLACES = ("subject.images", "subjects", "prior.images", "model.name", "model.vae", "model.config")


def may_change(names: Iterable[str]) -> bool:
    """Whether a run that goes on may have all of these settings otherwise than it began."""
    return all(name.startswith(_FREE) for name in names)


def settings_to_resume(
    run: RunFolder, file: Path | None, flags: dict[str, Any], assignments: Iterable[str]
) -> Settings:
    """The run's own settings with what was asked for on top; "auto" asks for nothing.

    More steps are fine as long as the learning rate does not depend on how many there are.
    Raises: ResumeError naming the settings that would make it another run, with both values.
    """
    return with_asked(run, given_settings(run.settings(), file, flags, assignments))


def with_asked(run: RunFolder, asked: dict[str, Any]) -> Settings:
    """The same for checked values by dotted name, of which None and an empty mapping are asked for like any other.

    Raises: ResumeError.
    """
    stored = run.settings()
    asked = {name: value for name, value in asked.items() if value != "auto" and name != "output"}
    continued = with_values(stored, asked)
    free = (*_FREE, *idle_settings(stored))
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


def _but_for_places(subjects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Subjects without the folders that they name; another kind of prior preservation stays another."""
    return [
        subject | {"images": None, "prior_images": subject["prior_images"] is not None}
        for subject in subjects
    ]


def _known_by_content(run: RunFolder, name: str, pair: tuple[Any, Any]) -> bool:
    """Whether another place for something is no other setting, since a checkpoint says what has to be there."""
    old, new = pair
    if name == "subjects":
        return _but_for_places(old) == _but_for_places(new)
    if name == "prior.images" and (old is None or new is None):  # another kind of prior preservation
        return False
    if not name.startswith("model.") or not run.checkpoints():  # nothing has been learned of the model yet
        return True
    newest, _ = read_newest(run)
    if newest is None or newest.model:
        return True  # of none that can be read load_checkpoint says what there is to say
    # An older version's checkpoint does not say what its model was
    return None not in pair and Path(old).expanduser().resolve() == Path(new).expanduser().resolve()
