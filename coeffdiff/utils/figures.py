"""A figure of several bands of pictures, with titles and text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from coeffdiff.utils.grids import fitted
from coeffdiff.utils.text_drawing import INK, SOFT, draw_text, font_for, wrap_text

_SHEET = (252, 251, 249)  # a figure's paper is a little warmer


@dataclass(frozen=True)
class Band:
    """A row of a figure: a heading, a note in grey behind it, pictures, and a few words over each of them."""

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
    lines = wrap_text(text, points, width, 4)
    block = Image.new("RGB", (width, len(lines) * line), _SHEET)
    draw_text(ImageDraw.Draw(block), lines, points, line, 0, 0, ink=ink, bold=bold)
    return block


def _band(band: Band, points: int, width: int, gap: int, most: int) -> Image.Image:
    """Heading and note on one line, then the words over the pictures, then the pictures, `most` pixels at most."""
    pitch = min(most + gap, (width + gap) / max(1, len(band.pictures)))  # from one picture to the next
    side = math.floor(pitch) - gap
    large, line = round(points * 1.15), round(points * 1.3)
    heading = wrap_text(band.heading, large, width, 1)
    behind = round(font_for(band.heading, large).getlength("".join(heading)) + points * 0.8)
    note = wrap_text(band.note, points, max(1, width - behind), 1)
    heads = [wrap_text(text, points, side, 3) for text in band.columns]
    head = max((len(lines) for lines in heads), default=0) * line
    pictures = [fitted(picture, side, smoothly=True) for picture in band.pictures]
    top = round(large * 1.6) + (round(points * 0.3) + head if head else 0)
    block = Image.new("RGB", (width, top + max((p.height for p in pictures), default=0)), _SHEET)
    draw = ImageDraw.Draw(block)
    draw_text(draw, heading, large, line, 0, large, anchor="ls", bold=True)
    draw_text(draw, note, points, line, behind, large, anchor="ls", ink=SOFT)
    for column, lines in enumerate(heads):
        y = top - round(points * 0.25) - len(lines) * line
        draw_text(draw, lines, points, line, round(column * pitch), y)
    for column, picture in enumerate(pictures):
        block.paste(picture, (round(column * pitch), top))
    return block
