"""Things of the open: boot, car, backpack, mushroom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coeffdiff.pocket.world.shapes import sdf
from coeffdiff.pocket.world.shapes.kind import ANY, Bounds, Kind
from coeffdiff.pocket.world.shapes.sdf import Parts


def _boot(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    back = -0.14
    top = 0.30 + q.shaft
    shaft = sdf.limb(x, y, z, (0.0, 0.22, back), (0.0, top, back - 0.03), q.r * 0.92, q.r)
    shaft = torch.maximum(shaft, y - top)
    toe = sdf.limb(x, y, z, (0.0, 0.20, back), (0.0, 0.185, q.foot), 0.165, 0.135)
    upper = sdf.join(shaft, toe, 0.16)
    hollow = torch.maximum(sdf.norm2(x, z - back + 0.03) - (q.r - 0.055), top - 0.30 - y)
    upper = sdf.cut(torch.maximum(upper, 0.06 - y), hollow, 0.03)
    middle, half = 0.5 * (q.foot + back), 0.5 * (q.foot - back)
    sole = sdf.box(x, y, z, (0.0, 0.055, middle), (0.165, 0.05, half + 0.15), 0.045)
    heel = sdf.box(x, y, z, (0.0, 0.05, back - 0.03), (0.16, 0.10, 0.12), 0.03)
    cuff = sdf.norm2(sdf.norm2(x, z - back + 0.03) - q.r, (y - top + 0.03) * 0.7) - q.cuff
    rise = sdf.repeat(y, 0.42, 0.13, 3)
    lace = sdf.limb(
        x.abs(), rise, z, (0.0, 0.0, back + q.r * 1.02), (0.11, 0.03, back + q.r * 0.88), 0.026, 0.026
    )
    return [("body", upper), ("dark", sdf.nearest(sole, heel)), ("pale", sdf.nearest(cuff, lace))]


def _car(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax, az = x.abs(), z.abs()
    lower = sdf.box(x, y, z, (0.0, 0.33, 0.0), (0.38, 0.16, q.long), 0.10)
    # The cabin leans in towards the roof, as windscreens do.
    lean = (y - 0.45).clamp(min=0.0)
    side, end = ax + lean * 0.18, az + lean * 0.55
    cabin = sdf.box(side, y, end, (0.0, 0.47, 0.0), (0.34, q.cabin, 0.48), 0.06)
    body = sdf.join(lower, cabin * 0.85, 0.03)
    arch = torch.maximum(sdf.norm2(y - q.wheel, az - q.long * 0.60) - (q.wheel + 0.035), 0.26 - ax)
    body = sdf.cut(body, arch, 0.02)
    wheel = sdf.disc(sdf.norm2(y - q.wheel, az - q.long * 0.60), ax - 0.33, q.wheel, 0.075, 0.03)
    hub = sdf.disc(sdf.norm2(y - q.wheel, az - q.long * 0.60), ax - 0.345, q.wheel * 0.55, 0.07, 0.02)
    pane_y, pane_h = 0.485 + 0.5 * q.cabin, 0.5 * q.cabin - 0.065
    doors = sdf.box(side, y, az + lean * 0.5, (0.29, pane_y, 0.215), (0.062, pane_h, 0.185), 0.02)
    screens = sdf.box(x, y, end, (0.0, pane_y, 0.43), (0.25, pane_h, 0.062), 0.02)
    glass = sdf.nearest(doors, screens) * 0.85
    lamp = sdf.ball(ax, y, az, (0.25, 0.37, q.long - 0.03), 0.075)
    bumper = sdf.box(x, y, az, (0.0, 0.22, q.long), (0.34, 0.045, 0.045), 0.03)
    return [
        ("body", body),
        ("dark", sdf.nearest(wheel, glass)),
        ("metal", sdf.nearest(hub, bumper)),
        ("pale", lamp),
    ]


def _backpack(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    half = 0.5 * q.h
    main = sdf.box(x, y, z, (0.0, half, 0.0), (q.wide, half, q.deep), 0.15)
    pocket = sdf.box(x, y, z, (0.0, q.pocket + 0.07, q.deep), (q.wide * 0.74, q.pocket, 0.10), 0.07)
    side = sdf.ellipsoid(ax, y, z, (q.wide, 0.24, 0.0), (0.09, 0.19, 0.13))
    grip = sdf.norm2(sdf.norm2(x, (y - q.h + 0.02) * 0.9) - 0.11, z + 0.04) - 0.034
    strap = (
        sdf.norm2(sdf.norm2(y - q.h * 0.52, (z + q.deep * 0.8) * 1.5) - q.h * 0.36, ax - q.wide * 0.55) - 0.05
    )
    strap = torch.maximum(strap, z + q.deep * 0.7)
    zip_line = sdf.norm2(main.abs(), z - q.deep * 0.42) - 0.022
    zip_line = torch.maximum(zip_line, 0.25 - y)
    seam = sdf.box(x, y, z, (0.0, q.pocket * 1.62 + 0.07, q.deep + 0.09), (q.wide * 0.62, 0.020, 0.03), 0.015)
    buckle = sdf.box(x, y, z, (0.0, q.h * 0.70, q.deep + 0.005), (0.065, 0.05, 0.03), 0.02)
    return [
        ("body", sdf.join(sdf.join(main, pocket, 0.02), side, 0.03)),
        ("accent", sdf.nearest(grip, strap, zip_line, seam)),
        ("metal", buckle),
    ]


def _mushroom(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = sdf.norm2(x, z)
    stem = sdf.limb(x, y, z, (0.0, 0.10, 0.0), (0.0, q.stem + 0.06, 0.0), q.foot, q.foot * 0.72)
    stem = torch.maximum(stem, -y)
    cap = sdf.ellipsoid(x, y, z, (0.0, q.stem, 0.0), (q.wide, q.dome, q.wide))
    cap = sdf.cut(cap, y - q.stem + 0.03, 0.06)
    gills = sdf.disc(rho, y - q.stem + 0.02, q.wide * 0.88, 0.03, 0.02)
    frill = sdf.ring(rho, y - q.stem * 0.66, q.foot * 0.92, 0.045)
    return [("body", cap), ("pale", sdf.nearest(sdf.join(stem, frill, 0.03), gills))]


OUTDOORS: Sequence[Kind] = (
    Kind(
        "boot",
        _boot,
        {"shaft": (0.50, 0.76), "r": (0.19, 0.25), "foot": (0.34, 0.46), "cuff": (0.035, 0.055)},
        lambda q: Bounds(q.r + q.cuff + 0.01, 0.30 + q.shaft + q.cuff, 0.17 + q.r + q.cuff, q.foot + 0.17),
        ((35.0, 125.0), (-125.0, -35.0)),
    ),
    Kind(
        "car",
        _car,
        {"long": (0.70, 0.84), "cabin": (0.27, 0.33), "wheel": (0.16, 0.20)},
        lambda q: Bounds(0.42, 0.49 + q.cabin, q.long + 0.06, q.long + 0.06),
        ((25.0, 80.0), (-80.0, -25.0), (100.0, 155.0), (-155.0, -100.0)),
    ),
    Kind(
        "backpack",
        _backpack,
        {"h": (0.98, 1.14), "wide": (0.36, 0.44), "deep": (0.19, 0.25), "pocket": (0.18, 0.24)},
        lambda q: Bounds(q.wide + 0.10, q.h + 0.15, q.deep * 0.8 + q.h * 0.24 + 0.06, q.deep + 0.12),
        ((-75.0, 75.0),),
    ),
    Kind(
        "mushroom",
        _mushroom,
        {"stem": (0.50, 0.68), "foot": (0.15, 0.21), "wide": (0.46, 0.58), "dome": (0.34, 0.46)},
        lambda q: Bounds(q.wide + 0.02, q.stem + q.dome + 0.01, q.wide + 0.02, q.wide + 0.02),
        ANY,
        mapping="round",
    ),
)
