"""Masks of photos, written as soon as they are made: grown a little, and only where something was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageStat
from torch import Tensor

from coeffdiff.data.photos import Photo
from coeffdiff.labelling.places import Place
from coeffdiff.labelling.segmenter import Segmenter
from coeffdiff.utils.png import save_png

# Below this part of a photo a mark is a speck of noise: of 1024 x 1024 pixels a square of 32
LEAST_SHARE = 0.001


@dataclass(frozen=True)
class Masked:
    """A mask of a photo. share: the part of it that is white, 0 to 1."""

    photo: Photo
    file: Path
    share: float


def write_masks(
    places: Sequence[Place],
    segmenter: Segmenter,
    *,
    grow: float,
    batch_size: int,
    dry_run: bool = False,
    on_photo: Callable[[int], None] = lambda done: None,
) -> tuple[list[Masked], list[Photo]]:
    """A mask for each place, each batch written before the next is begun; and the photos that the subject is not in.

    Args:
        grow: see mask_from.
        dry_run: nothing is written.
        on_photo: called with the number of photos that are done.
    Raises: PhotoError for a photo that has changed since it was read, ConfigError for a file that cannot be written.
    """
    written, unseen = [], []
    for begin in range(0, len(places), batch_size):
        batch = places[begin : begin + batch_size]
        marks = segmenter.marks([place.photo.open() for place in batch])
        for place, mark in zip(batch, marks, strict=True):
            if share_of(mark) < LEAST_SHARE:
                unseen.append(place.photo)
                continue
            mask = mask_from(mark, (place.photo.width, place.photo.height), grow)
            if not dry_run:
                save_png(mask, place.file)
            written.append(Masked(place.photo, place.file, ImageStat.Stat(mask).mean[0] / 255))
        on_photo(begin + len(batch))
    return written, unseen


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
