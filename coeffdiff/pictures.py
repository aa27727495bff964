"""Pictures as files and sheets: PNGs that carry their recipe, labelled grids, figures. Nothing here needs torch."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from coeffdiff import __version__
from coeffdiff.errors import ConfigError
from coeffdiff.files import appearing

_KEY = "coeffdiff"  # the text chunk with the recipe as JSON


def save_png(image: Image.Image, file: Path, recipe: Mapping[str, Any] | None = None) -> None:
    """Write a picture whole or not at all, with its recipe in two text chunks: JSON, and the form of A1111's web UI.

    Raises: ConfigError if it cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    if recipe is not None:
        # Escaped to ASCII, so that whatever a prompt may hold comes back exactly, lone surrogates included.
        chunks.add_itxt(_KEY, json.dumps(recipe, default=str))
        chunks.add_text("parameters", _parameters(recipe))
    try:
        with appearing(file) as temporary:
            image.save(temporary, format="PNG", pnginfo=chunks)
    except OSError as error:
        raise ConfigError(f"The picture {file} cannot be written: {error.strerror or error}.") from None


def read_recipe(file: Path) -> dict[str, Any]:
    """What save_png wrote. Raises: ConfigError if the file is no PNG or carries no recipe of ours."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            text = image.text.get(_KEY)  # type: ignore[attr-defined]  # PNGs have it
        found = None if text is None else json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"There is no picture {file}.") from None
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise ConfigError(f"{file} is not a PNG with a readable recipe ({type(error).__name__}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} carries no recipe of coeffdiff.")
    return found


def _parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe for people and for the many tools that read this form; no chunk may hold a zero byte."""
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


