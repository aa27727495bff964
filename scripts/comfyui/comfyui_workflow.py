"""One picture by ComfyUI and by coeffdiff: the same start, sampler and guidance, as an API workflow and as a pipeline.

ComfyUI begins with a latent that is read from a file, since the two scale the first noise differently.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from comfyui_texts import text_encoders, tokenizers
from narrow_sdxl import NARROW, comfyui_weights, make_unet

LATENT_SCALE = 0.13025  # of SDXL's VAE


def make_pipeline(comfyui: Path, seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL with the narrow UNet, text encoders and VAE of full size, random weights: its pictures are noise."""
    encoders = text_encoders({}, {}, seed)
    for encoder in encoders:
        for parameter in encoder.parameters():
            parameter.data = parameter.half().float()  # what their files hold
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=256,
            scaling_factor=LATENT_SCALE, force_upcast=False,
        ).eval()  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    pipe = StableDiffusionXLPipeline(vae, *encoders, *tokenizers(comfyui), make_unet(NARROW, seed), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_models(pipe: StableDiffusionXLPipeline, models: Path) -> None:
    """The pipeline's networks where ComfyUI's loaders look for them: UNet, two text encoders, VAE."""
    save_file(comfyui_weights(pipe.unet, NARROW), models / "diffusion_models" / "narrow.safetensors")
    for name, encoder in (("clip_l", pipe.text_encoder), ("clip_g", pipe.text_encoder_2)):
        weights = {_clip_key(key): tensor.half().contiguous() for key, tensor in encoder.state_dict().items()}
        save_file(weights, models / "text_encoders" / f"{name}.safetensors")
    save_file(pipe.vae.state_dict(), models / "vae" / "vae.safetensors")


def _clip_key(key: str) -> str:
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def first_latent(pipe: StableDiffusionXLPipeline, seed: int, side: int, steps: int) -> Tensor:
    """What coeffdiff's pictures of `seed` begin with, as ComfyUI's LATENT, [1, 4, side / 8, side / 8]."""
    pipe.scheduler.set_timesteps(steps)
    noise = torch.randn(4, side // 8, side // 8, generator=torch.Generator("cpu").manual_seed(seed))
    return noise[None] * pipe.scheduler.init_noise_sigma / LATENT_SCALE


def save_latent(latent: Tensor, file: Path) -> None:
    save_file({"latent_tensor": latent.contiguous(), "latent_format_version_0": torch.tensor([])}, file)


def workflow(
    prompt: str, *, steps: int, guidance: float, adapter: str | None, **inputs: Any
) -> dict[str, Any]:
    """The API workflow; without an adapter, of the base model. inputs: further ones of the node."""
    model, clip = (["load", 0], ["load", 1]) if adapter else (["unet", 0], ["clip", 0])
    node = {"model": ["unet", 0], "clip": ["clip", 0], "adapter": adapter, "strength": 1.0, "strength_alpha": 1.0,
            "strength_lora": 1.0, **inputs}  # fmt: skip
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "unet": ("UNETLoader", {"unet_name": "narrow.safetensors", "weight_dtype": "default"}),
        "clip": ("DualCLIPLoader", {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_g.safetensors",
                                    "type": "sdxl"}),
        "vae": ("VAELoader", {"vae_name": "vae.safetensors"}),
        "load": ("LoadCoeffdiffAdapter", node),
        "positive": ("CLIPTextEncode", {"clip": clip, "text": prompt}),
        "negative": ("ConditioningZeroOut", {"conditioning": ["positive", 0]}),
        "start": ("LoadLatent", {"latent": "start.latent"}),
        "sampler": ("KSamplerSelect", {"sampler_name": "euler"}),
        "sigmas": ("BasicScheduler", {"model": model, "scheduler": "ddim_uniform", "steps": steps, "denoise": 1.0}),
        "sample": ("SamplerCustom", {"model": model, "add_noise": False, "noise_seed": 0, "cfg": guidance,
                                     "positive": ["positive", 0], "negative": ["negative", 0],
                                     "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["start", 0]}),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["vae", 0]}),
        "image": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "picture"}),
        "latent": ("SaveLatent", {"samples": ["sample", 0], "filename_prefix": "latent"}),
    }  # fmt: skip
    if not adapter:
        del nodes["load"]
    return {name: {"class_type": kind, "inputs": wired} for name, (kind, wired) in nodes.items()}


def output_file(base: Path, entry: dict[str, str]) -> Path:
    """The file of one output in a server's history."""
    return base / entry["type"] / os.fspath(entry["subfolder"]) / entry["filename"]
