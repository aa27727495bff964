"""Requests and options of sampling, and their limits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from coeffdiff.errors import ConfigError
from coeffdiff.utils.text import has_surrogates

OnProgress = Callable[[float], None]  # how many pictures are done, a started one counted by its steps


_LARGEST_SEED = 2**63 - 1


def _check_side(name: str, pixels: int, step: int) -> None:
    nearest = max(step, step * round(pixels / step))
    if pixels != nearest:
        raise ConfigError(f"A {name} of {pixels} pixels is no multiple of {step}; {nearest} is.")


@dataclass(frozen=True)
class Request:
    """One picture. prompt: with <V> already replaced.

    scale: of the first adapter, for this picture alone; None: its own.
    """

    prompt: str
    seed: int
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ConfigError(f"The seed {self.seed} must lie between 0 and {_LARGEST_SEED}.")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError(f"A scale must be a finite number, not {self.scale}.")


@dataclass(frozen=True)
class Options:
    """Shared by all pictures of a call. width and height in pixels; None: the model's own.

    guidance of 1 or less switches classifier-free guidance off. An empty negative prompt is the model's default
    (in SDXL embeddings of zeros, in others those of an empty text). batch_size changes speed and memory, and a picture
    by at most 2/255.
    """

    steps: int = 30
    guidance: float = 5.0
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ConfigError(f"guidance must be a finite number from 0 on, not {self.guidance}.")
        if has_surrogates(self.negative_prompt):
            raise ConfigError("The negative prompt is not valid text; it must be UTF-8.")
        for name in ("width", "height"):
            _check_side(
                name, getattr(self, name) or 8, 8
            )  # diffusers demands multiples of 8, whatever the VAE


@dataclass(frozen=True)
class Encoded:
    """A prompt's embeddings, on the CPU: text [77, C], pooled [P], P = 0 in families
    without; the same of the negative prompt with guidance."""

    text: Tensor
    pooled: Tensor
    negative_text: Tensor | None
    negative_pooled: Tensor | None
    negative_prompt: str


def check_options(pipe: Any, options: Options) -> None:
    """Raises: ConfigError for a size or a number of steps that this model and scheduler cannot do."""
    picture_size(pipe, options)
    most = pipe.scheduler.config.get("num_train_timesteps", 1000)
    if options.steps > most:
        raise ConfigError(f"{options.steps} steps are more than the {most} that the model was trained with.")
    name, scheduler = type(pipe.scheduler).__name__, copy.deepcopy(pipe.scheduler)
    try:
        scheduler.set_timesteps(options.steps)
    except ValueError as error:
        raise ConfigError(f"{name} cannot do {options.steps} steps: {str(error).splitlines()[0]}") from None
    if not _within_training(scheduler, most):
        first = int(scheduler.timesteps.max())
        fewer = (steps for steps in range(options.steps - 1, 0, -1) if _fits(scheduler, steps, most))
        raise ConfigError(
            f"{name} cannot do {options.steps} steps: they would begin at timestep {first}, and the "
            f"model knows 0 to {most - 1}; at most {next(fewer, 0)} steps are possible."
        )


def _fits(scheduler: Any, steps: int, most: int) -> bool:
    scheduler.set_timesteps(steps)
    return _within_training(scheduler, most)


def _within_training(scheduler: Any, most: int) -> bool:
    """Whether a scheduler finds all its timesteps among those of training. Those with sigmas do not look there."""
    return hasattr(scheduler, "sigmas") or int(scheduler.timesteps.max()) < most


def picture_size(pipe: Any, options: Options) -> tuple[int, int]:
    """Width and height in pixels. Raises: ConfigError that names the nearest possible size."""
    if options.width and options.height:  # pipelines for images know no size of their own
        width = height = 0
    else:
        native = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
        height, width = native if isinstance(native, list | tuple) else (native, native)
    sizes = []
    for name, asked, own in (("width", options.width, width), ("height", options.height, height)):
        pixels = own * pipe.vae_scale_factor if asked is None else asked
        _check_side(name, pixels, math.lcm(8, pipe.vae_scale_factor))
        sizes.append(pixels)
    return sizes[0], sizes[1]
