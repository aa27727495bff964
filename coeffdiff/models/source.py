"""The parts of an SDXL model, their file names, and where a model's files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coeffdiff.method.adapter_header import Quantized

Part = Literal["text", "vae", "unet"]

INDEX = "model_index.json"
NETWORKS: dict[str, tuple[str, str, Part]] = {  # folder -> class, stem of the weights' file names, part
    "text_encoder": ("CLIPTextModel", "model", "text"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "model", "text"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model", "vae"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model", "unet"),
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
CONFIG_FILES = (*(f"{name}/config.json" for name in NETWORKS), "scheduler/scheduler_config.json")
SMALL_FILES = [  # all that is no weights, and little more than a megabyte
    INDEX,
    *(
        f"{folder}/*.{ending}"
        for folder in (*NETWORKS, *TOKENIZERS, "scheduler")
        for ending in ("json", "txt")
    ),
]
# The four networks in a single file, by the prefixes of their tensors' names.
FILE_PREFIXES = {
    "UNet": "model.diffusion_model.",
    "VAE": "first_stage_model.",
    "first text encoder": "conditioner.embedders.0.transformer.",
    "second text encoder": "conditioner.embedders.1.model.",
}
IN_FILE = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "first text encoder",
    "text_encoder_2": "second text encoder",
}
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
    quantize: how UNet and text encoders are quantized as they are loaded; None: not at all.
    """

    name: str
    kind: Literal["hub", "folder", "file"]
    source: Source
    variant: str | None = "auto"
    file: Path | None = None
    vae: tuple[Source, str] | None = None
    unet_alone: bool = False
    quantize: Quantized | None = None

    def in_file(self, network: str) -> bool:
        """Whether a network's weights are read from the single file."""
        if self.file is None or (network == "vae" and self.vae is not None):
            return False
        return network == "unet" or not self.unet_alone
