"""What a picture is worth, in numbers: functions of pictures and of the networks that look at them.

Protocol: DreamBooth (arXiv 2208.12242), section 4. Shape letters: N generated pictures, M photos, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coeffdiff.console import quiet_libraries
from coeffdiff.errors import ModelError
from coeffdiff.pocket import POCKET_DINO, shipped

DINO = "facebook/dino-vits16"  # the encoder of DreamBooth's table


@dataclass(frozen=True)
class Encoder:
    """A vision transformer and how it wants its pictures."""

    name: str
    network: Any
    processor: Any

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Unit-length features [N, D] of RGB pictures of any size: the class token of the last layer."""
        parts = []
        for begin in range(0, len(pictures), batch_size):
            pixels = self.processor(
                [picture.convert("RGB") for picture in pictures[begin : begin + batch_size]],
                return_tensors="pt",
            ).pixel_values
            parts.append(self.network(pixel_values=pixels.to(self.network.device)).last_hidden_state[:, 0])
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def load_dino(name: str = DINO, device: str = "cpu") -> Encoder:
    """A ViT by hub id or folder, or "pocket-dino".

    Raises: ModelError if there is none, or it cannot be had offline.
    """
    with quiet_libraries():
        from transformers import AutoImageProcessor, ViTModel

        source: str | Path = shipped(name) if name == POCKET_DINO else name
        try:
            network = ViTModel.from_pretrained(source, dtype=torch.float32, add_pooling_layer=False)
            processor = AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"The encoder {name} cannot be loaded: {first}") from error
    return Encoder(name, network.requires_grad_(False).eval().to(device), processor)


def mean_pairwise_cosine(features: Tensor, references: Tensor) -> float:
    """Mean of the cosines of all pairs of unit-length features [N, D] and [M, D]: DINO's and CLIP's fidelity."""
    return float((features @ references.T).mean())
