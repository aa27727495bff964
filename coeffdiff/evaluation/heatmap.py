"""All alphas of an adapter in one picture: a small map for each layer, blocks below each other, one colour scale."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from coeffdiff.errors import AdapterError
from coeffdiff.utils.plotting import new_figure
from coeffdiff.utils.text_drawing import INK

MOST_LAYERS = 1000  # SDXL has 140
_SIDE = 120  # pixels of a map at least; each entry is a square of whole pixels
_GAP = 22  # between maps, with the number of the transformer block above each
_DPI = 100
_TEXT = re.compile(
    r"(?P<encoder>text_encoder(?:_2)?)\.text_model\.encoder\.layers\.(?P<number>\d{1,3})\.self_attn"
)
_NAME = re.compile(r"(?P<row>.+)\.transformer_blocks\.(?P<column>\d+)\.attn(?P<half>[12])")


def draw_heat_maps(deviations: Mapping[str, np.ndarray], title: str, taken: str = "map") -> Image.Image:
    """A labelled sheet: self-attention on the left, cross-attention on the right, a row for each group of
    transformer blocks; red: positive differences to the base model, blue: negative ones, white: none.

    Args:
        deviations: layer name -> coeff - I, [H, H]; rows are drawn as rows.
        taken: what heads take of each other, in a word: map or values.
    Raises: AdapterError for more layers than any SDXL has.
    """
    if len(deviations) > MOST_LAYERS:
        raise AdapterError(
            f"An adapter of {len(deviations):,} layers is too large for one picture; {MOST_LAYERS:,} can be drawn."
        )
    layout = _layout(deviations)
    entries = np.concatenate([np.abs(d).ravel() for d in deviations.values()])
    # A few entries far out must not make all others pale; they are as dark as can be
    limit = float(np.quantile(entries, 0.995)) or float(entries.max()) or 1.0
    figure = new_figure(figsize=(layout.width / _DPI, layout.height / _DPI), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, layout.width)
    axes.set_ylim(layout.height, 0)
    axes.axis("off")
    image = _draw_maps(axes, deviations, layout, limit)
    _draw_words(axes, layout, title, taken)
    if deviations:
        width, height = layout.width, layout.height
        left, foot = (width - layout.right + 40) / width, 1 - (layout.top + layout.side) / height
        bar = figure.add_axes((left, foot, 16 / width, layout.side / height))
        figure.colorbar(image, cax=bar, extend="both" if entries.max() > limit else "neither")
        bar.tick_params(labelsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing", UserWarning)  # a token may be in any script
        figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


@dataclass(frozen=True)
class _Layout:
    """Where things are on the sheet, in pixels.

    places: row, half (self 0, cross 1) and column of each layer. rows: their names from top to bottom.
    side: of the largest map. pitch: from one map to the next. starts: left edges of the halves, and widths: their
    columns. left, top, right: margins.
    """

    places: Mapping[str, tuple[str, int, int]]
    rows: Sequence[str]
    side: int
    pitch: int
    widths: Sequence[int]
    starts: Sequence[int]
    left: int
    top: int
    right: int
    width: int
    height: int

    def corner(self, layer: str) -> tuple[int, int]:
        """Left and top of a layer's map."""
        row, half, column = self.places[layer]
        return self.starts[half] + column * self.pitch, self.top + self.rows.index(row) * self.pitch


def _layout(deviations: Mapping[str, np.ndarray]) -> _Layout:
    places = _places(list(deviations))
    side = max(_SIDE, *(_scale(len(d)) * len(d) for d in deviations.values()))
    pitch = side + _GAP
    rows = sorted({row for row, _, _ in places.values()}, key=_reading_order)
    widths = [max([c + 1 for _, h, c in places.values() if h == half], default=0) for half in (0, 1)]
    left, top, between, right, bottom = 200, 120, 40 if all(widths) else 0, 130, 20
    starts = (left, left + widths[0] * pitch + between)
    width = max(720, starts[1] + widths[1] * pitch + right)  # the words above the maps need so much
    height = top + len(rows) * pitch + bottom
    return _Layout(places, rows, side, pitch, widths, starts, left, top, right, width, height)


def _draw_maps(axes: Any, deviations: Mapping[str, np.ndarray], layout: _Layout, limit: float) -> Any:
    """Every map with its frame and column; limit: the deviation of the darkest colour. Returns: the last image."""
    from matplotlib.colors import Normalize

    image = None
    shown: dict[str, Any] = {"cmap": "RdBu_r", "norm": Normalize(-limit, limit), "interpolation": "nearest"}
    for layer, deviation in deviations.items():
        x, y = layout.corner(layer)
        drawn = _scale(len(deviation)) * len(deviation)
        image = axes.imshow(deviation, extent=(x, x + drawn, y + drawn, y), **shown)
        axes.plot([x, x + drawn, x + drawn, x, x], [y, y, y + drawn, y + drawn, y], color="#888888", lw=0.6)
        column = str(layout.places[layer][2])
        axes.text(x, y - 3, column, fontsize=7, va="bottom", parse_math=False, color="#666666")
    return image


def _draw_words(axes: Any, layout: _Layout, title: str, taken: str) -> None:
    """Names of rows and halves, the title, and how to read the maps."""
    text: dict[str, Any] = {"parse_math": False, "color": INK}
    for number, row in enumerate(layout.rows):
        middle = layout.top + number * layout.pitch + layout.side / 2
        axes.text(layout.left - 14, middle, row, fontsize=9, ha="right", va="center", **text)
    for half, name in enumerate(("self-attention", "cross-attention")):
        if layout.widths[half]:
            place = layout.starts[half], layout.top - 24
            axes.text(*place, name, fontsize=11, weight="bold", va="bottom", **text)
    axes.text(20, 20, title, fontsize=13, weight="bold", va="top", **text)
    explained = (
        f"Row: the head that receives. Column: the head whose {taken} it takes. White: as in the base model."
    )
    axes.text(20, 46, explained, fontsize=9, va="top", **text)


def _places(layers: Sequence[str]) -> dict[str, tuple[str, int, int]]:
    """Row, half (self 0, cross 1) and column of each layer; those of text encoders, and names that are not SDXL's, are
    ten in a row."""
    places: dict[str, tuple[str, int, int]] = {}
    strange = 0
    for layer in layers:
        match, of_text = _NAME.fullmatch(layer), _TEXT.fullmatch(layer)
        if of_text:
            number = int(of_text["number"])
            places[layer] = f"{of_text['encoder']} {number // 10 * 10}", 0, number % 10
        elif match and len(match["column"]) < 4 and len(match["row"]) < 60:
            places[layer] = match["row"], int(match["half"]) - 1, int(match["column"])
        else:
            places[layer] = f"other {strange // 10 + 1}", 0, strange % 10
            strange += 1
    return places


def _reading_order(row: str) -> tuple[int, str]:
    """Down, mid, up, as a picture passes through them; a UNet names its middle last. Then the text encoders."""
    order = ("down", "mid", "up", "text_encoder ", "text_encoder_2 ")
    return next((i for i, name in enumerate(order) if row.startswith(name)), len(order)), row


def _scale(heads: int) -> int:
    """Pixels of an entry."""
    return max(1, _SIDE // heads)
