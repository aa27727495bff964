"""The families of base models that adapters are made for: what each has, by name, and what tells them apart.

Everything that one family has and another lacks is said here, so that the rest asks a Family and no model's name.
Names alone: nothing of diffusers or transformers is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FamilyName = Literal["sdxl", "sd15"]


@dataclass(frozen=True)
class Encoder:
    """A text encoder.

    key: of its rows in a learned token's file, as diffusers' scripts and other tools name it.
    network, tokenizer: the pipeline's parts, and their folders. kind: class in transformers.
    prefix: of its tensors' names in a single file. called: what sentences call it.
    """

    key: str
    network: str
    tokenizer: str
    kind: str
    prefix: str
    called: str


@dataclass(frozen=True)
class Family:
    """A family of base models.

    label: what sentences call it. usual_base: hub id of its first model.
    pools: whether its UNet takes pooled text and time ids beside the text ("text_time" in diffusers).
    latent_side: of its usual pictures, in latent pixels.
    pipelines: how the names of its pipelines in diffusers begin; options: what their constructors are told.
    tag: on the Hub. kohya: what other trainers' metadata call the base model.
    """

    name: FamilyName
    label: str
    usual_base: str
    encoders: tuple[Encoder, ...]
    pools: bool
    latent_side: int
    pipelines: str
    options: Mapping[str, Any]
    tag: str
    kohya: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the rows in a learned token's file."""
        return tuple(encoder.key for encoder in self.encoders)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(encoder.tokenizer for encoder in self.encoders)

    @property
    def text_networks(self) -> tuple[str, ...]:
        return tuple(encoder.network for encoder in self.encoders)

    @property
    def a_label(self) -> str:
        return f"{'an' if self.label[:2].isupper() else 'a'} {self.label}"


SDXL = Family(
    name="sdxl",
    label="SDXL",
    usual_base="stabilityai/stable-diffusion-xl-base-1.0",
    encoders=(
        Encoder(
            *("clip_l", "text_encoder", "tokenizer", "CLIPTextModel"),
            prefix="conditioner.embedders.0.transformer.",
            called="first text encoder",
        ),
        Encoder(
            *("clip_g", "text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
            prefix="conditioner.embedders.1.model.",
            called="second text encoder",
        ),
    ),
    pools=True,
    latent_side=128,
    pipelines="StableDiffusionXL",
    # Otherwise diffusers changes the pictures wherever a watermarking package happens to be installed
    options={"force_zeros_for_empty_prompt": True, "add_watermarker": False},
    tag="stable-diffusion-xl",
    kohya={
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    },
)
SD15 = Family(
    name="sd15",
    label="Stable Diffusion 1.5",
    usual_base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    encoders=(
        Encoder(
            *("clip_l", "text_encoder", "tokenizer", "CLIPTextModel"),
            prefix="cond_stage_model.transformer.",
            called="text encoder",
        ),
    ),
    pools=False,
    latent_side=64,
    pipelines="StableDiffusion",
    options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    tag="stable-diffusion",
    kohya={
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
    },
)
FAMILIES: dict[FamilyName, Family] = {family.name: family for family in (SDXL, SD15)}
NAMED = " or ".join(family.label for family in FAMILIES.values())  # in sentences


def family_of_unet(config: Mapping[str, Any]) -> Family:
    """The family of a UNet that has passed as one of them, by its config: SDXL's takes sizes and pooled text."""
    return SDXL if config.get("addition_embed_type") == "text_time" else SD15


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by its UNet, or by its parts where that has not been loaded."""
    config = getattr(getattr(pipe, "unet", None), "config", None)
    if isinstance(config, Mapping):
        return family_of_unet(config)
    return SDXL if hasattr(pipe, "tokenizer_2") or not hasattr(pipe, "tokenizer") else SD15


def tokenizers_of(pipe: Any) -> list[Any]:
    """The tokenizers that a pipeline has."""
    found = (getattr(pipe, name, None) for name in family_of(pipe).tokenizers)
    return [tokenizer for tokenizer in found if tokenizer is not None]


def text_encoders_of(pipe: Any) -> list[Any]:
    """The text encoders that a pipeline has."""
    found = (getattr(pipe, name, None) for name in family_of(pipe).text_networks)
    return [encoder for encoder in found if encoder is not None]
