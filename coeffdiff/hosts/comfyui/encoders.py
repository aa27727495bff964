"""Where LoRA on the text encoders goes in a CLIP of ComfyUI: the keys of its weights. Alpha on them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.utils

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.method.adapter_header import PARTS, AdapterHeader
from coeffdiff.method.networks import encoders_in, network_of

# diffusers' name of an encoder -> ComfyUI's
_PARTS = {encoder: part for part, (encoder, _) in PARTS.items()}


class Encoders:
    """The text encoders of one ComfyUI CLIP under diffusers' names; of none, if no CLIP is connected."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip

    def check(self, header: AdapterHeader, folder: Path) -> None:
        """Raises: AdapterError for alpha on text encoders, or if the adapter needs a CLIP and has none;
        AdapterMismatch for a CLIP without SDXL's two encoders."""
        if encoders_in(header.heads):
            raise AdapterError(
                f"{folder} has alpha on the text encoders, which this node cannot apply, and without it the adapter "
                "would be another one: use coeffdiff sample, or load_adapter in diffusers, or train with "
                "method.coeff.text_encoders=false."
            )
        if not header.encoders:
            return
        if self.clip is None:
            raise AdapterError(
                f"{folder} has LoRA on the text encoders: connect the checkpoint's CLIP to the node, and the node's "
                "CLIP to the prompts."
            )
        for encoder in header.encoders:
            if not hasattr(getattr(self.clip.cond_stage_model, _PARTS[encoder], None), "transformer"):
                raise AdapterMismatch(
                    f"{folder} has LoRA on SDXL's two text encoders, and the CLIP that is connected has no "
                    f"{_PARTS[encoder]}. Connect the CLIP of an SDXL checkpoint."
                )

    def linear_size(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a linear layer, None where there is none of that name."""
        try:
            weight = comfy.utils.get_attr(self.clip.cond_stage_model, self.weight_key(module))
        except AttributeError:
            return None
        return tuple(weight.shape) if len(weight.shape) == 2 else None

    def weight_key(self, module: str) -> str:
        """The key of a linear layer's weight among a CLIP's patches."""
        encoder = network_of(module)
        return f"{_PARTS[encoder]}.transformer.{module.removeprefix(f'{encoder}.')}.weight"
