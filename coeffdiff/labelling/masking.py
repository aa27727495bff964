"""Masks from marks: grown a little, in the size of the photo, and only where something was seen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Below this part of a photo a mark is a speck of noise: of 1024 x 1024 pixels a square of 32
LEAST_SHARE = 0.001


def mask_from(mark: Tensor, size: tuple[int, int], grow: float) -> Image.Image:
    """A mask as training reads it: 8-bit grey, 255 on the subject, of the upright photo's size.

    Args:
        mark: [h, w], bool. size: (width, height) of the photo.
        grow: by how much its borders move outwards, in percent of the longer side. A border that cuts into the
            subject costs more than some background.
    """
    reach = round(max(mark.shape) * grow / 100)
    if reach:
        spot = mark[None, None].float()
        side = 2 * reach + 1
        spot = F.max_pool2d(spot, (side, 1), stride=1, padding=(reach, 0))
        mark = F.max_pool2d(spot, (1, side), stride=1, padding=(0, reach))[0, 0] > 0.5
    grey = Image.fromarray((mark.to(torch.uint8) * 255).numpy())
    return grey.resize(size, Image.Resampling.BILINEAR)


def share_of(mark: Tensor) -> float:
    """The part of a picture that is marked, 0 to 1."""
    return float(mark.float().mean())
