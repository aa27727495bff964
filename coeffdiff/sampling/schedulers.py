"""diffusers' schedulers by name, on the base model's noise schedule."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
from typing import Any

import diffusers
from diffusers.utils import DummyObject

from coeffdiff.errors import ConfigError
from coeffdiff.sampling.sampler_names import find_sampler, used


def set_scheduler(pipe: Any, name: str) -> None:
    """Give the pipeline a scheduler of diffusers by name, on the noise schedule that the model was trained with.

    Args:
        name: A1111's, ComfyUI's or kohya's (see sampler_names.py), such as DPM++ 2M Karras; or a class name in any
            case, with or without "Scheduler" and "Discrete", or an unambiguous beginning of one: euler,
            EulerAncestralDiscreteScheduler, euler-a, unipc, ddim, dpmsolver_multistep.
    Raises: ConfigError for an unknown or ambiguous name, and for a scheduler that cannot be used.
    """
    choices = schedulers(pipe)
    named = find_sampler(name)
    if isinstance(named, str):
        raise ConfigError(f"The scheduler {name!r} cannot be had: {named}. {_LISTED}")
    wanted = _scheduler_key(named.scheduler if named else name)
    found = [key for key in choices if key == wanted] or [
        key for key in choices if wanted and key.startswith(wanted)
    ]
    if len(found) != 1:
        usable = ", ".join(sorted(_scheduler_label(cls) for cls, lacks in choices.values() if not lacks))
        if found:
            several = " or ".join(sorted(_scheduler_label(choices[key][0]) for key in found))
            raise ConfigError(f"The scheduler {name!r} may be {several}. There are {usable}.")
        near = difflib.get_close_matches(wanted, [key for key in choices if not choices[key][1]], 1, 0.4)
        hint = f" Did you mean {_scheduler_label(choices[near[0]][0])}?" if near else ""
        raise ConfigError(
            f"diffusers has no scheduler {name!r} for this model.{hint} There are {usable}. {_LISTED}"
        )
    cls, lacks = choices[found[0]]
    if lacks:
        instead = " Without it there is DPM++ 2M SDE." if cls.__name__ == "DPMSolverSDEScheduler" else ""
        raise ConfigError(f"{cls.__name__} cannot be used: {lacks}.{instead}")
    accepted = inspect.signature(cls.__init__).parameters
    unknown = [key for key in named.spacing if key not in accepted] if named else []
    if unknown:
        raise ConfigError(
            f"The scheduler {name!r} cannot be had: {cls.__name__} of diffusers has no {unknown[0]}. Name it without "
            f"that, or another with it, such as DPM++ 2M Karras. {_LISTED}"
        )
    if named and named.settings.get("use_beta_sigmas") and importlib.util.find_spec("scipy") is None:
        raise ConfigError(
            f"The scheduler {name!r} cannot be used: it needs scipy (pip install scipy). Without it there is "
            f"{_scheduler_label(cls)} Karras."
        )
    fixed = {
        # Defaults made for pixels between -1 and 1; latents go far beyond.
        "clip_sample": False,
        # SDXL's own values, lacking where its config was written by a scheduler that does not have them. Without
        # the first PNDM needs steps by the dozen.
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        # What this one falls back to anyway, with a message on every call.
        "lower_order_final": True,
    }
    overrides = (dict(named.settings) if named else {}) | _noise_schedule(pipe.scheduler) | fixed
    # Spelled out, because from_config forgets values that were the old class's defaults.
    pipe.scheduler = cls.from_config(
        pipe.scheduler.config, **{key: value for key, value in overrides.items() if key in accepted}
    )


_LISTED = "A1111's and ComfyUI's names are listed by coeffdiff sample --list-schedulers."


def schedulers(pipe: Any) -> dict[str, tuple[Any, str]]:
    """The choices of set_scheduler: short name -> class, and why it cannot be used here ("" if it can)."""
    # diffusers does not list LCM among them, although it reads the same configs
    known = {*pipe.scheduler.compatibles, type(pipe.scheduler), diffusers.LCMScheduler}
    return {_scheduler_key(cls.__name__): (cls, _why_not(cls, pipe.scheduler)) for cls in known}


def _why_not(cls: Any, current: Any) -> str:
    if isinstance(cls, DummyObject):
        missing = [name for name in cls._backends if importlib.util.find_spec(name) is None]
        return f"it needs {' and '.join(missing)} (pip install {' '.join(missing)})"
    accepted = inspect.signature(cls.__init__).parameters
    lost = [key for key, value in _noise_schedule(current).items() if value and key not in accepted]
    return f"it knows nothing of this model's {', '.join(lost)}" if lost else ""


def _noise_schedule(scheduler: Any) -> dict[str, Any]:
    """The part of a scheduler's config that the model was trained with."""
    trained_with = (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
        *("prediction_type", "rescale_betas_zero_snr"),
    )
    return {key: scheduler.config[key] for key in trained_with if key in scheduler.config}


def _scheduler_key(name: str) -> str:
    return re.sub(r"scheduler$|[^a-z0-9]", "", name.strip().lower()).replace("discrete", "")


def _scheduler_label(cls: type) -> str:
    return cls.__name__.removesuffix("Scheduler").replace("Discrete", "")


def settings_of_scheduler(scheduler: Any) -> dict[str, Any]:
    """The settings that differ from the defaults of the scheduler's class, if any, for a recipe."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    found = used(scheduler, {name: one.default for name, one in parameters.items()})
    return {"scheduler_settings": found} if found else {}
