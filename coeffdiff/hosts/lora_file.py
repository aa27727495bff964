"""The LoRA file in diffusers' stock layout: written, and checked against a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from coeffdiff.hosts.guard import unwrapped
from coeffdiff.method.adapter_paths import LORA_FILE
from coeffdiff.method.lora_layout import check_lora_shapes
from coeffdiff.utils.atomic import in_utf8


def write_lora(
    folder: Path, tensors: dict[str, Tensor], *, rank: int, alpha: float, dora: bool, modules: list[str]
) -> None:
    """Write LORA_FILE from tensors in PEFT's names, without a UNet."""
    with in_utf8(folder) as named:
        StableDiffusionXLPipeline.save_lora_weights(
            named,
            unet_lora_layers=convert_state_dict_to_diffusers(tensors),
            unet_lora_adapter_metadata=plain_lora_config(rank, alpha, dora, modules),
        )
    # safetensors writes files that only their owner may read; an adapter is for sharing, as the umask says.
    file = folder / LORA_FILE
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


def plain_lora_config(rank: int, alpha: float, dora: bool, modules: list[str]) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": alpha, "use_dora": dora, "target_modules": modules}


def check_lora(
    unet: Any, shapes: Mapping[str, tuple[int, ...]], *, rank: int, dora: bool, origin: str
) -> list[str]:
    """check_lora_shapes against the linear layers of a diffusers UNet, with PEFT's shells around them or without."""
    own = dict(unwrapped(unet).named_modules())

    def size(name: str) -> tuple[int, int] | None:
        module = own.get(name)
        linear = module.base_layer if isinstance(module, BaseTunerLayer) else module
        return (linear.out_features, linear.in_features) if isinstance(linear, nn.Linear) else None

    return check_lora_shapes(size, shapes, rank=rank, dora=dora, origin=origin)
