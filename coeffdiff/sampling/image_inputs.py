"""Pictures that sampling begins from or is steered by: img2img, inpainting and ControlNet, by diffusers' pipelines."""

from __future__ import annotations

import hashlib
import inspect
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from coeffdiff.data.decoding import decode_image
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.method.families import family_of
from coeffdiff.models.controlnet import ControlNet, load_controlnet
from coeffdiff.models.pipelines import make_pipeline
from coeffdiff.sampling.options import Options

_STRENGTH = 0.6  # by default; with a mask all inside is drawn again


@dataclass(frozen=True)
class ImageOptions:
    """What `sample` was asked to begin from and to be steered by.

    strength: share of the denoising steps that are made from init_image, above 0 and at most 1; None: 0.6, with a
    mask 1. mask_image: white where the picture is drawn again. controlnet: hub id or folder.
    """

    init_image: Path | None = None
    strength: float | None = None
    mask_image: Path | None = None
    controlnet: str | None = None
    control_image: Path | None = None
    control_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, other in (("mask_image", "init_image"), ("strength", "init_image")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ConfigError(f"--{_flag(name)} needs a picture to begin from: --{_flag(other)}.")
        if (self.controlnet is None) != (self.control_image is None):
            raise ConfigError("--controlnet and --control-image belong together; pass both or neither.")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(f"--strength must lie above 0 and be at most 1, not {self.strength:g}.")
        if not math.isfinite(self.control_scale) or self.control_scale < 0:
            raise ConfigError(f"--control-scale must be a finite number from 0 on, not {self.control_scale}.")

    def __bool__(self) -> bool:
        return self.init_image is not None or self.controlnet is not None


@dataclass(frozen=True)
class ImageInputs:
    """The pictures of ImageOptions, read and in the size of the result, and what recipes say about them."""

    init: Image.Image | None
    mask: Image.Image | None
    control: Image.Image | None
    strength: float
    control_scale: float
    details: dict[str, Any]


@dataclass(frozen=True)
class Guide:
    """The inputs, and the ControlNet beside them if there is one, to be loaded in dtype."""

    inputs: ImageInputs
    controlnet: ControlNet | None
    dtype: torch.dtype

    def pipeline(self, pipe: Any) -> Any:
        """diffusers' pipeline for the inputs in place of one for text alone. Raises: ModelError."""
        network = load_controlnet(self.controlnet, self.dtype) if self.controlnet else None
        return pipeline_for(pipe, self.inputs, network)

    def steps(self, steps: int) -> int:
        """How many of so many denoising steps are made."""
        return int(steps * self.inputs.strength) if self.inputs.init else steps


def read_inputs(asked: ImageOptions, options: Options, native: int, step: int) -> tuple[ImageInputs, Options]:
    """The pictures, resized to cover the result's size and cropped at the centre, and options with that size.

    Without a width or height the result has the first picture's aspect ratio and the model's own area.

    Args:
        native: side in pixels of the model's own pictures. step: of which sides are multiples.
    Raises: ConfigError for a picture that cannot be read, a mask of another size, or a strength without a step.
    """
    strength = asked.strength or (1.0 if asked.mask_image else _STRENGTH)
    if asked.init_image and int(options.steps * strength) < 1:
        raise ConfigError(
            f"--strength {strength:g} of {options.steps} steps leaves no step to make; raise one."
        )
    init, control = _read(asked.init_image), _read(asked.control_image)
    mask = _read(asked.mask_image)
    if mask and init and mask.size != init.size:
        raise ConfigError(
            f"{asked.mask_image} is {_by(mask.size)} pixels and {asked.init_image} {_by(init.size)}; a mask has the "
            "size of its picture."
        )
    first = init or control
    assert first is not None
    size = _size(first, options, native, step)
    details: dict[str, Any] = {}
    for name in ("init_image", "mask_image", "control_image"):
        if file := getattr(asked, name):
            details[name] = {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    if init:
        details["strength"] = strength
    if asked.controlnet:
        details |= {"controlnet": asked.controlnet, "control_scale": asked.control_scale}
    fitted = [
        image and ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in (init, mask, control)
    ]
    whiteness = fitted[1].convert("L") if fitted[1] else None
    inputs = ImageInputs(fitted[0], whiteness, fitted[2], strength, asked.control_scale, details)
    return inputs, replace(options, width=size[0], height=size[1])


def pipeline_for(pipe: Any, inputs: ImageInputs, controlnet: Any = None) -> Any:
    """diffusers' pipeline for these inputs, of the same networks: adapters that were loaded are on it too."""
    import diffusers

    family = family_of(pipe)
    task = ("ControlNet" if controlnet else "") + (
        "Inpaint" if inputs.mask else "Img2Img" if inputs.init else ""
    )
    takes = inspect.signature(getattr(diffusers, f"{family.pipelines}{task}Pipeline").__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in takes}
    if controlnet is not None:
        parts["controlnet"] = controlnet.to(pipe.unet.dtype)
    zeros = pipe.config.get("force_zeros_for_empty_prompt")
    made = make_pipeline(
        family, parts, task=task, **({} if zeros is None else {"force_zeros_for_empty_prompt": zeros})
    )
    made.register_to_config(_name_or_path=pipe.config.get("_name_or_path"))
    made.vae_scale_factor = pipe.vae_scale_factor
    return made


def call_arguments(inputs: ImageInputs, count: int, size: tuple[int, int]) -> dict[str, Any]:
    """Further arguments of the pipeline's call for a batch of so many pictures."""
    arguments: dict[str, Any] = {}
    if inputs.mask or inputs.control:  # img2img takes the picture's own size
        arguments |= {"width": size[0], "height": size[1]}
    if inputs.init:
        arguments |= {"image": [inputs.init] * count, "strength": inputs.strength}
    if inputs.mask:
        arguments["mask_image"] = [inputs.mask] * count
    if inputs.control:
        name = "control_image" if inputs.init else "image"
        arguments |= {name: [inputs.control] * count, "controlnet_conditioning_scale": inputs.control_scale}
    return arguments


def _size(image: Image.Image, options: Options, native: int, step: int) -> tuple[int, int]:
    """Width and height of the result in pixels, multiples of step."""
    ratio = image.width / image.height
    if options.width and options.height:
        return options.width, options.height
    if options.width or options.height:
        width = options.width or (options.height or 0) * ratio
        height = options.height or width / ratio
    else:
        width, height = native * math.sqrt(ratio), native / math.sqrt(ratio)

    def whole(side: float) -> int:
        return max(step, step * round(side / step))

    return options.width or whole(width), options.height or whole(height)


def _read(file: Path | None) -> Image.Image | None:
    """Upright, in RGB. Raises: ConfigError, naming the file."""
    if file is None:
        return None
    try:
        image: Image.Image = decode_image(file.read_bytes())
        return image
    except OSError as error:
        raise ConfigError(f"The picture {file} cannot be read: {error.strerror or error}.") from None
    except PhotoError as error:
        raise ConfigError(f"The picture {file} cannot be read: {error}.") from None


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
