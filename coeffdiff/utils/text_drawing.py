"""Text in pictures: fonts that have its letters, and lines that fit."""

from __future__ import annotations

import functools
from typing import Any

from PIL import ImageDraw, ImageFont

INK, SOFT, GRID = "#222222", "#706e6a", "#e4e2de"  # colours of text, smaller text and lines, in every drawing
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "segoeui.ttf",
    "msyh.ttc",
    "malgun.ttf",
)


def wrap_text(text: str, points: int, width: int, most: int) -> list[str]:
    """Lines of at most `width` pixels, `most` of them; words too long for a line are broken, the rest is cut."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    font = font_for(text, points)
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


def draw_text(
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
    font = font_for(" ".join(lines), points)
    for number, text in enumerate(lines):
        at = (x, y + number * line)
        draw.text(at, text, ink, font, anchor=anchor, stroke_width=points / 60 if bold else 0)


def font_for(text: str, points: int) -> Any:
    """Pillow's own font, or one of the system's if that has more of the text's characters."""
    letters = set(text) - set(" \n")
    if all(_has_glyph(None, letter) for letter in letters):
        return _font(None, points)
    names = (None, *_SYSTEM_FONTS)
    return _font(max(names, key=lambda name: sum(_has_glyph(name, letter) for letter in letters)), points)


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
