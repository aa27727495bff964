"""Models of SDXL's or Stable Diffusion 1.5's architecture with random weights, in any size, without a download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from coeffdiff.errors import ConfigError
from coeffdiff.method.families import SDXL
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.seeding import generator_for

with quiet_libraries():  # the import itself prints notes on missing packages
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

from coeffdiff.pocket.sizes import (
    PredictionType,
    euler_scheduler,
    pndm_scheduler,
    size_named,
    text_configs,
    unet_config,
    vae_config,
)
from coeffdiff.pocket.tokenizers import tokenizer_pair

_CHUNK = 1 << 22  # numbers drawn at a time: 16 MiB of float32 beside the weights, whatever their dtype
_SHARD = "20GB"  # one file a network, as on the hub; the writers stream, so it costs no memory


def build_unet(size: str, *, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The UNet alone, with the weights that build_pipeline gives it; on "meta" it has shapes and no weights."""
    unet = _on_meta(UNet2DConditionModel, unet_config(size))
    return unet if device == "meta" else _fill(unet, ("unet", seed), dtype).to(device)


def parameter_count(size: str) -> int:
    """Numbers in all networks, counted without memory for them. Raises: ConfigError for an unknown size."""
    return sum(weight.numel() for network in _networks(size).values() for weight in network.parameters())


def build_pipeline(
    size: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    prediction_type: PredictionType = "epsilon",
) -> Any:
    """A complete pipeline with random weights, on CPU, in eval mode.

    Every tensor is drawn in float32 from a generator of its own, seeded by (seed, network, name), and rounded to
    dtype as it is written: the global random state stays as it was, and full-size SDXL needs its own weights'
    memory and 16 MiB more.

    Args:
        size: a key of SIZES.
        dtype: of all networks, the VAE included (see coeffdiff.models.loading for how it is loaded).
        prediction_type: goes into the scheduler's config.
    Raises: ConfigError for an unknown size or prediction type.
    """
    family = size_named(size).family
    scheduler = euler_scheduler(prediction_type) if family is SDXL else pndm_scheduler(prediction_type)
    kind: Any = StableDiffusionXLPipeline if family is SDXL else StableDiffusionPipeline
    return kind(
        **{name: _fill(network, (name, seed), dtype) for name, network in _networks(size).items()},
        **dict(zip(family.tokenizers, tokenizer_pair(), strict=False)),
        scheduler=scheduler,
        **family.options,
    )


def save_random(
    size: str,
    folder: Path | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    prediction_type: PredictionType = "epsilon",
    variant: str | None = None,
) -> Path:
    """Write build_pipeline(...) as a diffusers folder, tokenizers included, and return its path.

    The write is atomic. variant ("fp16") goes into the weights' file names.

    Raises: ConfigError if the folder exists or cannot be written.
    """
    folder = Path(folder)
    size_named(size), euler_scheduler(prediction_type)  # refused before minutes of drawing
    refuse_existing(folder)
    try:
        with atomic_write(folder) as unfinished, quiet_libraries():
            unfinished.mkdir()
            pipe = build_pipeline(size, seed=seed, dtype=dtype, prediction_type=prediction_type)
            pipe.save_pretrained(unfinished, safe_serialization=True, variant=variant, max_shard_size=_SHARD)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}{where}.") from error
    return folder


def refuse_existing(folder: Path) -> None:
    """Raises: ConfigError if there is anything at this path."""
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} already exists; nothing is overwritten, so give a folder that does not.")


def _networks(size: str) -> dict[str, Any]:
    """The networks of a size, on meta."""
    kinds = (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
    texts = zip(kinds, text_configs(size), strict=False)
    return {
        **{name: _on_meta(kind, config) for (name, kind), config in texts},
        "vae": _on_meta(AutoencoderKL, vae_config(size)),
        "unet": _on_meta(UNet2DConditionModel, unet_config(size)),
    }


def _on_meta(network: type, config: Any) -> Any:
    """The network with shapes and no memory; its own initialization would cost minutes and be thrown away."""
    with torch.device("meta"):
        return network(**config) if isinstance(config, dict) else network(config)


@torch.no_grad()
def _fill(network: Any, seed: tuple[object, ...], dtype: torch.dtype) -> Any:
    """Give a network from _on_meta memory and random weights in dtype, scaled so that activations keep their size.

    Matrices and convolutions: normal / sqrt(inputs of an output), and 3 x 3 convolutions 1.68 times that, because
    SiLU comes before them and keeps 0.355 of a normal's second moment. Embeddings: normal. Norms: one. Biases: zero.
    """
    # Not network.to(dtype): diffusers' own warns about every cast.
    network = torch.nn.Module.to(network, dtype).to_empty(device="cpu")
    for prefix, module in network.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1.0)
            else:
                inputs = 1 if isinstance(module, torch.nn.Embedding) else weight[0].numel()
                after_silu = weight.shape[2:] == (3, 3)
                _draw(weight, (1.68 if after_silu else 1.0) * inputs**-0.5, generator_for(*seed, name))
            weight.requires_grad_(False)
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if not name.endswith("position_ids"):
                raise NotImplementedError(f"nothing is known about the buffer {name}")
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return network.eval()


def _draw(weight: torch.Tensor, scale: float, generator: torch.Generator) -> None:
    flat = weight.view(-1)
    for part in flat.split(_CHUNK):
        part.copy_(torch.randn(len(part), generator=generator).mul_(scale))
