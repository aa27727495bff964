"""The LoRA file in diffusers' stock layout: written, taken apart, checked against a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.hosts.guard import unwrapped
from coeffdiff.method.adapter_paths import LORA_FILE
from coeffdiff.utils.atomic import in_utf8

_A, _B = ".lora_A.weight", ".lora_B.weight"


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


def lora_pairs(tensors: dict[str, Tensor], origin: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] by the module of the UNet that they change, from the tensors of a LORA_FILE.

    DoRA's magnitudes are left out. Raises: AdapterError for tensors that are no LoRA of this layout.
    """
    named = {peft_key(key).removeprefix("unet."): tensor for key, tensor in tensors.items()}
    downs = {key.removesuffix(_A): t for key, t in named.items() if key.endswith(_A)}
    ups = {key.removesuffix(_B): t for key, t in named.items() if key.endswith(_B)}
    strange = {key for key in named if not key.endswith((_A, _B, ".lora_magnitude_vector"))}

    def fit(a: Tensor, b: Tensor) -> bool:
        fits: bool = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
        return fits

    odd = sorted({*downs} ^ {*ups} | strange) or [m for m in downs if not fit(downs[m], ups[m])]
    if odd or not downs:
        what = f"{odd[0]} has no two matrices that fit" if odd else "it is empty"
        raise AdapterError(f"{origin} is not a LoRA of this layout: {what}.")
    return {module: (downs[module], ups[module]) for module in downs}


def plain_lora_config(rank: int, alpha: float, dora: bool, modules: list[str]) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": alpha, "use_dora": dora, "target_modules": modules}


def peft_key(key: str) -> str:
    """diffusers' stock layout names the two matrices down and up; PEFT names them A and B."""
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def check_lora(
    unet: Any, shapes: Mapping[str, tuple[int, ...]], *, rank: int, dora: bool, origin: str
) -> list[str]:
    """The adapted modules, after every tensor's name and shape has been checked against the UNet's own.

    Raises: AdapterError for tensors that are no LoRA of this shape, AdapterMismatch for another UNet's.
    """
    named, shapes = len(shapes), {peft_key(key): shape for key, shape in shapes.items()}
    if len(shapes) < named:
        raise AdapterError(f"{origin} holds a tensor under two names.")
    own = {f"unet.{name}": module for name, module in unwrapped(unet).named_modules()}
    expected: dict[str, tuple[int, ...]] = {}
    modules = []
    for key in shapes:
        if not key.endswith(".lora_A.weight"):
            continue
        module = own.get(key.removesuffix(".lora_A.weight"))
        linear = module.base_layer if isinstance(module, BaseTunerLayer) else module
        if not isinstance(linear, nn.Linear):
            raise AdapterMismatch(
                f"{origin} adapts {key.removesuffix('.lora_A.weight')}, which is no linear layer of this UNet. "
                "The adapter belongs to another model."
            )
        stem = key.removesuffix("lora_A.weight")
        modules.append(stem.removeprefix("unet.").removesuffix("."))
        expected[f"{stem}lora_A.weight"] = (rank, linear.in_features)
        expected[f"{stem}lora_B.weight"] = (linear.out_features, rank)
        if dora:
            expected[f"{stem}lora_magnitude_vector"] = (linear.out_features,)
    odd = sorted(set(shapes) ^ set(expected))
    if odd or not shapes:
        raise AdapterError(f"{origin} is not a LoRA of this layout: {odd[0] if odd else 'it is empty'}.")
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise AdapterMismatch(f"{origin}: {key} is {_shown(shapes[key])}, but this UNet needs {shape}.")
    return sorted(modules)


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"({shape[0]}, {shape[1]}, and {len(shape) - 2} more)"
