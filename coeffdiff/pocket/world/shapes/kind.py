"""A kind of things: its distance field, its proportions, and the views in which it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coeffdiff.pocket.world.shapes.sdf import Field


@dataclass(frozen=True)
class Bounds:
    """A box around an object in object space: |x| <= x, 0 <= y <= top, -back <= z <= front."""

    x: float
    top: float
    back: float
    front: float


@dataclass(frozen=True)
class Kind:
    """One class of things.

    ranges: proportion -> (low, high), between which individuals of the sampled world vary.
    bounds: proportions -> Bounds that hold the whole object, also for proportions out of range.
    views: intervals in degrees from which it is photographed; 0 looks at the front, 90 at its +x side.
    mapping: "round" wraps patterns about the y axis, "solid" lays them on by the nearest axis.
    fuzzy: plush, which scatters light at its rim.
    accents: sRGB colours of the accent role, one of which an individual has; empty: any strong colour.
    """

    name: str
    field: Field
    ranges: Mapping[str, tuple[float, float]]
    bounds: Callable[[Any], Bounds]
    views: tuple[tuple[float, float], ...]
    mapping: str = "solid"
    fuzzy: bool = False
    accents: tuple[tuple[float, float, float], ...] = ()


FRONT = ((-60.0, 60.0),)
SIDES = ((20.0, 115.0), (-115.0, -20.0))
ANY = ((-180.0, 180.0),)
