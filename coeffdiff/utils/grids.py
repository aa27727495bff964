"""Labelled grids of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from coeffdiff.utils.text_drawing import draw_text, wrap_text

_GAP = 8  # pixels between everything
_PAPER, _EMPTY = (255, 255, 255), (236, 236, 236)


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
    heads = [wrap_text(text, points, cell, 3) for text in columns]
    head = max((len(lines) for lines in heads), default=0) * line
    titles = wrap_text(title, round(points * 1.3), max(right - _GAP, cell), 3) if title else []
    labels = [
        wrap_text(label, points, margin - 2, max(4, cell // line)) if margin else [] for label, _ in rows
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
    draw_text(draw, titles, round(points * 1.3), round(line * 1.3), _GAP, _GAP)
    for column, lines in enumerate(heads):
        x = _GAP + left + column * (cell + _GAP) + cell // 2
        draw_text(draw, lines, points, line, x, top + head - len(lines) * line, anchor="ma")
    y = first
    for label, pictures, height in zip(labels, scaled, heights, strict=True):
        draw_text(draw, label, points, line, _GAP, y + (height - len(label) * line) // 2)
        for column in range(count):
            x = _GAP + left + column * (cell + _GAP)
            picture = pictures[column] if column < len(pictures) else None
            if picture:
                grid.paste(picture, (x + (cell - picture.width) // 2, y + (height - picture.height) // 2))
            else:
                draw.rectangle((x, y, x + cell - 1, y + height - 1), fill=_EMPTY)
        y += height + _GAP
    return grid


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
