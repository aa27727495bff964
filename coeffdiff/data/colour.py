"""Colour profiles: pictures into sRGB, judged by what a profile does and not by what it is called."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

# Levels of 255. The sRGB profiles of several makers differ from each other by this much or less; a plain gamma of
# 2.2, the nearest thing that is not sRGB, by seven.
_SAME = 3
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F"})


def is_grey(mode: str) -> bool:
    """Whether a Pillow mode has brightness alone."""
    return mode in _GREY_MODES or mode.startswith("I;")


def to_srgb(image: Image.Image, profile: bytes, grey: bool) -> Image.Image:
    """From the photo's own colour space (phones: Display P3; print: CMYK); as it is if the profile is unusable.

    Args:
        image: L, RGB, RGBA or CMYK.
        grey: the file has brightness alone, whatever mode it has been brought to.
    """
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        if space == "GRAY" and grey:
            image = image.convert("L")
        elif space == "RGB" and image.mode != "CMYK":
            image = image.convert("RGB")
        elif (space, image.mode) != ("CMYK", "CMYK"):
            return image  # of another kind than the picture
        target: Any = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, image.mode, "RGB")
        if image.mode != "CMYK" and _changes_nothing(transform, image.mode):
            converted = image.convert("RGB")
        else:
            converted = ImageCms.applyTransform(image, transform) or image.convert("RGB")
        if alpha is not None:
            converted.putalpha(alpha)
        return converted
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError):
        return image


def profile_fault(image: Image.Image) -> str | None:
    """Why a picture's colour profile cannot be used, as the end of a sentence; None if it can, or there is none.

    image: may be opened only, its pixels not yet decoded.
    """
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return None
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError):
        return "has a damaged colour profile"
    own = {"CMYK": "CMYK", "LAB": "Lab"}.get(image.mode, "GRAY" if is_grey(image.mode) else "RGB")
    if space == own or (space, own) == ("RGB", "GRAY"):
        return None
    return f"has a colour profile for {space}, and is {own}"


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Whether a transform to sRGB changes no colour, tried on a cube of colours and on dark greys."""
    from PIL import ImageCms

    steps = range(0, 256, 51)
    colours = [(r, g, b) for r in steps for g in steps for b in steps] + [(v, v, v) for v in range(0, 64, 4)]
    probe = Image.new("RGB", (len(colours), 1))
    for x, colour in enumerate(colours):
        probe.putpixel((x, 0), colour)
    before = probe.convert(mode)
    after = ImageCms.applyTransform(before, transform)
    if after is None:
        return True
    pairs = zip(before.convert("RGB").tobytes(), after.tobytes(), strict=True)
    return max(abs(a - b) for a, b in pairs) <= _SAME
