"""PNG files that carry the recipe of their picture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from coeffdiff import __version__
from coeffdiff.errors import ConfigError
from coeffdiff.utils.atomic import atomic_write

_KEY = "coeffdiff"  # the text chunk with the recipe as JSON


def save_png(image: Image.Image, file: Path, recipe: Mapping[str, Any] | None = None) -> None:
    """Write a picture atomically, with its recipe in two text chunks: JSON, and the form of A1111's web UI.

    Raises: ConfigError if it cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    if recipe is not None:
        # Escaped to ASCII, so that whatever a prompt may hold comes back exactly, lone surrogates included.
        chunks.add_itxt(_KEY, json.dumps(recipe, default=str))
        chunks.add_text("parameters", _parameters(recipe))
    try:
        with atomic_write(file) as temporary:
            image.save(temporary, format="PNG", pnginfo=chunks)
    except OSError as error:
        raise ConfigError(f"The picture {file} cannot be written: {error.strerror or error}.") from None


def read_recipe(file: Path) -> dict[str, Any]:
    """The recipe that save_png wrote. Raises: ConfigError if the file is no PNG or carries no recipe of ours."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            text = image.text.get(_KEY)  # type: ignore[attr-defined]  # PNGs have it
        recipe = None if text is None else json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"There is no picture {file}.") from None
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise ConfigError(f"{file} is not a PNG with a readable recipe ({type(error).__name__}).") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{file} carries no recipe of coeffdiff.")
    return recipe


def _parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe in the form of A1111's web UI, which many tools read; no chunk may hold a zero byte."""
    settings = {
        "Steps": recipe.get("steps"),
        "Sampler": str(recipe.get("scheduler")).removesuffix("Scheduler"),
        "Sampler settings": ", ".join(
            f"{name} {value}" for name, value in recipe.get("scheduler_settings", {}).items()
        )
        or None,
        "CFG scale": recipe.get("guidance"),
        "Seed": recipe.get("seed"),
        "Size": f"{recipe.get('width')}x{recipe.get('height')}",
        "Model": recipe.get("model"),
        "Adapters": "; ".join(f"{a['path']} at {a['scale']:g}" for a in recipe.get("adapters", ())) or None,
        "Version": f"coeffdiff {__version__}",
    }

    def quoted(value: Any) -> str:
        return json.dumps(value) if isinstance(value, str) and re.search(r'[,:\n"]', value) else str(value)

    lines = [str(recipe.get("prompt", ""))]
    if recipe.get("negative_prompt"):
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    lines.append(", ".join(f"{key}: {quoted(value)}" for key, value in settings.items() if value is not None))
    return "\n".join(lines).replace("\0", " ").encode("utf-8", "replace").decode("utf-8")


def free_name(file: Path) -> Path:
    """The file, or the next name that is not taken: picture.png, picture-2.png, ..."""
    number, free = 1, file
    while free.exists():
        number += 1
        free = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return free
