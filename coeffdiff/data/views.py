"""Views: the bucket, crop and flip in which a photo is shown to the model."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from coeffdiff.data.photos import Photo
from coeffdiff.errors import ConfigError, ShapeError
from coeffdiff.utils.seeding import stable_seed

Crop = Literal["none", "center", "random"]
MAX_ASPECT = 4  # of a bucket: its long side is at most so many times the short one


@dataclass(frozen=True)
class View:
    """One way a photo is shown to the model: resized, mirrored if flipped, then cropped; decided without pixels.

    size and resized are (width, height), as Pillow counts; crop_top_left and original_size are (top, left) and
    (height, width), as SDXL counts. The crop is measured in the picture that the model sees, so in a flipped
    view left counts from what was the photo's right edge.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    crop_top_left: tuple[int, int]
    original_size: tuple[int, int]
    flipped: bool

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return self.size[1], self.size[0]

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning: original height and width, crop top and left, target height and width."""
        return (*self.original_size, *self.crop_top_left, *self.target_size)


def bucket(width: int, height: int, resolution: int, step: int) -> tuple[int, int]:
    """The (width, height) at which a photo of this size is trained, when the whole of it is to be kept.

    Both are multiples of step, their product is at most resolution**2, and neither is more than MAX_ASPECT
    times the other. Among those it is the one with the greatest (share of the photo kept)**2 * area: at 1024
    and 64 this finds SDXL's own 1344 x 768 for 16:9, 1216 x 832 for 3:2 and 1152 x 896 for 4:3.

    Raises: ConfigError if the resolution is smaller than one step.
    """
    most = resolution**2 // step**2  # cells of step x step
    if most < 1:
        raise ConfigError(f"A resolution of {resolution} is too small: this model needs {step} or more.")
    best, best_score = (1, 1), -1.0
    for across in range(1, 2 * resolution // step + 1):  # at 4:1 the long side is twice the resolution
        low, high = -(-across // MAX_ASPECT), min(across * MAX_ASPECT, most // across)
        # For a given width the score rises up to the photo's own aspect and falls beyond it.
        below = across * height // width
        for down in (below, below + 1):
            down = min(max(down, low), high)
            if low <= down <= high:
                cells = (across * height, down * width)
                score = (min(cells) / max(cells)) ** 2 * (across * down)
                if score > best_score:
                    best, best_score = (across, down), score
    return best[0] * step, best[1] * step


def view_of(
    photo: Photo,
    *,
    resolution: int,
    step: int,
    crop: Crop,
    flip: bool,
    seed: int,
    augmentation: int,
    size: tuple[int, int] | None = None,
) -> View:
    """How a photo is shown in one of its augmentations; crop and flip depend on seed, digest and augmentation only.

    none keeps the whole photo but for the rows or columns that its bucket has no room for, cut evenly on both
    sides; center and random cut a square of side `resolution` (rounded down to a multiple of step) from the
    photo, whose shorter side is resized to it. With flip every other augmentation is mirrored, the first one
    or the second by chance. size, a bucket's (width, height), takes the place of what the photo would choose.

    Raises: ConfigError if the resolution is smaller than one step.
    """
    shape = (photo.width, photo.height) if crop == "none" else (1, 1)
    size = size or bucket(*shape, resolution, step)
    # The size that covers the bucket: one of the two is the bucket's own, the other at least that.
    resized = (
        max(size[0], round(photo.width * size[1] / photo.height)),
        max(size[1], round(photo.height * size[0] / photo.width)),
    )
    spare = (resized[1] - size[1], resized[0] - size[0])  # rows, columns
    if crop == "random":
        draw = random.Random(stable_seed("crop", seed, photo.digest, augmentation))
        crop_top_left = (draw.randint(0, spare[0]), draw.randint(0, spare[1]))
    else:
        crop_top_left = (spare[0] // 2, spare[1] // 2)
    # Alternating, not a coin each time: a coin leaves one photo in 128 with eight augmentations on one side.
    flipped = flip and (stable_seed("flip", seed, photo.digest) + augmentation) % 2 == 1
    return View(size, resized, crop_top_left, (photo.height, photo.width), flipped)


def render(photo_image: Image.Image, view: View) -> Image.Image:
    """The picture that a view describes, RGB of view.size, from what Photo.open returned.

    Raises: ShapeError if the picture is not of the size that the view was made for.
    """
    # reducing_gap: averages whole pixels first where a photo is several times too large; as good, and faster.
    shown = photo_image.resize(
        view.size, Image.Resampling.LANCZOS, box=_part_shown(photo_image, view), reducing_gap=3.0
    )
    return shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else shown


def render_mask(mask_image: Image.Image, view: View, size: tuple[int, int]) -> Image.Image:
    """The part of a photo's mask that a view shows, in `size` = (width, height), by the mean of the covered pixels.

    Raises: ShapeError if the mask is not of the size that the view was made for.
    """
    shown = mask_image.resize(size, Image.Resampling.BOX, box=_part_shown(mask_image, view))
    return shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else shown


def _part_shown(image: Image.Image, view: View) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part that a view shows, in the picture's own pixels."""
    if (image.height, image.width) != view.original_size:
        raise ShapeError(
            f"The view is of a photo of (height, width) {view.original_size}, "
            f"this one has {(image.height, image.width)}."
        )
    (width, height), (top, left) = view.size, view.crop_top_left
    if view.flipped:
        left = view.resized[0] - width - left  # the same columns, counted before the mirroring
    # Crop and resize at once: the same pixels, but a 6000 x 1 photo's cover of a bucket is never built.
    return (
        left * image.width / view.resized[0],
        top * image.height / view.resized[1],
        (left + width) * image.width / view.resized[0],
        (top + height) * image.height / view.resized[1],
    )
