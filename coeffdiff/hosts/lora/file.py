"""The LoRA file in diffusers' stock layout: written, and checked against a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from coeffdiff.hosts.clip_alpha import in_file
from coeffdiff.hosts.guard import unwrapped
from coeffdiff.method.adapter_paths import LORA_FILE
from coeffdiff.method.lora_layout import check_lora_shapes
from coeffdiff.method.networks import UNET, encoders_in, of_network
from coeffdiff.utils.atomic import in_utf8


def write_lora(
    folder: Path, tensors: dict[str, Tensor], *, rank: int, alpha: float, dora: bool, modules: list[str]
) -> None:
    """Write LORA_FILE from tensors in PEFT's names, without a UNet.

    tensors: the UNet's under their names in it, a text encoder's behind the pipeline's name for the encoder.
    modules: of the UNet, those that it adapts.
    """
    given: dict[str, Any] = {}
    for network in (UNET, *encoders_in(tensors)):
        given[f"{network}_lora_layers"] = convert_state_dict_to_diffusers(of_network(tensors, network))
        # Full names of an encoder's modules would not be found: transformers 5 names those of CLIPTextModel anew
        named = modules if network == UNET else _last_names(of_network(tensors, network))
        given[f"{network}_lora_adapter_metadata"] = plain_lora_config(rank, alpha, dora, named)
    with in_utf8(folder) as name:
        StableDiffusionXLPipeline.save_lora_weights(name, **given)
    # safetensors writes files that only their owner may read; an adapter is for sharing, as the umask says.
    file = folder / LORA_FILE
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


def _last_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """q_proj of ...self_attn.q_proj.lora_A.weight: what a LoRA of an encoder adapts, in every layer alike."""
    return sorted({key.partition(".lora_")[0].rpartition(".")[2] for key in tensors})


def plain_lora_config(rank: int, alpha: float, dora: bool, modules: list[str]) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": alpha, "use_dora": dora, "target_modules": modules}


def check_lora(
    unet: Any,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    dora: bool,
    origin: str,
    encoders: Mapping[str, nn.Module] | None = None,
) -> list[str]:
    """check_lora_shapes against the linear layers of a diffusers UNet, with PEFT's shells around them or without.

    encoders: the pipeline's text encoders by its names for them, which the LoRA may be on as well.
    """
    own = dict(unwrapped(unet).named_modules())
    for network, encoder in (encoders or {}).items():
        own |= {f"{network}.{in_file(name)}": module for name, module in unwrapped(encoder).named_modules()}

    def size(name: str) -> tuple[int, int] | None:
        module = own.get(name)
        linear = module.base_layer if isinstance(module, BaseTunerLayer) else module
        return (linear.out_features, linear.in_features) if isinstance(linear, nn.Linear) else None

    return check_lora_shapes(size, shapes, rank=rank, dora=dora, origin=origin)
