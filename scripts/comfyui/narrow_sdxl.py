"""SDXL's UNet with all 140 attention layers but narrow, with random weights, in diffusers and in ComfyUI's names.

ComfyUI takes its weights for SDXL by itself. A smaller one, for quick tests, needs to be told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from coeffdiff.errors import ConfigError
from coeffdiff.hosts.diffusers import save_adapter
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader, Mixes, format_for
from coeffdiff.utils.seeding import generator_for


class Sizes(NamedTuple):
    """Of an SDXL-like UNet: channels (equal on all levels), width of a head, transformer blocks on levels 1 and 2."""

    channels: int
    head: int
    depths: tuple[int, int]
    text: int  # width of the text embeddings
    pooled: int
    time: int  # width of the embedding of one of the six size numbers

    @property
    def adm(self) -> int:
        return self.pooled + 6 * self.time


NARROW = Sizes(320, 64, (2, 10), 2048, 1280, 256)  # 283 million numbers, 140 attention layers
SMALL = Sizes(32, 8, (1, 2), 24, 20, 256)
SHARPER = 2.0  # factor of to_q and to_k: with random weights alone all maps are nearly uniform


def make_unet(sizes: Sizes, seed: int = 0) -> UNet2DConditionModel:
    """Random weights of about 1 / sqrt(fan in): larger ones make seventy blocks chaotic, so that rounding grows."""
    heads = sizes.channels // sizes.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(sizes.channels,) * 3,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, *sizes.depths),
            attention_head_dim=(heads,) * 3,
            cross_attention_dim=sizes.text,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=sizes.time,
            projection_class_embeddings_input_dim=sizes.adm,
        )
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.data *= SHARPER
    return unet.eval().requires_grad_(False)


def comfyui_config(sizes: Sizes) -> dict[str, Any]:
    """What ComfyUI's detection would find in the weights."""
    one, two = sizes.depths
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": sizes.channels,
        "num_res_blocks": [2, 2, 2], "channel_mult": (1, 1, 1), "transformer_depth": [0, 0, one, one, two, two],
        "transformer_depth_output": [0, 0, 0, one, one, one, two, two, two], "transformer_depth_middle": two,
        "context_dim": sizes.text, "adm_in_channels": sizes.adm, "num_classes": "sequential", "num_heads": -1,
        "use_linear_in_transformer": True, "use_spatial_transformer": True, "legacy": False,
        "use_temporal_attention": False, "use_temporal_resblock": False, "use_checkpoint": False,
    }  # fmt: skip


def comfyui_weights(unet: nn.Module, sizes: Sizes) -> dict[str, Tensor]:
    """The same weights under the names of SDXL's single file, without a prefix."""
    import comfy.utils

    names = comfy.utils.unet_to_diffusers(comfyui_config(sizes))
    weights = unet.state_dict()
    if missing := weights.keys() - names.keys():
        raise ConfigError(f"ComfyUI has no name for {sorted(missing)[0]} ({len(missing)} in all).")
    return {names[key]: tensor for key, tensor in weights.items()}


def comfyui_model(unet: nn.Module, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Any:
    """A ModelPatcher of ComfyUI with the UNet's weights, through ComfyUI's own loader where it knows the size."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    weights = {key: tensor.to(dtype) for key, tensor in comfyui_weights(unet, sizes).items()}
    if sizes == NARROW:
        return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    config = comfy.supported_models.SDXL(comfyui_config(sizes))
    config.unet_config["num_head_channels"] = sizes.head
    cpu = torch.device("cpu")
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, cpu))
    model = comfy.model_base.SDXL(config, device=cpu)
    model.load_model_weights(weights)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def make_adapter(
    folder: Path,
    unet: nn.Module,
    *,
    kind: str = "coeff+lora",
    token: str = "ohwx",
    seed: int = 0,
    alpha: float = 0.4,
    lora: float = 0.3,
    rank: int = 3,
    lora_alpha: float = 7.0,
    dora: bool = False,
    mixes: Mixes = "maps",
    rows: dict[str, Tensor] | None = None,
) -> Path:
    """Write an adapter of random numbers for `unet`, which is left as it was: alpha and LoRA in all attention layers.

    alpha, lora: standard deviations of alpha and of the LoRA's two matrices, over sqrt(in) and sqrt(rank).
    """
    from coeffdiff.hosts.lora.layers import remove_lora
    from coeffdiff.hosts.unet import eject

    heads: dict[str, int] = {}
    if "coeff" in kind:
        for layer, coefficients in inject(unet, mixes=mixes).items():
            shape = coefficients.alpha.shape
            coefficients.alpha.data = alpha * torch.randn(shape, generator=generator_for(seed, layer))
            heads[layer] = coefficients.heads
    if "lora" in kind:
        for name, parameter in add_lora(unet, rank=rank, alpha=lora_alpha, dora=dora, seed=seed).items():
            if "magnitude" in name:
                drawn = torch.rand(parameter.shape, generator=generator_for(seed, name))
                parameter.data *= 0.9 + 0.2 * drawn
            else:
                drawn = torch.randn(parameter.shape, generator=generator_for(seed, name))
                parameter.data = lora**0.5 * drawn / parameter.shape[1] ** 0.5
    header = AdapterHeader(
        format_version=format_for(mixes), kind=kind, base_model="narrow SDXL", token=token, class_word="toy",
        heads=heads, mixes=mixes, lora=LoraHeader(rank=rank, alpha=lora_alpha, dora=dora) if "lora" in kind else None,
        vectors=len(rows["clip_l"]) if rows else 0, trained_steps=1, resolution=256,
    )  # fmt: skip
    save_adapter(folder, unet, header, rows=rows)
    remove_lora(unet, "default")
    eject(unet)
    return folder
