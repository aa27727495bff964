"""Trackers: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import uuid
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from coeffdiff.config.nested import as_tree
from coeffdiff.config.schema import Settings
from coeffdiff.errors import ConfigError
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.text import first_line


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
        raise ConfigError(f"The trackers cannot be started: {first_line(error)}.") from error


def _wandb_id(run: RunFolder) -> str:
    file = run.path / "wandb" / "run-id.txt"
    if not file.is_file():
        with atomic_write(file) as temporary:
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
