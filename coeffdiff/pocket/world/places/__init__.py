"""The places of the pocket world: for every pixel, the light that arrives when no object is in its way.

A place paints ground and backdrop, says from where it is photographed and how it is lit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from coeffdiff.pocket.world.places.gardens import autumn, sunflowers
from coeffdiff.pocket.world.places.rooms import kitchen, pink_fabric, white_rug, wooden_floor
from coeffdiff.pocket.world.places.streets import city, cobblestones, night
from coeffdiff.pocket.world.places.view import DETAILS, View
from coeffdiff.pocket.world.places.waves import water
from coeffdiff.pocket.world.places.wild import beach, jungle, mountain, snow, snow_flakes

__all__ = ["DETAILS", "PLACES", "SETTINGS", "Place", "View"]

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Place:
    """One setting.

    phrase: its words in captions.  paint: View -> radiance [3, n, h, w].
    elevation: degrees from which the camera looks down; low where the backdrop matters.
    key, sky: linear colour and strength of the key light and of the light from above; bounce: from below.
    afloat: share of the object's height under water.
    foreground: what is in front of the object: View -> colour [3, ...] and cover [n, h, w].
    """

    phrase: str
    paint: Callable[[View], Tensor]
    elevation: tuple[float, float]
    key: Colour = (0.86, 0.82, 0.74)
    sky: Colour = (0.34, 0.37, 0.42)
    bounce: Colour = (0.12, 0.12, 0.11)
    afloat: tuple[float, float] = (0.0, 0.0)
    foreground: Callable[[View], tuple[Tensor, Tensor]] | None = None


_PLACES = (
    Place(
        "in the snow", snow, (6.0, 17.0), (0.68, 0.70, 0.74), (0.44, 0.48, 0.54), (0.26, 0.28, 0.31),
        foreground=snow_flakes,
    ),
    Place("on the beach", beach, (7.0, 18.0), (1.00, 0.93, 0.80), (0.32, 0.38, 0.45), (0.24, 0.20, 0.14)),
    Place("in the jungle", jungle, (6.0, 18.0), (0.84, 0.86, 0.66), (0.26, 0.33, 0.24), (0.06, 0.09, 0.04)),
    Place("on a cobblestone street", cobblestones, (14.0, 28.0), (0.84, 0.80, 0.72), (0.36, 0.38, 0.42)),
    Place(
        "on top of pink fabric", pink_fabric, (14.0, 32.0), (0.72, 0.70, 0.68), (0.42, 0.40, 0.41), (0.24, 0.13, 0.16)
    ),
    Place(
        "on top of a wooden floor", wooden_floor, (14.0, 30.0), (0.84, 0.76, 0.64), (0.36, 0.35, 0.33),
        (0.15, 0.10, 0.06),
    ),
    Place("with a mountain in the background", mountain, (3.0, 8.0), (0.94, 0.88, 0.78), (0.33, 0.38, 0.45)),
    Place("with a city in the background", city, (3.0, 8.0), (0.92, 0.82, 0.68), (0.36, 0.38, 0.42)),
    Place(
        "floating on top of water", water, (10.0, 22.0), (0.94, 0.90, 0.82), (0.32, 0.39, 0.46), (0.06, 0.12, 0.15),
        afloat=(0.12, 0.26),
    ),
    Place(
        "on top of green grass with sunflowers around it", sunflowers, (7.0, 17.0), (0.98, 0.92, 0.78),
        (0.31, 0.36, 0.40), (0.09, 0.14, 0.05),
    ),
    Place(
        "on top of a white rug", white_rug, (15.0, 30.0), (0.72, 0.69, 0.64), (0.40, 0.40, 0.40),
        (0.22, 0.21, 0.20),
    ),
    Place("at night", night, (4.0, 11.0), (0.95, 0.80, 0.56), (0.13, 0.15, 0.26), (0.08, 0.08, 0.08)),
    Place(
        "with a tree and autumn leaves in the background", autumn, (4.0, 12.0), (0.94, 0.86, 0.70), (0.34, 0.35, 0.36),
        (0.17, 0.12, 0.05),
    ),
    Place("in the kitchen", kitchen, (12.0, 26.0), (0.78, 0.77, 0.74), (0.40, 0.41, 0.43), (0.10, 0.10, 0.11)),
)  # fmt: skip


PLACES: dict[str, Place] = {place.phrase: place for place in _PLACES}
"""Every setting by its words in captions."""

SETTINGS = tuple(PLACES)
"""The phrases of all settings."""
