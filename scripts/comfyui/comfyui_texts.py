"""SDXL's two text encoders with random weights, in diffusers and in ComfyUI, with CLIP's real tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SMALL_L = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
SMALL_G = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 5, "num_hidden_layers": 3}


def tokenizers(comfyui: Path) -> tuple[Any, Any]:
    """SDXL's two, from the vocabulary that ComfyUI ships: they differ in what fills up a short text."""
    folder = comfyui / "comfy" / "sd1_tokenizer"
    fillers = ({}, {"pad_token": "!"})
    first, second = (
        CLIPTokenizer.from_pretrained(folder, model_max_length=77, **filler) for filler in fillers
    )
    return first, second


def text_encoders(sizes_l: dict[str, int], sizes_g: dict[str, int], seed: int = 0) -> tuple[Any, Any]:
    """CLIP's and OpenCLIP's text encoders of these sizes; those of SDXL where they are empty."""
    full_l = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    }
    full_g = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
    }
    common = {
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    config_l = CLIPTextConfig(**full_l | sizes_l, hidden_act="quick_gelu", **common)
    wide = full_g | sizes_g
    config_g = CLIPTextConfig(**wide, hidden_act="gelu", projection_dim=wide["hidden_size"], **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pair = CLIPTextModel(config_l), CLIPTextModelWithProjection(config_g)
    return tuple(encoder.eval().requires_grad_(False) for encoder in pair)  # type: ignore[return-value]


def text_twins(comfyui: Path, unet: nn.Module) -> tuple[Any, Any]:
    """ComfyUI's CLIP with small text encoders, and a pipeline of diffusers with the same ones and `unet`."""
    import comfy.sd
    import comfy.sdxl_clip

    pair = text_encoders(SMALL_L, SMALL_G)
    target = SimpleNamespace(
        params={}, clip=comfy.sdxl_clip.SDXLClipModel, tokenizer=comfy.sdxl_clip.SDXLTokenizer
    )
    options = {"clip_l_model_config": SMALL_L, "clip_g_model_config": SMALL_G, "dtype": torch.float32}
    clip = comfy.sd.CLIP(target, model_options=options)
    for part, encoder in zip(("clip_l", "clip_g"), pair, strict=True):
        fill(getattr(clip.cond_stage_model, part).transformer, encoder)
    pipe = StableDiffusionXLPipeline(
        None, *pair, *tokenizers(comfyui), unet, EulerDiscreteScheduler(), force_zeros_for_empty_prompt=False
    )
    return clip, pipe


def fill(theirs: nn.Module, encoder: nn.Module) -> None:
    """The weights of a transformers text encoder into ComfyUI's, every one of them."""
    own = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    wanted = theirs.state_dict()
    filled = {key: own.pop(key.removeprefix("text_model."), None) for key in wanted}
    # CLIP-L's projection is not SDXL's: ComfyUI has one and reads nothing of it
    filled = {key: wanted[key] if tensor is None else tensor for key, tensor in filled.items()}
    theirs.load_state_dict(filled)
    if left := [key for key in own if not key.endswith("position_ids")]:
        raise KeyError(left[0])
