"""The parts of a base model, their file names, and where a model's files lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coeffdiff.method.families import FAMILIES, SDXL, Family, FamilyName
from coeffdiff.method.number_formats import Quantized

Part = Literal["text", "vae", "unet"]

INDEX = "model_index.json"
CONFIG_SETTING = "model.config (train: --set model.config=FOLDER; sample, evaluate: --model-config FOLDER)"
VAE_SETTING = "model.vae (train: --set model.vae=VAE; sample, evaluate: --vae VAE)"
"""As sentences name them, which any command may print."""


@dataclass(frozen=True)
class Network:
    """One network of a pipeline. kind: its class; stem: of its weights' file names; prefix: of its tensors' names in a
    single file; called: what sentences on single files call it."""

    kind: str
    stem: str
    part: Part
    prefix: str
    called: str


UNET = Network("UNet2DConditionModel", "diffusion_pytorch_model", "unet", "model.diffusion_model.", "UNet")
VAE = Network("AutoencoderKL", "diffusion_pytorch_model", "vae", "first_stage_model.", "VAE")


@functools.cache
def networks_of(family: FamilyName) -> dict[str, Network]:
    """The networks of a family's pipelines, by their folders."""
    encoders = {
        one.network: Network(one.kind, "model", "text", one.prefix, one.called)
        for one in FAMILIES[family].encoders
    }
    return {**encoders, "vae": VAE, "unet": UNET}


def config_files(family: FamilyName) -> tuple[str, ...]:
    """What a pipeline's folder must hold beside its index, tokenizers and weights."""
    return (*(f"{name}/config.json" for name in networks_of(family)), "scheduler/scheduler_config.json")


SMALL_FILES = [  # of every family, all that is no weights, and little more than a megabyte
    INDEX,
    *(
        f"{folder}/*.{ending}"
        for folder in dict.fromkeys(
            folder
            for family in FAMILIES.values()
            for folder in (*networks_of(family.name), *family.tokenizers, "scheduler")
        )
        for ending in ("json", "txt")
    ),
]
ENCODER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers unpickles tensors alone
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Source:
    """Files of a model: a local folder or, with a repo, the place in the hub's cache where they are or will be."""

    name: str
    folder: Path
    repo: str | None = None
    remote: frozenset[str] = frozenset()  # what the hub holds, where it had to be asked

    def here(self) -> set[str]:
        """Files on this machine, as paths with / relative to the folder, two levels deep."""
        paths = (*self.folder.glob("*"), *self.folder.glob("*/*"))
        return {path.relative_to(self.folder).as_posix() for path in paths if path.is_file()}


@dataclass(frozen=True)
class Backbone:
    """Where a base model comes from: resolved and checked, its configs read, no weights loaded yet.

    name: hub id, or absolute path, as adapters and recipes name it.
    source: the pipeline's files; for a single file, of its configs and tokenizers only.
    variant: as in the settings ("auto", a variant, or None for files without one).
    vae: another VAE's files and the folder in them ("" or "vae"), if there is one.
    unet_alone: the file holds only a UNet; the source then gives the other networks too.
    family: what its networks are and what they take.
    quantize: how UNet and text encoders are quantized as they are loaded; None: not at all.
    """

    name: str
    kind: Literal["hub", "folder", "file"]
    source: Source
    variant: str | None = "auto"
    file: Path | None = None
    vae: tuple[Source, str] | None = None
    unet_alone: bool = False
    family: Family = SDXL
    quantize: Quantized | None = None

    @property
    def networks(self) -> dict[str, Network]:
        """By their folders."""
        return networks_of(self.family.name)

    def in_file(self, network: str) -> bool:
        """Whether a network's weights are read from the single file."""
        if self.file is None or (network == "vae" and self.vae is not None):
            return False
        return network == "unet" or not self.unet_alone
