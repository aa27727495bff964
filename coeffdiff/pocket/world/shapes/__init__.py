"""The things of the pocket world: what exists in space, not how it is painted or lit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from coeffdiff.pocket.world.shapes import sdf
from coeffdiff.pocket.world.shapes.extras import EXTRA_PROPORTIONS, EXTRA_REACH, EXTRAS
from coeffdiff.pocket.world.shapes.figures import FIGURES
from coeffdiff.pocket.world.shapes.household import HOUSEHOLD
from coeffdiff.pocket.world.shapes.kind import Bounds, Kind
from coeffdiff.pocket.world.shapes.outdoors import OUTDOORS
from coeffdiff.pocket.world.shapes.sdf import ROLES, Parts
from coeffdiff.pocket.world.shapes.vessels import VESSELS

__all__ = [
    "EXTRAS", "EXTRA_PROPORTIONS", "KINDS", "ROLES", "Bounds", "Kind", "distance", "object_bounds", "parts_of",
]  # fmt: skip

# The order in which random scenes draw them: another one would change every scene.
_ORDER = (
    "stuffed animal",
    "mug",
    "teapot",
    "vase",
    "bowl",
    "pot",
    "candle",
    "clock",
    "can",
    "boot",
    "robot",
    "duck",
    "car",
    "dog",
    "lamp",
    "backpack",
    "chair",
    "mushroom",
)

_KINDS = {kind.name: kind for kind in (*VESSELS, *FIGURES, *HOUSEHOLD, *OUTDOORS)}
KINDS: dict[str, Kind] = {name: _KINDS[name] for name in _ORDER}
"""Every class of things by its word in captions."""


def object_bounds(kind: str, shape: Mapping[str, float], extras: Sequence[str] = ()) -> Bounds:
    """The box that holds one individual, its extras included, in object space."""
    box = KINDS[kind].bounds(SimpleNamespace(**shape))
    if not extras:
        return box
    x, y, z = (abs(shape.get(name, 0.0)) for name in EXTRA_PROPORTIONS)
    reach = [EXTRA_REACH[extra] for extra in extras]
    return Bounds(
        max(box.x, *(x + right for right, _, _ in reach)),
        max(box.top, *(y + up for _, up, _ in reach)),
        max(box.back, *(z + deep for _, _, deep in reach)),
        max(box.front, *(z + deep for _, _, deep in reach)),
    )


def parts_of(kind: str, extras: Sequence[str], x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Roles and distances at the points x, y, z [P] of individuals with the proportions q (attributes [P])."""
    parts = KINDS[kind].field(x, y, z, q)
    for extra in extras:
        parts = parts + EXTRAS[extra](x, y, z, q)
    return parts


def distance(kind: str, extras: Sequence[str], x: Tensor, y: Tensor, z: Tensor, q: Any) -> Tensor:
    """Signed distance [P] to the nearest part; see parts_of."""
    return sdf.nearest(*(part for _, part in parts_of(kind, extras, x, y, z, q)))
