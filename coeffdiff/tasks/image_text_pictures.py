"""A frozen CLIP vision tower: pictures to a few features each, computed once for all that trains on them.

Shape letters: N pictures, T features of a picture, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.data.decoding import decode_image
from coeffdiff.errors import ModelError, PhotoError
from coeffdiff.models.finding import encoder_folder
from coeffdiff.models.hub_errors import loading_errors
from coeffdiff.pocket import POCKET_CLIP, shipped
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.own_memory import own_memory

_TOWERS = ("clip", "clip_vision_model")


@dataclass(frozen=True)
class Tower:
    """A CLIP vision tower with its image processor. grid: features a side of a picture, at most."""

    name: str
    network: Any
    processor: Any
    grid: int

    @property
    def width(self) -> int:
        """D."""
        return int(self.network.config.hidden_size)

    @property
    def count(self) -> int:
        """T."""
        config = self.network.config
        return 1 + min(config.image_size // config.patch_size, self.grid) ** 2

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, R, R] -> [N, T, D]: the class token, then the patches, averaged to a grid of grid x grid.

        They are those before the last layer, as LLaVA takes them: CLIP's loss never saw the last layer's patches.
        """
        hidden = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        patches = hidden[:, 1:].transpose(1, 2)
        side = round(patches.shape[-1] ** 0.5)
        pooled = F.adaptive_avg_pool2d(patches.unflatten(-1, (side, side)), min(side, self.grid))
        return torch.cat([hidden[:, :1], pooled.flatten(2).transpose(1, 2)], dim=1)


def load_tower(name: str, *, grid: int = 6, device: str | torch.device = "cpu") -> Tower:
    """A CLIP's vision tower by hub id or folder, or "pocket-clip", frozen and in float32.

    grid: 6 gives 36 features a picture beside the class token, as in VL-Adapter (Sung et al., CVPR 2022).
    Raises: ModelError if there is none, it is of another kind, or it is not available offline.
    """
    folder = shipped(name) if name == POCKET_CLIP else encoder_folder(name)
    with quiet_libraries(), loading_errors(f"The vision tower {name}"):
        from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel

        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in _TOWERS:
            raise ModelError(
                f"The vision tower {name} is a {kind}, not a CLIP such as openai/clip-vit-base-patch32."
            )
        network, report = CLIPVisionModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        if lacking := sorted(report["missing_keys"]):
            raise ModelError(f"The vision tower {name} cannot be used: its weights lack {lacking[0]}.")
        processor = AutoImageProcessor.from_pretrained(folder)
    return Tower(name, own_memory(network).requires_grad_(False).eval().to(device), processor, grid)


def picture_features(
    tower: Tower,
    paths: Sequence[Path],
    *,
    batch_size: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Features of picture files, [N, T, D] in float32 on the CPU.

    Raises: PhotoError that names a file which cannot be read.
    """
    parts = []
    for begin in range(0, len(paths), batch_size):
        pictures = [_picture(path) for path in paths[begin : begin + batch_size]]
        pixels = tower.processor(pictures, return_tensors="pt").pixel_values
        parts.append(tower.features(pixels.to(tower.network.device)).cpu())
        if on_progress:
            on_progress(begin + len(pictures))
    return torch.cat(parts)


def _picture(path: Path) -> Any:
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise PhotoError(f"{path} cannot be read: {error.strerror or error}.") from None
    except PhotoError as error:
        raise PhotoError(f"{path} cannot be used: {error}.") from None
