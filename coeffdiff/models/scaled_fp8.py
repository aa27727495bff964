"""Scaled fp8, as ComfyUI writes it: beside X.weight in fp8 lies X.scale_weight, and the weight is their product.

    unreadable(header)            why a file's quantized weights are not read, or None
    is_scaled(names)              whether some of these tensors have a scale
    read(file, names, dtype)      these tensors, scaled; the product is made in float32 and rounded once to dtype

X.scale_input, beside them in some files, is for products in fp8 and no part of the weights. Other ways of quantizing
(bitsandbytes, GPTQ, int8, ComfyUI's comfy_quant) are named, not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCALE = ".scale_weight"
_BESIDE = (SCALE, ".scale_input", ".scaled_fp8")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_OTHERS = re.compile(
    r"\.(comfy_quant|weight_scale(_2|_inv)?|input_scale|absmax|quant_map|quant_state\..*|nested_absmax|nested_quant_map|"
    r"qweight|qzeros|scales|g_idx|weight_format|SCB)$"
)
_ADVICE = "pass the same model in float16, bfloat16 or float32"


def is_beside(name: str) -> bool:
    """Whether a tensor scales others, and is no weight of a network."""
    return name == "scaled_fp8" or name.endswith(_BESIDE)


def is_scaled(names: Collection[str]) -> bool:
    return any(name.endswith(SCALE) for name in names)


def unreadable(header: Mapping[str, Any]) -> str | None:
    """The rest of a sentence that begins with the file's name. header: as it stands in the file."""
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in tensors.items():
        if _OTHERS.search(name):
            return f"is quantized in a way that is not read (it holds {name}); {_ADVICE}"
        if "scale_weight" in name and not name.endswith(SCALE):
            return (
                f"is scaled fp8 with a scale that belongs to no weight ({name}), which is not read; {_ADVICE}"
            )
        matrix = name.endswith((".weight", "_weight")) and len(entry["shape"]) > 1
        if matrix and entry["dtype"] not in _FLOATS:
            return f"is quantized in a way that is not read ({name} is {entry['dtype']}); {_ADVICE}"
    for name in filter(lambda one: one.endswith(SCALE), tensors):
        weight, scale = tensors.get(_scaled_by(name)), tensors[name]
        if weight is None:
            return (
                f"is scaled fp8 with a scale that belongs to no weight ({name}), which is not read; {_ADVICE}"
            )
        one, rows = math.prod(scale["shape"]) == 1, [weight["shape"][0], *[1] * (len(weight["shape"]) - 1)]
        if scale["dtype"] not in _FLOATS or not (one or scale["shape"] == rows):
            return (
                f"is scaled fp8 with scales that are not read ({name} is {scale['dtype']} of shape {scale['shape']}, "
                f"where one number, or one for each row, is expected); {_ADVICE}"
            )
    return None


def read(file: Path, names: Collection[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of these names, those with a scale in dtype and scaled, the rest as the file has them."""
    from safetensors import safe_open

    tensors = {}
    with safe_open(file, framework="pt") as opened:
        scales = {_scaled_by(name): name for name in opened.keys() if name.endswith(SCALE)}  # noqa: SIM118
        for name in names:
            tensor = opened.get_tensor(name)
            if name in scales:
                scale = opened.get_tensor(scales[name]).float()
                scale = scale.reshape(()) if scale.numel() == 1 else scale
                tensor = (tensor.float() * scale).to(dtype)
            tensors[name] = tensor
    return tensors


def _scaled_by(scale: str) -> str:
    return scale.removesuffix(SCALE) + ".weight"
