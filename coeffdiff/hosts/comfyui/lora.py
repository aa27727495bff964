"""LoRA and DoRA in ComfyUI: patches of its weights in PEFT's formula, counted.

ComfyUI's own DoRA divides by the norm of W where PEFT has that of W + s B A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from coeffdiff.errors import AdapterError
from coeffdiff.hosts.comfyui.encoders import Encoders
from coeffdiff.hosts.comfyui.layers import Layers
from coeffdiff.method.adapter_header import LoraHeader
from coeffdiff.method.lora_layout import MAGNITUDE, lora_pairs, peft_key


class Term(NamedTuple):
    """What one adapter does to a weight [out, in]: A [rank, in], B [out, rank], s = strength * alpha / rank."""

    down: Tensor
    up: Tensor
    scaling: float
    magnitude: Tensor | None  # [out], of a DoRA

    def after(self, changed: Tensor, own: Tensor) -> Tensor:
        """The weight that earlier adapters have `changed`, with this one; `own` is the model's, for DoRA's norm.

        LoRA: C + s B A. DoRA, as PEFT applies it: m / |W + s B A| * (C + s B A), norms by row.
        """
        product = self.scaling * (_near(self.up, own) @ _near(self.down, own))
        if self.magnitude is None:
            return changed + product
        norm = (own + product).norm(dim=1, keepdim=True)
        return _near(self.magnitude, own)[:, None] / norm * (changed + product)


class LoraPatch(WeightAdapterBase):
    """The LoRAs and DoRAs of one weight, in the order in which their nodes stand. Never changed afterwards."""

    name = "coeffdiff LoRA"

    def __init__(self, terms: tuple[Term, ...]) -> None:
        self.terms = terms
        self.loaded_keys: set[str] = set()
        self.weights: list[Tensor] = []

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """The patched weight, in the type and place of `weight`, as ComfyUI's own adapters have it."""
        own = changed = weight.float()
        for term in self.terms:
            changed = term.after(changed, own)
        weight += function((strength * (changed - own)).to(weight.dtype))
        return weight


def add_lora(
    model: Any,
    layers: Layers | Encoders,
    tensors: dict[str, Tensor],
    lora: LoraHeader,
    strength: float,
    origin: str,
) -> int:
    """Patch the weights of `model` (a clone of ours) by a LORA_FILE's tensors; the number of patched weights.

    model: a ModelPatcher, of the UNet with `layers` of it, or of a CLIP with its Encoders.

    Raises: AdapterError unless every module of the file has been patched.
    """
    pairs = lora_pairs(tensors, origin)
    magnitudes = {peft_key(key).removeprefix("unet."): tensor for key, tensor in tensors.items()}
    scaling = strength * lora.alpha / lora.rank
    added = 0
    for module, (down, up) in pairs.items():
        term = Term(down, up, scaling, magnitudes.get(module + MAGNITUDE))
        added += _add_term(model, layers.weight_key(module), term)
    if added != len(pairs):
        raise AdapterError(
            f"{origin}: ComfyUI took {added} of {len(pairs)} LoRA modules. Nothing was applied, since half a LoRA "
            "would be another adapter. Update ComfyUI, or report this with its version."
        )
    return added


def _add_term(model: Any, key: str, term: Term) -> int:
    """One patch of ours a weight, before those that add to it, so that DoRA's norm is that of the model's own weight.

    Returns: 1, or 0 if ComfyUI did not take it.
    """
    before = list(model.patches.get(key, []))
    ours = next((i for i, patch in enumerate(before) if isinstance(patch[1], LoraPatch)), None)
    terms = (term,) if ours is None else (*before[ours][1].terms, term)
    if not model.add_patches({key: LoraPatch(terms)}):
        return 0
    new = model.patches[key][-1]
    if ours is not None:
        before[ours] = new
    else:  # behind a merge of models, which makes another weight of it
        merges = [i + 1 for i, patch in enumerate(before) if patch[2] != 1]
        before.insert(max(merges, default=0), new)
    model.patches[key] = before
    return 1


def _near(tensor: Tensor, weight: Tensor) -> Tensor:
    moved: Tensor = comfy.model_management.cast_to_device(tensor, weight.device, torch.float32)
    return moved
