"""Things that hold something: mug, teapot, vase, bowl, pot, can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coeffdiff.pocket.world.shapes import sdf
from coeffdiff.pocket.world.shapes.kind import ANY, Bounds, Kind
from coeffdiff.pocket.world.shapes.sdf import Parts


def _mug(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = sdf.norm2(x, z)
    wall = q.r + q.flare * (y - 0.5 * q.h)
    outer = sdf.disc(rho - (wall - q.r), y - 0.5 * q.h, q.r, 0.5 * q.h, 0.05)
    hollow = torch.maximum(rho - (wall - 0.055), 0.08 - y)
    handle = sdf.norm2(sdf.norm2(x - q.r, (y - 0.5 * q.h) * 0.82) - q.handle, z * 0.85) - 0.052
    handle = torch.maximum(handle, wall - 0.03 - rho)
    body = sdf.join(sdf.cut(outer, hollow, 0.03), handle, 0.03)
    coffee = torch.maximum(rho - (wall - 0.05), (y - 0.76 * q.h).abs() - 0.01)
    return [("body", body), ("accent", coffee)]


def _teapot(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = sdf.norm2(x, z)
    belly = sdf.ellipsoid(x, y, z, (0.0, 0.44, 0.0), (q.wide, q.tall, q.wide))
    tip = (q.wide + q.spout, 0.44 + q.spout * 1.15, 0.0)
    bend = (q.wide + q.spout * 0.42, 0.44, 0.0)
    spout = sdf.join(
        sdf.limb(x, y, z, (q.wide * 0.7, 0.34, 0.0), bend, 0.15, 0.10),
        sdf.limb(x, y, z, bend, tip, 0.10, 0.06),
        0.05,
    )
    loop = sdf.norm2(sdf.norm2(x + q.wide * 0.98, (y - 0.48) * 0.85) - q.handle, z * 0.9) - 0.048
    loop = torch.maximum(loop, -belly - 0.03)
    top = 0.44 + q.tall
    foot = sdf.disc(rho, y - 0.04, q.wide * 0.58, 0.04, 0.02)
    body = sdf.join(sdf.join(sdf.join(belly, spout, 0.06), loop, 0.03), foot, 0.05)
    rim = sdf.ring(rho, y - (top - 0.055), q.wide * 0.44, 0.026)
    knob = sdf.join(
        sdf.ball(x, y, z, (0.0, top + 0.07, 0.0), 0.075), sdf.disc(rho, y - top, 0.05, 0.04, 0.02), 0.04
    )
    return [("body", body), ("accent", sdf.nearest(rim, knob))]


def _vase(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = sdf.norm2(x, z)
    u = y / q.h
    bulge = torch.exp(-(((u - q.belly_at) / 0.25) ** 2))
    flare = torch.exp(-(((u - 1.0) / 0.11) ** 2))
    profile = q.neck + (q.belly - q.neck) * bulge + q.lip * flare
    # 0.68: the profile's steepest slope is near 1.1, so the horizontal gap overstates the distance.
    outer = torch.maximum((rho - profile) * 0.68, (y - 0.5 * q.h).abs() - 0.5 * q.h)
    hollow = torch.maximum((rho - profile + 0.045) * 0.68, 0.7 * q.h - y)
    return [("body", sdf.cut(outer, hollow, 0.03))]


def _bowl(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = sdf.norm2(x, z)
    outer = sdf.ellipsoid(x, y, z, (0.0, q.h, 0.0), (q.r, q.h - 0.03, q.r))
    inner = sdf.ellipsoid(x, y, z, (0.0, q.h, 0.0), (q.r - 0.06, q.h - 0.10, q.r - 0.06))
    shell = sdf.cut(torch.maximum(outer, y - q.h), inner, 0.04)
    foot = sdf.disc(rho, y - 0.05, q.foot, 0.05, 0.02)
    return [("body", sdf.join(shell, foot, 0.04))]


def _pot(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = sdf.norm2(x, z)
    belly = sdf.ellipsoid(x, y, z, (0.0, 0.42, 0.0), (q.r, 0.43, q.r))
    outer = torch.maximum(belly, y - q.h)
    rim = sdf.ring(rho, y - q.h, q.mouth, q.rim)
    neck = sdf.disc(rho, y - q.h + 0.05, q.mouth, 0.06, 0.02)
    hollow = torch.maximum(rho - (q.mouth - 0.045), 0.3 - y)
    body = sdf.cut(sdf.join(sdf.join(outer, neck, 0.06), rim, 0.02), hollow, 0.03)
    ear = sdf.norm2(sdf.norm2(x.abs() - q.r * 0.93, y - 0.53) - q.ear, z) - 0.046
    ear = torch.maximum(ear, -belly - 0.03)
    return [("body", sdf.join(body, ear, 0.03))]


def _can(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = sdf.norm2(x, z)
    # The tin narrows towards the lid and the foot: the profile of a drinks can.
    taper = ((y - (q.h - 0.17)).clamp(min=0.0) + (0.11 - y).clamp(min=0.0)) * 0.42
    body = sdf.disc(rho + taper, y - 0.5 * q.h, q.r, 0.5 * q.h - 0.03, 0.03) * 0.92
    lid = sdf.ring(rho, y - (q.h - 0.02), q.r - 0.075, 0.026)
    foot = sdf.ring(rho, y - 0.03, q.r - 0.05, 0.028)
    cover = sdf.disc(rho, y - (q.h - 0.035), q.r - 0.07, 0.012, 0.005)
    tab = sdf.norm2(sdf.norm2(x, (z - 0.06) * 0.7) - 0.07, (y - (q.h - 0.01)) * 1.2) - 0.02
    return [("body", body), ("metal", sdf.nearest(lid, foot, cover, tab))]


VESSELS: Sequence[Kind] = (
    Kind(
        "mug",
        _mug,
        {"r": (0.34, 0.44), "h": (0.80, 1.02), "handle": (0.20, 0.27), "flare": (-0.06, 0.10)},
        lambda q: Bounds(
            q.r + max(q.handle + 0.07, q.flare * 0.5 * q.h + 0.03),
            q.h + 0.01,
            q.r + abs(q.flare) * 0.5 * q.h + 0.02,
            q.r + abs(q.flare) * 0.5 * q.h + 0.02,
        ),
        ((-45.0, 60.0), (120.0, 225.0)),
        mapping="round",
        accents=((0.30, 0.17, 0.09), (0.42, 0.24, 0.12), (0.55, 0.36, 0.20)),
    ),
    Kind(
        "teapot",
        _teapot,
        {"wide": (0.46, 0.56), "tall": (0.36, 0.44), "spout": (0.24, 0.32), "handle": (0.21, 0.27)},
        lambda q: Bounds(
            max(q.wide + q.spout + 0.07, q.wide * 0.98 + q.handle + 0.06),
            max(0.44 + q.tall + 0.15, 0.44 + q.spout * 1.15 + 0.07),
            q.wide + 0.02,
            q.wide + 0.02,
        ),
        ((-55.0, 55.0), (125.0, 235.0)),
        mapping="round",
    ),
    Kind(
        "vase",
        _vase,
        {
            "h": (1.15, 1.40),
            "belly": (0.30, 0.40),
            "neck": (0.11, 0.17),
            "belly_at": (0.32, 0.50),
            "lip": (0.05, 0.13),
        },
        lambda q: Bounds(
            max(q.belly, q.neck + q.lip) + 0.05,
            q.h + 0.01,
            q.belly + 0.05,
            max(q.belly, q.neck + q.lip) + 0.05,
        ),
        ANY,
        mapping="round",
    ),
    Kind(
        "bowl",
        _bowl,
        {"r": (0.58, 0.68), "h": (0.40, 0.54), "foot": (0.22, 0.32)},
        lambda q: Bounds(q.r + 0.01, q.h + 0.01, q.r + 0.01, q.r + 0.01),
        ANY,
        mapping="round",
    ),
    Kind(
        "pot",
        _pot,
        {
            "r": (0.46, 0.54),
            "h": (0.70, 0.80),
            "mouth": (0.32, 0.40),
            "rim": (0.04, 0.06),
            "ear": (0.11, 0.16),
        },
        lambda q: Bounds(q.r * 0.93 + q.ear + 0.06, q.h + 0.07, q.r + 0.02, q.r + 0.02),
        ((-50.0, 50.0), (130.0, 230.0)),
        mapping="round",
    ),
    Kind(
        "can",
        _can,
        {"r": (0.32, 0.40), "h": (0.92, 1.16)},
        lambda q: Bounds(q.r + 0.01, q.h + 0.02, q.r + 0.01, q.r + 0.01),
        ANY,
        mapping="round",
    ),
)