_GAP = 8  # pixels between everything
INK, SOFT, GRID = "#222222", "#706e6a", "#e4e2de"  # of everything that is drawn: words, smaller words, lines
_PAPER, _EMPTY = (255, 255, 255), (236, 236, 236)
_SHEET = (252, 251, 249)  # a figure's paper is a little warmer


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]],
    columns: Sequence[str] = (),
    *,
    title: str = "",
    cell: int = 256,
) -> Image.Image:
    """Pictures in rows, each row's label on its left and the columns' labels on top.

    Args:
        rows: label and pictures; None, or a row that ends early, leaves a grey cell.
        cell: side in pixels of the square that each picture is fitted into.
    """
    count = max([len(columns), *(len(pictures) for _, pictures in rows)], default=0)
    points = max(13, cell // 16)
    line = round(points * 1.35)
    margin = max(150, round(cell * 0.8)) if any(label.strip() for label, _ in rows) else 0
    left = margin + _GAP if margin else 0
    right = left + count * (cell + _GAP)
    heads = [_wrapped(text, points, cell, 3) for text in columns]
    head = max((len(lines) for lines in heads), default=0) * line
    titles = _wrapped(title, round(points * 1.3), max(right - _GAP, cell), 3) if title else []
    labels = [
        _wrapped(label, points, margin - 2, max(4, cell // line)) if margin else [] for label, _ in rows
    ]
    scaled = [[picture and fitted(picture, cell) for picture in pictures] for _, pictures in rows]
    heights = [
        max(
            len(label) * line,
            max((picture.height for picture in pictures if picture), default=0) or cell,
        )
        for label, pictures in zip(labels, scaled, strict=True)
    ]
    top = _GAP + len(titles) * round(line * 1.3) + (_GAP if titles else 0)
    first = top + (head + _GAP if head else 0)
    grid = Image.new("RGB", (_GAP + right, first + sum(h + _GAP for h in heights)), _PAPER)
    draw = ImageDraw.Draw(grid)
    _write(draw, titles, round(points * 1.3), round(line * 1.3), _GAP, _GAP)
    for column, lines in enumerate(heads):
        x = _GAP + left + column * (cell + _GAP) + cell // 2
        _write(draw, lines, points, line, x, top + head - len(lines) * line, anchor="ma")
    y = first
    for label, pictures, height in zip(labels, scaled, heights, strict=True):
        _write(draw, label, points, line, _GAP, y + (height - len(label) * line) // 2)
        for column in range(count):
            x = _GAP + left + column * (cell + _GAP)
            picture = pictures[column] if column < len(pictures) else None
            if picture:
                grid.paste(picture, (x + (cell - picture.width) // 2, y + (height - picture.height) // 2))
            else:
                draw.rectangle((x, y, x + cell - 1, y + height - 1), fill=_EMPTY)
        y += height + _GAP
    return grid


@dataclass(frozen=True)
class Band:
    """A row of a figure: what it is, more about it in grey behind that, pictures, and a few words over each."""

    heading: str
    pictures: Sequence[Image.Image]
    note: str = ""
    columns: Sequence[str] = ()


def figure(
    bands: Sequence[Band], *, title: str, facts: str = "", footer: str = "", cell: int = 256
) -> Image.Image:
    """A sheet to show: a title, facts in grey, bands as wide as the longest, and its origin in small print.

    Letters are large against the pictures, so that they can be read on a page that shows half the size.

    Args:
        cell: side in pixels of a picture in the longest band; in shorter ones they are up to a quarter larger.
    """
    points, gap, margin = max(12, round(cell * 0.09)), round(cell * 0.055), round(cell * 0.16)
    width = max([1, *(len(band.pictures) for band in bands)]) * (cell + gap) - gap
    blocks = [(margin, _paragraph(title, round(points * 1.6), width, bold=True))]  # each after so much space
    if facts:
        blocks.append((round(points * 0.4), _paragraph(facts, points, width, SOFT)))
    for band in bands:
        blocks.append((round(points * 1.6), _band(band, points, width, gap, round(cell * 1.25))))
    if footer:
        blocks.append((round(points * 1.2), _paragraph(footer, round(points * 0.75), width, SOFT)))
    height = sum(space + block.height for space, block in blocks) + margin
    sheet = Image.new("RGB", (width + 2 * margin, height), _SHEET)
    y = 0
    for space, block in blocks:
        sheet.paste(block, (margin, y + space))
        y += space + block.height
    return sheet


def _paragraph(text: str, points: int, width: int, ink: str = INK, bold: bool = False) -> Image.Image:
    line = round(points * 1.35)
    lines = _wrapped(text, points, width, 4)
    block = Image.new("RGB", (width, len(lines) * line), _SHEET)
    _write(ImageDraw.Draw(block), lines, points, line, 0, 0, ink=ink, bold=bold)
    return block


def _band(band: Band, points: int, width: int, gap: int, most: int) -> Image.Image:
    """Heading and note on one line, then the words over the pictures, then the pictures, `most` pixels at most."""
    pitch = min(most + gap, (width + gap) / max(1, len(band.pictures)))  # from one picture to the next
    side = math.floor(pitch) - gap
    large, line = round(points * 1.15), round(points * 1.3)
    heading = _wrapped(band.heading, large, width, 1)
    behind = round(_font_for(band.heading, large).getlength("".join(heading)) + points * 0.8)
    note = _wrapped(band.note, points, max(1, width - behind), 1)
    heads = [_wrapped(text, points, side, 3) for text in band.columns]
    head = max((len(lines) for lines in heads), default=0) * line
    pictures = [fitted(picture, side, smoothly=True) for picture in band.pictures]
    top = round(large * 1.6) + (round(points * 0.3) + head if head else 0)
    block = Image.new("RGB", (width, top + max((p.height for p in pictures), default=0)), _SHEET)
    draw = ImageDraw.Draw(block)
    _write(draw, heading, large, line, 0, large, anchor="ls", bold=True)
    _write(draw, note, points, line, behind, large, anchor="ls", ink=SOFT)
    for column, lines in enumerate(heads):
        y = top - round(points * 0.25) - len(lines) * line
        _write(draw, lines, points, line, round(column * pitch), y)
    for column, picture in enumerate(pictures):
        block.paste(picture, (round(column * pitch), top))
    return block


def fitted(image: Image.Image, cell: int, smoothly: bool = False) -> Image.Image:
    """The picture with its longer side at `cell` pixels.

    Small ones grow by whole pixels, so that they stay sharp, or smoothly to the full cell.
    """
    ratio = cell / max(image.size)
    resampling = Image.Resampling.LANCZOS
    if not smoothly and ratio >= 2:
        ratio, resampling = math.floor(ratio), Image.Resampling.NEAREST
    elif not smoothly:
        ratio = min(ratio, 1.0)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.convert("RGB").resize(size, resampling)


def _wrapped(text: str, points: int, width: int, most: int) -> list[str]:
    """Lines of at most `width` pixels, `most` of them; words too long for a line are broken, the rest is cut."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    font = _font_for(text, points)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        current = ""
        for word in paragraph.split():
            joined = f"{current} {word}".strip()
            if font.getlength(joined) <= width:
                current = joined
                continue
            if current:
                lines.append(current)
            current = word
            while len(current) > 1 and font.getlength(current) > width and len(lines) <= most:
                fits = 1
                while font.getlength(current[: fits + 1]) <= width:
                    fits += 1
                lines.append(current[:fits])
                current = current[fits:]
        if current:
            lines.append(current)
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "..."]
    return lines


def _write(
    draw: ImageDraw.ImageDraw,
    lines: list[str],
    points: int,
    line: int,
    x: int,
    y: int,
    *,
    anchor: str = "la",
    ink: str = INK,
    bold: bool = False,
) -> None:
    """Lines, `line` pixels apart; anchor in Pillow's letters. Pillow's font has one weight: bold ones are outlined."""
    font = _font_for(" ".join(lines), points)
    for number, text in enumerate(lines):
        at = (x, y + number * line)
        draw.text(at, text, ink, font, anchor=anchor, stroke_width=points / 60 if bold else 0)


def _font_for(text: str, points: int) -> Any:
    """Pillow's own font, or one of the system's if that has more of the text's characters."""
    letters = set(text) - set(" \n")
    if all(_has_glyph(None, letter) for letter in letters):
        return _font(None, points)
    names = (None, *_SYSTEM_FONTS)
    return _font(max(names, key=lambda name: sum(_has_glyph(name, letter) for letter in letters)), points)


_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "segoeui.ttf",
    "msyh.ttc",
    "malgun.ttf",
)


@functools.lru_cache(maxsize=64)
def _font(name: str | None, points: int) -> Any:
    if name is not None:
        try:
            return ImageFont.truetype(name, points)
        except OSError:
            return None
    return ImageFont.load_default(points)


@functools.lru_cache(maxsize=4096)
def _has_glyph(name: str | None, letter: str) -> bool:
    """Whether the font draws the letter as something else than its box for unknown characters."""
    font = _font(name, 16)
    return font is not None and bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


def free_name(file: Path) -> Path:
    """The file, or the next name that is not taken: picture.png, picture-2.png, ..."""
    number, free = 1, file
    while free.exists():
        number += 1
        free = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return free
