"""A model's architecture without its weights: configs, networks on the meta device, sizes."""

from __future__ import annotations

import functools
import json
import math
from typing import Any, Literal

import torch

from coeffdiff.errors import ModelError
from coeffdiff.models.checking import header_of, prediction_type_in, read_json
from coeffdiff.models.files import joined_path, source_of, weights_of
from coeffdiff.models.hub_errors import loading_errors
from coeffdiff.models.source import Backbone
from coeffdiff.utils.console import quiet_libraries


def config_of(backbone: Backbone, network: str) -> dict[str, Any]:
    """A network's config, as its file says it."""
    source, subfolder = source_of(backbone, network)
    return read_json(source, joined_path(subfolder, "config.json"))


def scheduler_config(backbone: Backbone) -> dict[str, Any]:
    """The scheduler's config, with what a single file states in its header."""
    config = read_json(backbone.source, "scheduler/scheduler_config.json")
    return config | (_stated_prediction(header_of(backbone.file)) if backbone.file is not None else {})


def prediction_type(pipe: Any) -> Literal["epsilon", "v_prediction"]:
    """What the UNet was trained to predict, from the scheduler's config. Raises: ModelError for anything else."""
    return prediction_type_in(type(pipe.scheduler).__name__, pipe.scheduler.config, "This model")


def unet_config(backbone: Backbone) -> dict[str, Any]:
    """The UNet's config as diffusers writes it."""
    return read_json(backbone.source, "unet/config.json")


def unet_on_meta(backbone: Backbone) -> Any:
    """The UNet's shapes without its weights, from its config alone, to count and to check against."""
    with loading_errors(f"{backbone.name}: its UNet's config"):
        return _shapes(unet_config(backbone))


def network_on_meta(backbone: Backbone, network: str, dtype: torch.dtype) -> Any:
    """A text encoder, vae or unet as load_pipeline(dtype=dtype) would give it, without its weights."""
    with quiet_libraries(), loading_errors(f"{backbone.name}: the config of its {network}"):
        built = _on_meta(backbone.networks[network].kind, config_of(backbone, network))
        return torch.nn.Module.to(built, network_dtype(backbone, network, dtype)).eval()


def layout_on_meta(backbone: Backbone, network: str) -> Any:
    """network_on_meta in whatever dtype, made once for each config: only to read names and shapes from."""
    with quiet_libraries(), loading_errors(f"{backbone.name}: the config of its {network}"):
        return _layout(backbone.networks[network].kind, json.dumps(config_of(backbone, network)))


@functools.lru_cache(maxsize=16)  # a comparison checks its model before every run
def _layout(kind: str, config: str) -> Any:
    return _on_meta(kind, json.loads(config))


def _on_meta(kind: str, config: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    with torch.device("meta"):
        if kind.startswith("CLIP"):
            return getattr(transformers, kind)(transformers.CLIPTextConfig.from_dict(config))
        return getattr(diffusers, kind).from_config(config)


def missing_networks(backbone: Backbone, dtype: torch.dtype) -> list[str]:
    """The networks whose weights load_pipeline would download first."""
    names = [name for name in backbone.networks if not backbone.in_file(name)]
    chosen = {name: weights_of(backbone, name, half=dtype != torch.float32)[1] for name in names}
    return [
        name for name, files in chosen.items() if not source_of(backbone, name)[0].here().issuperset(files)
    ]


def bucket_step(backbone: Backbone, resolution: int) -> int:
    """What bucket sides are multiples of: 64 pixels, as SDXL was trained, or what the UNet's levels need if less."""
    levels = len(unet_config(backbone)["down_block_types"])
    return min(64, vae_factor(backbone) * 2 ** (levels - 1)) if resolution < 512 else 64


def unet_parameters(backbone: Backbone) -> int:
    """How many numbers the UNet holds; no weights are read. SDXL: 2,567,463,684."""
    with loading_errors(f"{backbone.name}: its UNet's config"):
        return _numbers(json.dumps(unet_config(backbone)))


def vae_factor(backbone: Backbone) -> int:
    """Pixels of a picture's side for one of the latent's; 8 in SDXL."""
    return 2 ** (len(vae_config_of(backbone)["block_out_channels"]) - 1)


def native_resolution(backbone: Backbone) -> int:
    """Side in pixels of the square pictures that the UNet was made for; 1024 in SDXL, 512 in Stable Diffusion 1.5."""
    side = unet_config(backbone).get("sample_size") or backbone.family.latent_side
    return (max(side) if isinstance(side, list) else side) * vae_factor(backbone)


def vae_config_of(backbone: Backbone) -> dict[str, Any]:
    """The config of the VAE that is used. Raises: ModelError if it is damaged."""
    source, subfolder = source_of(backbone, "vae")
    config = read_json(source, joined_path(subfolder, "config.json"))
    if not isinstance(config.get("block_out_channels"), list):
        raise ModelError(f"The VAE config of {source.name} names no block_out_channels, so it is damaged.")
    divisors = [config.get("scaling_factor", 1.0), *(config.get("latents_std") or ())]
    if not all(isinstance(one, int | float) and 0 < one < math.inf for one in divisors):
        raise ModelError(
            f"The VAE config of {source.name} scales latents by {divisors[0]!r}, deviations {divisors[1:]!r}, where "
            "numbers above zero are expected (SDXL's scaling_factor is 0.13025, Stable Diffusion 1.5's "
            "0.18215); it is damaged."
        )
    return config


def network_dtype(backbone: Backbone, network: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but float32 for a VAE whose config has force_upcast."""
    if network == "vae" and vae_config_of(backbone).get("force_upcast", True):
        return torch.float32
    return dtype


def _stated_prediction(header: dict[str, Any]) -> dict[str, Any]:
    """Scheduler settings that a single file states in its header; the configs that it borrows are another model's.

    v-prediction models carry an empty tensor called v_pred, those with zero terminal SNR also one called ztsnr;
    training tools write modelspec.prediction_type.
    """
    metadata = header.get("__metadata__") or {}
    if "v_pred" not in header and metadata.get("modelspec.prediction_type") not in ("v", "v_prediction"):
        return {}
    stated: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in header:
        stated |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return stated


def _shapes(config: dict[str, Any]) -> Any:
    """A UNet of this config on the meta device."""
    with quiet_libraries():
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)


@functools.cache  # a comparison asks for every cell
def _numbers(config: str) -> int:
    return sum(weight.numel() for weight in _shapes(json.loads(config)).parameters())
