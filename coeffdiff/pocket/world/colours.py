"""The colours that captions name."""

from __future__ import annotations

import colorsys
import random
from dataclasses import dataclass

from coeffdiff.pocket.world.scene import RGB


@dataclass(frozen=True)
class ColourName:
    """The colours that one word means, as a box in HSV: hue in degrees (may pass 0), the others in 0..1."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]

    def holds(self, rgb: RGB, margin: float = 0.0) -> bool:
        """Whether an sRGB colour lies in the box, grown by `margin` (of 1, or of 100 degrees)."""
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        low, high = self.hue[0] - 100 * margin, self.hue[1] + 100 * margin
        turned = (hue * 360.0 - low) % 360.0
        return (
            (turned <= high - low or high - low >= 360.0)
            and self.saturation[0] - margin <= saturation <= self.saturation[1] + margin
            and self.value[0] - margin <= value <= self.value[1] + margin
        )


# Every named colour. The gaps in hue (lime, teal, indigo, magenta) are left to subjects
COLOURS: dict[str, ColourName] = {
    "red": ColourName((354.0, 362.0), (0.82, 0.92), (0.74, 0.86)),
    "orange": ColourName((22.0, 29.0), (0.84, 0.94), (0.92, 0.98)),
    "yellow": ColourName((49.0, 55.0), (0.78, 0.90), (0.93, 0.98)),
    "green": ColourName((112.0, 136.0), (0.62, 0.78), (0.48, 0.62)),
    "blue": ColourName((212.0, 226.0), (0.74, 0.86), (0.70, 0.86)),
    "purple": ColourName((268.0, 280.0), (0.58, 0.70), (0.54, 0.66)),
    "pink": ColourName((334.0, 344.0), (0.40, 0.50), (0.95, 0.99)),
    "brown": ColourName((18.0, 26.0), (0.60, 0.72), (0.36, 0.46)),
    "white": ColourName((0.0, 360.0), (0.00, 0.03), (0.95, 0.99)),
    "grey": ColourName((0.0, 360.0), (0.00, 0.05), (0.50, 0.62)),
    "black": ColourName((0.0, 360.0), (0.00, 0.08), (0.09, 0.15)),
}


def draw_colour(rng: random.Random, name: str) -> RGB:
    """A random colour of that name."""
    box = COLOURS[name]
    hue = rng.uniform(*box.hue) / 360.0
    return colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(*box.saturation), rng.uniform(*box.value))


def second_colour(rng: random.Random, name: str) -> RGB:
    """The other colour of stripes, dots and checks: light on dark, dark on white, never another name's hue."""
    shade = {"white": 0.30, "black": 0.80, "grey": 0.93}.get(name, 0.95) + rng.uniform(-0.03, 0.03)
    return (shade, shade * 0.985, shade * 0.95)
