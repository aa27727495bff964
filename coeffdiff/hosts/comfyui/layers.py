"""Where an adapter's layers are in a model of ComfyUI: the slots of its attention patches, the keys of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_base
import comfy.utils

from coeffdiff.errors import AdapterMismatch
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.families import SDXL


class Slot(NamedTuple):
    """One attention layer as ComfyUI's patches name it."""

    kind: str  # attn1 or attn2
    block: tuple[str, int, int]  # input, middle or output; its number; the transformer block in it

    def __str__(self) -> str:
        where, number, t = self.block
        return f"{where} block {number}, transformer block {t}, {self.kind}"


class Layers:
    """The layers of one ComfyUI model (a ModelPatcher) under diffusers' names."""

    def __init__(self, model: Any) -> None:
        self.model = model.model
        config = getattr(self.model, "model_config", None)
        self.family = type(config).__name__  # SDXL, SD15, Flux, ...
        self._paths: dict[str, str] = comfy.utils.unet_to_diffusers(getattr(config, "unet_config", {}))

    def check_family(self, header: AdapterHeader, folder: Path) -> None:
        """Raises: AdapterMismatch unless adapter and model are of SDXL's architecture."""
        if header.base_family is not SDXL:
            raise AdapterMismatch(
                f"{folder} is an adapter for {header.base_family.label}, and this node applies those for SDXL alone. "
                "Use it with coeffdiff or diffusers, or draw with its LoRA alone: coeffdiff export writes the file."
            )
        if not isinstance(self.model, comfy.model_base.SDXL):
            raise AdapterMismatch(
                f"{folder} was trained on {header.base_model}, an SDXL model, but the model that is connected is "
                f"{self.family}. Connect SDXL (its base, not its refiner) or a fine-tune of it."
            )

    def slot(self, layer: str, heads: int, folder: Path) -> Slot:
        """The slot of an attention layer. Raises: AdapterMismatch if there is none with so many heads."""
        path = self._paths.get(f"{layer}.to_q.weight")
        attention = path and self._module(path.removesuffix(".to_q.weight"))
        own = getattr(attention, "heads", None)
        if path is None or own != heads:
            there = f"this model has {own} heads there" if own else "this model has no such layer"
            raise AdapterMismatch(
                f"{folder} has {heads} x {heads} coefficients for {layer}, but {there} (ComfyUI takes it for "
                f"{self.family}). Connect the SDXL model that the adapter was trained on, or a fine-tune of it."
            )
        part, number, *_ = parts = path.split(".")
        t = int(parts[parts.index("transformer_blocks") + 1])
        where = part.removesuffix("_block").removesuffix("_blocks")
        return Slot(parts[-3], (where, 0 if where == "middle" else int(number), t))

    def linear_size(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a linear layer, None where there is none of that name."""
        path = self._paths.get(f"{module}.weight")
        weight = getattr(path and self._module(path.removesuffix(".weight")), "weight", None)
        return tuple(weight.shape) if weight is not None and len(weight.shape) == 2 else None

    def weight_key(self, module: str) -> str:
        """The key of a linear layer's weight among a model's patches."""
        return f"diffusion_model.{self._paths[f'{module}.weight']}"

    def _module(self, path: str) -> Any:
        try:
            return comfy.utils.get_attr(self.model, f"diffusion_model.{path}")
        except AttributeError:
            return None
