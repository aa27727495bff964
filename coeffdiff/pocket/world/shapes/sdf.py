"""Signed distance fields: the primitives that things of the pocket world are made of.

A kind is a function from points and proportions to parts; a part is a role (which colour it takes) and
a distance. Object space: y up, the ground at y = 0, the front towards +z, lengths near one. Distances
are lower bounds up to a few percent, which is what sphere tracing needs.

Shape letter: P points, of any shape; every coordinate, proportion and distance is one tensor of it.
Coordinates are kept apart (x, y, z instead of [P, 3]) because the fields are a few hundred elementwise
operations, and contiguous ones run several times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROLES = ("body", "accent", "pale", "dark", "metal", "glow")
"""What a part can be: the role decides its colour; only "body" carries the named colour and the pattern."""


Parts = list[tuple[str, Tensor]]
Field = Callable[[Tensor, Tensor, Tensor, Any], Parts]
Point = tuple[Any, Any, Any]  # floats or tensors


def norm2(x: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(x * x, y, y).sqrt_()


def norm3(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.addcmul(torch.addcmul(x * x, y, y), z, z).sqrt_()


def ball(x: Tensor, y: Tensor, z: Tensor, centre: Point, radius: Any) -> Tensor:
    return norm3(x - centre[0], y - centre[1], z - centre[2]) - radius


def ellipsoid(x: Tensor, y: Tensor, z: Tensor, centre: Point, radii: Point) -> Tensor:
    """First-order distance to an ellipsoid: exact on the surface, a good step elsewhere."""
    u, v, w = (x - centre[0]) / radii[0], (y - centre[1]) / radii[1], (z - centre[2]) / radii[2]
    k0 = norm3(u, v, w)
    k1 = norm3(u / radii[0], v / radii[1], w / radii[2])
    return k0 * (k0 - 1.0) / (k1 + 1e-6)


def box(x: Tensor, y: Tensor, z: Tensor, centre: Point, half: Point, edge: float) -> Tensor:
    """A box of half sizes `half` whose edges are rounded with radius `edge`."""
    u = (x - centre[0]).abs() - (half[0] - edge)
    v = (y - centre[1]).abs() - (half[1] - edge)
    w = (z - centre[2]).abs() - (half[2] - edge)
    inside = torch.maximum(torch.maximum(u, v), w).clamp(max=0.0)
    return norm3(u.clamp(min=0.0), v.clamp(min=0.0), w.clamp(min=0.0)) + inside - edge


def limb(x: Tensor, y: Tensor, z: Tensor, a: Point, b: Point, ra: Any, rb: Any) -> Tensor:
    """A capsule from a to b whose radius runs from ra to rb."""
    px, py, pz = x - a[0], y - a[1], z - a[2]
    bx, by, bz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    h = ((px * bx + py * by + pz * bz) / (bx * bx + by * by + bz * bz)).clamp(0.0, 1.0)
    return norm3(px - bx * h, py - by * h, pz - bz * h) - ra - (rb - ra) * h


def disc(across: Tensor, along: Tensor, radius: Any, half: Any, edge: float) -> Tensor:
    """A solid of revolution with a rectangular profile: `across` from the axis, `along` it from the middle."""
    u, v = across - (radius - edge), along.abs() - (half - edge)
    inside = torch.maximum(u, v).clamp(max=0.0)
    return norm2(u.clamp(min=0.0), v.clamp(min=0.0)) + inside - edge


def ring(across: Tensor, along: Tensor, radius: Any, thick: Any) -> Tensor:
    """A torus: `across` from the axis, `along` it from the ring's plane."""
    return norm2(across - radius, along) - thick


def join(a: Tensor, b: Tensor, width: float) -> Tensor:
    """Union with a fillet of about `width`."""
    h = (width - (a - b).abs()).clamp(min=0.0)
    return torch.minimum(a, b) - h * h * (0.25 / width)


def cut(a: Tensor, b: Tensor, width: float = 0.02) -> Tensor:
    """a without b, its rim rounded by about `width`."""
    return -join(-a, b, width)


def nearest(*distances: Tensor) -> Tensor:
    result = distances[0]
    for distance in distances[1:]:
        result = torch.minimum(result, distance)
    return result


def repeat(y: Tensor, first: Any, gap: float, count: int) -> Tensor:
    """y relative to the nearest of `count` copies at first, first + gap, ..."""
    return y - first - ((y - first) / gap).round().clamp(0, count - 1) * gap
