"""Image files to upright RGB pictures: every mode, orientation and colour profile; limits on what is opened."""

from __future__ import annotations

import hashlib
import io
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from coeffdiff.data.captions import CAPTION_SUFFIXES
from coeffdiff.data.colour import is_grey, profile_fault, to_srgb
from coeffdiff.data.masks import Masks
from coeffdiff.errors import PhotoError

KINDS = "JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF and BMP"
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".hif"}
    | {".tif", ".tiff", ".gif", ".bmp"}
)
SYSTEM_FILE = "a hidden or system file"  # the one reason that an error need not repeat
MAX_PIXELS = 150_000_000  # 450 MB decoded; above Pillow's warning (90 MP), below its refusal (179 MP)
MAX_BYTES = 2**30

# Only these decoders see a file's bytes; Pillow knows others, one of which starts Ghostscript. MPO comes with JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP")
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_TO_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_Convert = Callable[[Image.Image], Image.Image | None]


def read_image_file(path: Path, masks: Masks) -> bytes:
    """The bytes of what may be a picture. Raises: PhotoError, a reason without the name, for anything else."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or path.name.lower() in _SYSTEM_FILES:
        raise PhotoError(SYSTEM_FILE)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise PhotoError("a subfolder, and subfolders are not read")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
            raise PhotoError("not an ordinary file")
        if path in masks:
            raise PhotoError(masks.why_not(path))
        if suffix in CAPTION_SUFFIXES:
            kind = "text" if suffix == ".txt" else "caption"
            raise PhotoError(f"a {kind} without a photo of that name")
        if suffix not in SUFFIXES:
            raise PhotoError(f"{suffix or 'a name without suffix'} is not among {KINDS}")
        if status.st_size == 0:
            raise PhotoError("empty, 0 bytes")
        if status.st_size > MAX_BYTES:
            raise PhotoError("larger than 1 GiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise PhotoError("a link that leads nowhere" if path.is_symlink() else "vanished") from None
    except OSError as error:
        raise PhotoError(f"cannot be read: {error.strerror or error}") from None


def decode_again(path: Path, digest: str, convert: _Convert) -> Image.Image | None:
    """Decode a file that was checked before. Raises: PhotoError, a whole sentence, if it is another file now."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise PhotoError(f"{path} was checked, but can no longer be read ({reason}).") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise PhotoError(f"{path} has changed since it was checked; start again with the new file.")
    try:
        return decode_image(data, convert)
    except PhotoError as error:  # out of memory, for one
        raise PhotoError(f"{path} was checked, but can no longer be decoded: {error}.") from None


def alpha_of_file(data: bytes) -> Image.Image | None:
    """The alpha channel of a picture that has been decoded before, upright; None if it hides nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # JPEGs say without being decoded again that they have none
        if not Image.open(io.BytesIO(data), formats=_FORMATS).has_transparency_data:
            return None
    alpha = decode_image(data, alpha_channel)
    return None if alpha is None or alpha.getextrema()[0] == 255 else alpha


def colour_fault(data: bytes) -> str | None:
    """Why the colour profile of a picture that has been decoded before cannot be used; None if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return profile_fault(Image.open(io.BytesIO(data), formats=_FORMATS))


def decode_image(data: bytes, convert: _Convert | None = None) -> Any:
    """A file's bytes as an upright picture, RGB or what `convert` makes of it (None stays None).

    Raises: PhotoError, a reason without the name.
    """
    import pillow_heif

    pillow_heif.register_heif_opener()
    try:
        # Ignored: warnings on sizes (checked here), odd EXIF and odd palettes; none of them concerns the user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            orientation = orientation_of(image)  # after load: TIFF's decoder has turned the picture by then
            made = (convert or to_rgb)(image)
        return turned(made, orientation) if made else made
    except Image.DecompressionBombError:
        raise PhotoError(
            f"more than {MAX_PIXELS // 10**6} megapixels, a decompression bomb or a picture to shrink first"
        ) from None
    except UnidentifiedImageError:
        known = re.match(rb"\xff\xd8|\x89PNG|GIF8|BM|II|MM|RIFF|....ftyp", data, re.DOTALL)
        reason = "damaged or cut off, it cannot be opened" if known else f"its content is none of {KINDS}"
        raise PhotoError(reason) from None
    except MemoryError:
        raise PhotoError("too large for this machine's memory") from None
    except Exception as error:  # on damaged files decoders raise anything from SyntaxError to struct.error
        detail = " ".join(str(error).split()) or type(error).__name__
        cut = re.search("truncated|end of file", detail, re.IGNORECASE)
        raise PhotoError("cut off, its end is missing" if cut else f"damaged ({detail})") from None


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The picture turned upright, from its EXIF orientation."""
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a mangled EXIF block is no reason to lose the photo
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB from any mode that Pillow decodes to; transparent parts show white."""
    profile, grey = image.info.get("icc_profile"), is_grey(image.mode)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image = to_srgb(image, profile, grey)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def alpha_channel(image: Image.Image) -> Image.Image | None:
    """The alpha channel, or None for a picture without one."""
    if not image.has_transparency_data or image.mode.startswith("I") or image.mode == "F":
        return None
    return image.convert("RGBA").getchannel("A")


def brightness_of(image: Image.Image) -> Image.Image:
    """8-bit grey from any mode; transparent parts show black, since in a mask black is what does not count."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGB", image.size, "black")
        black.paste(image, mask=image.getchannel("A"))
        image = black
    return image.convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or more bits as 8; Pillow's own convert would cut off everything above 255.

    32-bit and float pictures do not say which value is white. It is taken to be the smallest usual one that the
    brightness (its 99th percentile, for overshoot) stays below; if there is none, that brightness itself.
    """
    import numpy as np

    values = np.array(image, dtype=np.float32)  # changed in place from here on: it may hold 600 MB
    np.nan_to_num(values, copy=False)
    white = 65535.0
    if not image.mode.startswith("I;16"):
        bright = float(np.quantile(values.ravel()[:: values.size // 10**6 + 1], 0.99))
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        white = next((value for value in usual if bright <= value), bright)
    values *= 255 / white
    return Image.fromarray(np.clip(np.round(values, out=values), 0, 255, out=values).astype(np.uint8))
