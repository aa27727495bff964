"""Things of a room: candle, clock, lamp, chair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coeffdiff.pocket.world.shapes import sdf
from coeffdiff.pocket.world.shapes.kind import ANY, Bounds, Kind
from coeffdiff.pocket.world.shapes.sdf import Parts


def _candle(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho, ax = sdf.norm2(x, z), x.abs()
    top = 0.08 + q.h
    wax = sdf.disc(rho, y - 0.08 - 0.5 * q.h, q.r, 0.5 * q.h, 0.03)
    wax = sdf.cut(wax, sdf.ball(x, y, z, (0.0, top + q.r * 0.85, 0.0), q.r * 1.05), 0.03)
    drip = sdf.limb(
        ax, y, z, (q.r * 0.82, top - 0.05, q.r * 0.57), (q.r * 0.82, top - q.drip, q.r * 0.57), 0.035, 0.05
    )
    wax = sdf.join(wax, drip, 0.03)
    dish = sdf.nearest(sdf.disc(rho, y - 0.035, q.dish, 0.03, 0.02), sdf.ring(rho, y - 0.075, q.dish, 0.028))
    wick = sdf.limb(x, y, z, (0.0, top - 0.12, 0.0), (0.01, top + 0.07, 0.0), 0.016, 0.016)
    flame = sdf.join(
        sdf.ball(x, y, z, (0.0, top + 0.11, 0.0), 0.062),
        sdf.limb(x, y, z, (0.0, top + 0.12, 0.0), (0.015, top + q.flame, 0.0), 0.055, 0.008),
        0.03,
    )
    return [("body", wax), ("metal", dish), ("dark", wick), ("glow", flame)]


def _clock(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax, cy = x.abs(), q.r + 0.13
    v = y - cy
    rho = sdf.norm2(x, v)
    case = sdf.disc(rho, z, q.r, q.deep, 0.06)
    case = torch.maximum(case, -sdf.disc(rho, z - q.deep, q.r * 0.72, 0.045, 0.01))
    bell = sdf.ball(ax, y, z, (q.r * 0.62, cy + q.r * 0.93, 0.0), q.bell)
    bell = torch.maximum(bell, (0.80 * cy + 0.76 * q.r - y) * 0.8 + (q.r * 0.25 - ax) * 0.6)
    leg = sdf.limb(ax, y, z, (q.r * 0.55, 0.22, 0.0), (q.r * 0.80, 0.045, 0.0), 0.05, 0.045)
    hammer = sdf.nearest(
        sdf.limb(x, y, z, (0.0, cy + q.r, 0.0), (0.0, cy + q.r + 0.12, 0.0), 0.022, 0.022),
        sdf.ball(x, y, z, (0.0, cy + q.r + 0.13, 0.0), 0.05),
    )
    plate = sdf.disc(rho, z - q.deep + 0.05, q.r * 0.73, 0.015, 0.005)
    front = z - q.deep + 0.025
    au, av = torch.maximum(ax, v.abs()), torch.minimum(ax, v.abs())
    tick = sdf.box(au, av, front, (q.r * 0.60, 0.0, 0.0), (q.r * 0.07, 0.018, 0.022), 0.004)
    hands = sdf.nearest(
        _hand(x, v, front, q.hour, q.r * 0.36, 0.030),
        _hand(x, v, front, q.minute, q.r * 0.56, 0.022),
        sdf.disc(rho, front, 0.045, 0.03, 0.01),
    )
    return [
        ("body", sdf.join(case, leg, 0.03)),
        ("accent", sdf.nearest(bell, hammer)),
        ("pale", plate),
        ("dark", sdf.nearest(tick, hands)),
    ]


def _hand(x: Tensor, y: Tensor, z: Tensor, angle: Tensor, length: Any, half: float) -> Tensor:
    """A clock hand from the middle, `angle` radians clockwise from twelve."""
    sin, cos = torch.sin(angle), torch.cos(angle)
    along, across = x * sin + y * cos, x * cos - y * sin
    return sdf.box(across, along, z, (0.0, 0.45 * length, 0.0), (half, 0.55 * length, 0.022), 0.008)


def _lamp(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = sdf.norm2(x, z)
    stem_top = 0.16 + q.stem
    base = sdf.join(
        sdf.disc(rho, y - 0.05, q.base, 0.05, 0.04),
        sdf.ellipsoid(x, y, z, (0.0, 0.16, 0.0), (0.15, 0.15, 0.15)),
        0.08,
    )
    stem = sdf.limb(x, y, z, (0.0, 0.2, 0.0), (0.0, stem_top + 0.2, 0.0), 0.035, 0.035)
    middle = stem_top + 0.5 * q.shade_h
    slant = (q.wide - q.narrow) / q.shade_h
    wall = rho + (y - middle) * slant - 0.5 * (q.wide + q.narrow)
    shade = torch.maximum(wall.abs() - 0.022, (y - middle).abs() - 0.5 * q.shade_h) * 0.85
    bulb = sdf.ball(x, y, z, (0.0, stem_top + 0.12, 0.0), 0.11)
    return [("body", sdf.nearest(base, shade)), ("metal", stem), ("glow", bulb)]


def _chair(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    seat = sdf.box(x, y, z, (0.0, q.seat, 0.0), (q.wide, 0.055, q.wide * 0.95), 0.04)
    leg_x, leg_z = q.wide - 0.06, q.wide * 0.95 - 0.06
    leg = sdf.limb(ax, y, z.abs(), (leg_x, q.seat, leg_z), (leg_x + 0.03, 0.04, leg_z + 0.03), 0.05, 0.04)
    top = q.seat + q.back
    post = sdf.limb(ax, y, z, (leg_x, q.seat, -leg_z), (leg_x, top, -leg_z - 0.07), 0.045, 0.045)
    panel_y = q.seat + 0.16 + 0.5 * (q.back - 0.16)
    panel = sdf.box(
        x,
        y,
        z + (y - q.seat) * 0.08,
        (0.0, panel_y, -leg_z),
        (q.wide - 0.05, 0.5 * (q.back - 0.14), 0.035),
        0.025,
    )
    return [("body", sdf.nearest(sdf.join(seat, leg, 0.03), post, panel))]


HOUSEHOLD: Sequence[Kind] = (
    Kind(
        "candle",
        _candle,
        {
            "r": (0.19, 0.26),
            "h": (0.60, 0.90),
            "drip": (0.18, 0.36),
            "dish": (0.36, 0.46),
            "flame": (0.26, 0.36),
        },
        lambda q: Bounds(
            max(q.dish, q.r) + 0.05,
            0.08 + q.h + q.flame + 0.02,
            max(q.dish, q.r) + 0.05,
            max(q.dish, q.r) + 0.05,
        ),
        ANY,
        mapping="round",
    ),
    Kind(
        "clock",
        _clock,
        {
            "r": (0.42, 0.50),
            "deep": (0.15, 0.21),
            "bell": (0.13, 0.17),
            "hour": (0.0, 6.28),
            "minute": (0.0, 6.28),
        },
        lambda q: Bounds(
            max(q.r + 0.01, q.r * 0.80 + max(q.bell, 0.13)),
            0.13 + q.r * 2 + max(q.bell + 0.02, 0.20),
            max(q.deep, q.bell) + 0.01,
            max(q.deep + 0.03, q.bell + 0.01),
        ),
        ((-50.0, 50.0),),
        accents=((0.80, 0.68, 0.34), (0.74, 0.75, 0.78), (0.60, 0.42, 0.24)),
    ),
    Kind(
        "lamp",
        _lamp,
        {
            "stem": (0.36, 0.52),
            "base": (0.24, 0.32),
            "wide": (0.38, 0.48),
            "narrow": (0.18, 0.27),
            "shade_h": (0.40, 0.52),
        },
        lambda q: Bounds(
            max(q.wide, q.base, q.narrow) + 0.04,
            0.16 + q.stem + q.shade_h + 0.02,
            max(q.wide, q.base, q.narrow) + 0.04,
            max(q.wide, q.base, q.narrow) + 0.04,
        ),
        ANY,
        mapping="round",
    ),
    Kind(
        "chair",
        _chair,
        {"wide": (0.32, 0.40), "seat": (0.44, 0.56), "back": (0.60, 0.78)},
        lambda q: Bounds(q.wide + 0.03, q.seat + q.back + 0.05, q.wide * 0.95 + 0.12, q.wide * 0.95 + 0.02),
        ((-70.0, 70.0),),
    ),
)
