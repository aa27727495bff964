"""The pixels of masks: read, checked, brought to their photo's size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coeffdiff.data.captions import printable_name
from coeffdiff.data.decoding import brightness_of, decode_image
from coeffdiff.errors import PhotoError

MASK_SUFFIX = ".mask.png"  # photo.mask.png beside photo.jpg marks its subject and is no photo
# Of 255: a mask whose brightest pixel is below this marks nothing (labels 0 and 1, for one)
FAINTEST_MASK = 128
WITHOUT_MASKS = "With training.masked_loss=false masks are ignored"


@dataclass(frozen=True)
class Mask:
    """Where a photo shows its subject, white on black: photo.mask.png beside it, or the photo's own alpha channel.

    path: of the mask's file, or of the photo for an alpha channel; digest: the sha256 (hex) of its bytes. masks.py
    knows the other names of mask files.
    """

    path: Path
    digest: str


def read_mask(path: Path, photo: Path, size: tuple[int, int]) -> Mask:
    """A mask file that fits its photo, whose upright (width, height) is size. Raises: PhotoError, a whole sentence."""
    name = printable_name(path)
    try:
        data = path.read_bytes()
        mask = decode_image(data, brightness_of)
    except OSError as error:
        raise PhotoError(f"The mask {name} cannot be read ({error.strerror or error}).") from None
    except PhotoError as reason:
        raise PhotoError(
            f"The mask {name} cannot be used: {reason}. {WITHOUT_MASKS}, or make it again."
        ) from None
    assert mask is not None
    if mask.size != size:
        raise PhotoError(
            f"The mask {name} has {mask.width} x {mask.height} pixels, its photo {printable_name(photo)} has "
            f"{size[0]} x {size[1]} when upright. Save the mask in the photo's size; {WITHOUT_MASKS.lower()}."
        )
    check_mask(f"The mask {name}", "white marks the subject", mask)
    return Mask(path, hashlib.sha256(data).hexdigest())


def check_mask(name: str, why: str, mask: Image.Image) -> None:
    """Raises: PhotoError if there is no subject in a mask."""
    brightest = mask.getextrema()[1]
    if isinstance(brightest, int | float) and brightest < FAINTEST_MASK:
        raise PhotoError(
            f"{name} marks nothing to learn: {why}, and the highest value is {brightest:g} of 255. {WITHOUT_MASKS}."
        )
