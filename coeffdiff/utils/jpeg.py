"""Pictures as JPEG in memory."""

from __future__ import annotations

import io

from PIL import Image


def jpeg_bytes(image: Image.Image, quality: int = 85) -> bytes:
    """A picture of any mode as the bytes of a JPEG file."""
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=quality)
    return content.getvalue()
