"""The things of the pocket world as signed distance fields: what exists in space, not how it is painted or lit.

A kind is a function from points and proportions to parts; a part is a role (which colour it takes) and
a distance. Object space: y up, the ground at y = 0, the front towards +z, lengths near one. Distances
are lower bounds up to a few percent, which is what sphere tracing needs.

Shape letter: P points, of any shape; every coordinate, proportion and distance is one tensor of it.
Coordinates are kept apart (x, y, z instead of [P, 3]) because the fields are a few hundred elementwise
operations, and contiguous ones run several times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROLES = ("body", "accent", "pale", "dark", "metal", "glow")
"""What a part can be: the role decides its colour; only "body" carries the named colour and the pattern."""

Parts = list[tuple[str, Tensor]]
Field = Callable[[Tensor, Tensor, Tensor, Any], Parts]
Point = tuple[Any, Any, Any]  # floats or tensors


# --- primitives -------------------------------------------------------------------------------------


def _norm2(x: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(x * x, y, y).sqrt_()


def _norm3(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.addcmul(torch.addcmul(x * x, y, y), z, z).sqrt_()


def _ball(x: Tensor, y: Tensor, z: Tensor, centre: Point, radius: Any) -> Tensor:
    return _norm3(x - centre[0], y - centre[1], z - centre[2]) - radius


def _ellipsoid(x: Tensor, y: Tensor, z: Tensor, centre: Point, radii: Point) -> Tensor:
    """First-order distance to an ellipsoid: exact on the surface, a good step elsewhere."""
    u, v, w = (x - centre[0]) / radii[0], (y - centre[1]) / radii[1], (z - centre[2]) / radii[2]
    k0 = _norm3(u, v, w)
    k1 = _norm3(u / radii[0], v / radii[1], w / radii[2])
    return k0 * (k0 - 1.0) / (k1 + 1e-6)


def _box(x: Tensor, y: Tensor, z: Tensor, centre: Point, half: Point, edge: float) -> Tensor:
    """A box of half sizes `half` whose edges are rounded with radius `edge`."""
    u = (x - centre[0]).abs() - (half[0] - edge)
    v = (y - centre[1]).abs() - (half[1] - edge)
    w = (z - centre[2]).abs() - (half[2] - edge)
    inside = torch.maximum(torch.maximum(u, v), w).clamp(max=0.0)
    return _norm3(u.clamp(min=0.0), v.clamp(min=0.0), w.clamp(min=0.0)) + inside - edge


def _limb(x: Tensor, y: Tensor, z: Tensor, a: Point, b: Point, ra: Any, rb: Any) -> Tensor:
    """A capsule from a to b whose radius runs from ra to rb."""
    px, py, pz = x - a[0], y - a[1], z - a[2]
    bx, by, bz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    h = ((px * bx + py * by + pz * bz) / (bx * bx + by * by + bz * bz)).clamp(0.0, 1.0)
    return _norm3(px - bx * h, py - by * h, pz - bz * h) - ra - (rb - ra) * h


def _disc(across: Tensor, along: Tensor, radius: Any, half: Any, edge: float) -> Tensor:
    """A solid of revolution with a rectangular profile: `across` from the axis, `along` it from the middle."""
    u, v = across - (radius - edge), along.abs() - (half - edge)
    inside = torch.maximum(u, v).clamp(max=0.0)
    return _norm2(u.clamp(min=0.0), v.clamp(min=0.0)) + inside - edge


def _ring(across: Tensor, along: Tensor, radius: Any, thick: Any) -> Tensor:
    """A torus: `across` from the axis, `along` it from the ring's plane."""
    return _norm2(across - radius, along) - thick


def _join(a: Tensor, b: Tensor, width: float) -> Tensor:
    """Union with a fillet of about `width`."""
    h = (width - (a - b).abs()).clamp(min=0.0)
    return torch.minimum(a, b) - h * h * (0.25 / width)


def _cut(a: Tensor, b: Tensor, width: float = 0.02) -> Tensor:
    """a without b, its rim rounded by about `width`."""
    return -_join(-a, b, width)


def _all(*distances: Tensor) -> Tensor:
    result = distances[0]
    for distance in distances[1:]:
        result = torch.minimum(result, distance)
    return result


def _repeat(y: Tensor, first: Any, gap: float, count: int) -> Tensor:
    """y relative to the nearest of `count` copies at first, first + gap, ..."""
    return y - first - ((y - first) / gap).round().clamp(0, count - 1) * gap


# --- kinds ------------------------------------------------------------------------------------------


def _stuffed_animal(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    head_y = 0.72 + q.head * 0.78
    body = _ellipsoid(x, y, z, (0.0, 0.41, 0.0), (q.belly, 0.42, q.belly * 0.92))
    head = _ellipsoid(x, y, z, (0.0, head_y, 0.05), (q.head * 1.08, q.head * 0.94, q.head * 0.96))
    shoulder_x, reach_x, reach_z = q.belly * 0.78, q.arm * q.arm_out, q.arm * q.arm_forward
    drop = q.arm * 0.72
    arm = _limb(
        ax, y, z,
        (shoulder_x, 0.67, 0.03), (shoulder_x + reach_x, 0.67 - drop, 0.06 + reach_z),
        q.arm_thick * 0.92, q.arm_thick * 1.08,
    )  # fmt: skip
    foot_z = 0.10 + q.leg
    leg = _limb(ax, y, z, (0.17, 0.15, 0.08), (0.28, 0.14, foot_z), 0.14, 0.14)
    ear = _ball(ax, y, z, (q.head * 0.78, head_y + q.head * 0.72, 0.02), q.ear)
    snout_z = 0.05 + q.head * 0.86
    snout = _ellipsoid(
        x, y, z, (0.0, head_y - q.head * 0.24, snout_z), (q.snout, q.snout * 0.78, q.snout * 0.8)
    )
    patch = _ellipsoid(x, y, z, (0.0, 0.40, q.belly * 0.30), (q.belly * 0.66, 0.29, q.belly * 0.68))
    pad = _ball(ax, y, z, (0.285, 0.14, foot_z + 0.075), 0.088)
    inner = _ball(ax, y, z, (q.head * 0.78, head_y + q.head * 0.70, 0.02 + q.ear * 0.62), q.ear * 0.62)
    eye = _ball(ax, y, z, (q.head * 0.36, head_y + q.head * 0.10, 0.05 + q.head * 0.86), 0.042)
    nose = _ellipsoid(x, y, z, (0.0, head_y - q.head * 0.10, snout_z + q.snout * 0.66), (0.055, 0.04, 0.04))
    fur = _join(_join(_join(_join(body, head, 0.05), arm, 0.05), leg, 0.05), ear, 0.04)
    return [("body", fur), ("pale", _all(snout, patch, pad, inner)), ("dark", _all(eye, nose))]


def _mug(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = _norm2(x, z)
    wall = q.r + q.flare * (y - 0.5 * q.h)
    outer = _disc(rho - (wall - q.r), y - 0.5 * q.h, q.r, 0.5 * q.h, 0.05)
    hollow = torch.maximum(rho - (wall - 0.055), 0.08 - y)
    handle = _norm2(_norm2(x - q.r, (y - 0.5 * q.h) * 0.82) - q.handle, z * 0.85) - 0.052
    handle = torch.maximum(handle, wall - 0.03 - rho)
    body = _join(_cut(outer, hollow, 0.03), handle, 0.03)
    coffee = torch.maximum(rho - (wall - 0.05), (y - 0.76 * q.h).abs() - 0.01)
    return [("body", body), ("accent", coffee)]


def _teapot(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = _norm2(x, z)
    belly = _ellipsoid(x, y, z, (0.0, 0.44, 0.0), (q.wide, q.tall, q.wide))
    tip = (q.wide + q.spout, 0.44 + q.spout * 1.15, 0.0)
    bend = (q.wide + q.spout * 0.42, 0.44, 0.0)
    spout = _join(
        _limb(x, y, z, (q.wide * 0.7, 0.34, 0.0), bend, 0.15, 0.10),
        _limb(x, y, z, bend, tip, 0.10, 0.06),
        0.05,
    )
    loop = _norm2(_norm2(x + q.wide * 0.98, (y - 0.48) * 0.85) - q.handle, z * 0.9) - 0.048
    loop = torch.maximum(loop, -belly - 0.03)
    top = 0.44 + q.tall
    foot = _disc(rho, y - 0.04, q.wide * 0.58, 0.04, 0.02)
    body = _join(_join(_join(belly, spout, 0.06), loop, 0.03), foot, 0.05)
    rim = _ring(rho, y - (top - 0.055), q.wide * 0.44, 0.026)
    knob = _join(_ball(x, y, z, (0.0, top + 0.07, 0.0), 0.075), _disc(rho, y - top, 0.05, 0.04, 0.02), 0.04)
    return [("body", body), ("accent", _all(rim, knob))]


def _vase(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = _norm2(x, z)
    u = y / q.h
    bulge = torch.exp(-(((u - q.belly_at) / 0.25) ** 2))
    flare = torch.exp(-(((u - 1.0) / 0.11) ** 2))
    profile = q.neck + (q.belly - q.neck) * bulge + q.lip * flare
    # 0.68: the profile's steepest slope is near 1.1, so the horizontal gap overstates the distance.
    outer = torch.maximum((rho - profile) * 0.68, (y - 0.5 * q.h).abs() - 0.5 * q.h)
    hollow = torch.maximum((rho - profile + 0.045) * 0.68, 0.7 * q.h - y)
    return [("body", _cut(outer, hollow, 0.03))]


def _bowl(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = _norm2(x, z)
    outer = _ellipsoid(x, y, z, (0.0, q.h, 0.0), (q.r, q.h - 0.03, q.r))
    inner = _ellipsoid(x, y, z, (0.0, q.h, 0.0), (q.r - 0.06, q.h - 0.10, q.r - 0.06))
    shell = _cut(torch.maximum(outer, y - q.h), inner, 0.04)
    foot = _disc(rho, y - 0.05, q.foot, 0.05, 0.02)
    return [("body", _join(shell, foot, 0.04))]


def _pot(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = _norm2(x, z)
    belly = _ellipsoid(x, y, z, (0.0, 0.42, 0.0), (q.r, 0.43, q.r))
    outer = torch.maximum(belly, y - q.h)
    rim = _ring(rho, y - q.h, q.mouth, q.rim)
    neck = _disc(rho, y - q.h + 0.05, q.mouth, 0.06, 0.02)
    hollow = torch.maximum(rho - (q.mouth - 0.045), 0.3 - y)
    body = _cut(_join(_join(outer, neck, 0.06), rim, 0.02), hollow, 0.03)
    ear = _norm2(_norm2(x.abs() - q.r * 0.93, y - 0.53) - q.ear, z) - 0.046
    ear = torch.maximum(ear, -belly - 0.03)
    return [("body", _join(body, ear, 0.03))]


def _candle(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho, ax = _norm2(x, z), x.abs()
    top = 0.08 + q.h
    wax = _disc(rho, y - 0.08 - 0.5 * q.h, q.r, 0.5 * q.h, 0.03)
    wax = _cut(wax, _ball(x, y, z, (0.0, top + q.r * 0.85, 0.0), q.r * 1.05), 0.03)
    drip = _limb(
        ax, y, z, (q.r * 0.82, top - 0.05, q.r * 0.57), (q.r * 0.82, top - q.drip, q.r * 0.57), 0.035, 0.05
    )
    wax = _join(wax, drip, 0.03)
    dish = _all(_disc(rho, y - 0.035, q.dish, 0.03, 0.02), _ring(rho, y - 0.075, q.dish, 0.028))
    wick = _limb(x, y, z, (0.0, top - 0.12, 0.0), (0.01, top + 0.07, 0.0), 0.016, 0.016)
    flame = _join(
        _ball(x, y, z, (0.0, top + 0.11, 0.0), 0.062),
        _limb(x, y, z, (0.0, top + 0.12, 0.0), (0.015, top + q.flame, 0.0), 0.055, 0.008),
        0.03,
    )
    return [("body", wax), ("metal", dish), ("dark", wick), ("glow", flame)]


def _clock(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax, cy = x.abs(), q.r + 0.13
    v = y - cy
    rho = _norm2(x, v)
    case = _disc(rho, z, q.r, q.deep, 0.06)
    case = torch.maximum(case, -_disc(rho, z - q.deep, q.r * 0.72, 0.045, 0.01))
    bell = _ball(ax, y, z, (q.r * 0.62, cy + q.r * 0.93, 0.0), q.bell)
    bell = torch.maximum(bell, (0.80 * cy + 0.76 * q.r - y) * 0.8 + (q.r * 0.25 - ax) * 0.6)
    leg = _limb(ax, y, z, (q.r * 0.55, 0.22, 0.0), (q.r * 0.80, 0.045, 0.0), 0.05, 0.045)
    hammer = _all(
        _limb(x, y, z, (0.0, cy + q.r, 0.0), (0.0, cy + q.r + 0.12, 0.0), 0.022, 0.022),
        _ball(x, y, z, (0.0, cy + q.r + 0.13, 0.0), 0.05),
    )
    plate = _disc(rho, z - q.deep + 0.05, q.r * 0.73, 0.015, 0.005)
    front = z - q.deep + 0.025
    au, av = torch.maximum(ax, v.abs()), torch.minimum(ax, v.abs())
    tick = _box(au, av, front, (q.r * 0.60, 0.0, 0.0), (q.r * 0.07, 0.018, 0.022), 0.004)
    hands = _all(
        _hand(x, v, front, q.hour, q.r * 0.36, 0.030),
        _hand(x, v, front, q.minute, q.r * 0.56, 0.022),
        _disc(rho, front, 0.045, 0.03, 0.01),
    )
    return [
        ("body", _join(case, leg, 0.03)),
        ("accent", _all(bell, hammer)),
        ("pale", plate),
        ("dark", _all(tick, hands)),
    ]


def _hand(x: Tensor, y: Tensor, z: Tensor, angle: Tensor, length: Any, half: float) -> Tensor:
    """A clock hand from the middle, `angle` radians clockwise from twelve."""
    sin, cos = torch.sin(angle), torch.cos(angle)
    along, across = x * sin + y * cos, x * cos - y * sin
    return _box(across, along, z, (0.0, 0.45 * length, 0.0), (half, 0.55 * length, 0.022), 0.008)


def _can(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = _norm2(x, z)
    # The tin narrows towards the lid and the foot: the profile of a drinks can.
    taper = ((y - (q.h - 0.17)).clamp(min=0.0) + (0.11 - y).clamp(min=0.0)) * 0.42
    body = _disc(rho + taper, y - 0.5 * q.h, q.r, 0.5 * q.h - 0.03, 0.03) * 0.92
    lid = _ring(rho, y - (q.h - 0.02), q.r - 0.075, 0.026)
    foot = _ring(rho, y - 0.03, q.r - 0.05, 0.028)
    cover = _disc(rho, y - (q.h - 0.035), q.r - 0.07, 0.012, 0.005)
    tab = _norm2(_norm2(x, (z - 0.06) * 0.7) - 0.07, (y - (q.h - 0.01)) * 1.2) - 0.02
    return [("body", body), ("metal", _all(lid, foot, cover, tab))]


def _boot(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    back = -0.14
    top = 0.30 + q.shaft
    shaft = _limb(x, y, z, (0.0, 0.22, back), (0.0, top, back - 0.03), q.r * 0.92, q.r)
    shaft = torch.maximum(shaft, y - top)
    toe = _limb(x, y, z, (0.0, 0.20, back), (0.0, 0.185, q.foot), 0.165, 0.135)
    upper = _join(shaft, toe, 0.16)
    hollow = torch.maximum(_norm2(x, z - back + 0.03) - (q.r - 0.055), top - 0.30 - y)
    upper = _cut(torch.maximum(upper, 0.06 - y), hollow, 0.03)
    middle, half = 0.5 * (q.foot + back), 0.5 * (q.foot - back)
    sole = _box(x, y, z, (0.0, 0.055, middle), (0.165, 0.05, half + 0.15), 0.045)
    heel = _box(x, y, z, (0.0, 0.05, back - 0.03), (0.16, 0.10, 0.12), 0.03)
    cuff = _norm2(_norm2(x, z - back + 0.03) - q.r, (y - top + 0.03) * 0.7) - q.cuff
    rise = _repeat(y, 0.42, 0.13, 3)
    lace = _limb(
        x.abs(), rise, z, (0.0, 0.0, back + q.r * 1.02), (0.11, 0.03, back + q.r * 0.88), 0.026, 0.026
    )
    return [("body", upper), ("dark", _all(sole, heel)), ("pale", _all(cuff, lace))]


def _robot(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    top = 0.30 + 2 * q.torso_h
    head_y = top + 0.07 + q.head_h
    torso = _box(x, y, z, (0.0, 0.30 + q.torso_h, 0.0), (q.torso_w, q.torso_h, 0.20), 0.05)
    head = _box(x, y, z, (0.0, head_y, 0.0), (q.head_w, q.head_h, 0.18), 0.05)
    foot = _box(ax, y, z, (0.16, 0.05, 0.06), (0.11, 0.05, 0.16), 0.03)
    sleeve = _limb(
        ax,
        y,
        z,
        (q.torso_w + 0.07, top - 0.10, 0.0),
        (q.torso_w + 0.13, top - 0.12 - q.arm * 0.5, 0.02),
        0.09,
        0.075,
    )
    joint = _all(
        _limb(ax, y, z, (0.16, 0.32, 0.0), (0.16, 0.08, 0.0), 0.07, 0.07),
        _limb(x, y, z, (0.0, top, 0.0), (0.0, top + 0.08, 0.0), 0.09, 0.09),
        _limb(
            ax, y, z,
            (q.torso_w + 0.13, top - 0.12 - q.arm * 0.5, 0.02), (q.torso_w + 0.12, top - 0.12 - q.arm, 0.12),
            0.05, 0.05,
        ),
        _ball(ax, y, z, (q.torso_w + 0.12, top - 0.14 - q.arm, 0.14), 0.085),
        _limb(x, y, z, (0.0, head_y, 0.0), (0.0, head_y + q.head_h + q.antenna, 0.0), 0.02, 0.02),
    )  # fmt: skip
    bulb = _ball(x, y, z, (0.0, head_y + q.head_h + q.antenna, 0.0), 0.055)
    eye = _disc(_norm2(ax - q.head_w * 0.46, y - head_y - 0.03), z - 0.18, 0.058, 0.03, 0.015)
    mouth = _box(x, y, z, (0.0, head_y - q.head_h * 0.55, 0.17), (q.head_w * 0.5, 0.022, 0.03), 0.01)
    panel = _box(x, y, z, (0.0, 0.32 + q.torso_h, 0.19), (q.torso_w * 0.6, q.torso_h * 0.45, 0.035), 0.02)
    return [
        ("body", _all(torso, head, foot, sleeve)),
        ("metal", joint),
        ("glow", _all(eye, bulb)),
        ("dark", mouth),
        ("accent", panel),
    ]


def _duck(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    body = _ellipsoid(x, y, z, (0.0, 0.33, -0.02), (q.wide, 0.33, q.long))
    tail = _limb(x, y, z, (0.0, 0.40, -q.long * 0.7), (0.0, 0.40 + q.tail, -q.long - 0.10), 0.17, 0.04)
    head_y, head_z = 0.62 + q.head * 0.75, q.long * 0.50
    head = _ball(x, y, z, (0.0, head_y, head_z), q.head)
    wing = _ellipsoid(ax, y, z, (q.wide * 0.93, 0.40, -0.06), (0.085, 0.17, 0.27))
    plump = _join(_join(_join(body, head, 0.12), tail, 0.08), wing, 0.02)
    beak_z = head_z + q.head * 0.95
    beak = _join(
        _ellipsoid(x, y, z, (0.0, head_y - 0.04, beak_z), (0.13, 0.045, q.beak)),
        _ellipsoid(x, y, z, (0.0, head_y - 0.10, beak_z - 0.02), (0.10, 0.04, q.beak * 0.75)),
        0.01,
    )
    eye = _ball(ax, y, z, (q.head * 0.52, head_y + q.head * 0.24, head_z + q.head * 0.78), 0.048)
    return [("body", plump), ("accent", beak), ("dark", eye)]


def _car(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax, az = x.abs(), z.abs()
    lower = _box(x, y, z, (0.0, 0.33, 0.0), (0.38, 0.16, q.long), 0.10)
    # The cabin leans in towards the roof, as windscreens do.
    lean = (y - 0.45).clamp(min=0.0)
    side, end = ax + lean * 0.18, az + lean * 0.55
    cabin = _box(side, y, end, (0.0, 0.47, 0.0), (0.34, q.cabin, 0.48), 0.06)
    body = _join(lower, cabin * 0.85, 0.03)
    arch = torch.maximum(_norm2(y - q.wheel, az - q.long * 0.60) - (q.wheel + 0.035), 0.26 - ax)
    body = _cut(body, arch, 0.02)
    wheel = _disc(_norm2(y - q.wheel, az - q.long * 0.60), ax - 0.33, q.wheel, 0.075, 0.03)
    hub = _disc(_norm2(y - q.wheel, az - q.long * 0.60), ax - 0.345, q.wheel * 0.55, 0.07, 0.02)
    pane_y, pane_h = 0.485 + 0.5 * q.cabin, 0.5 * q.cabin - 0.065
    doors = _box(side, y, az + lean * 0.5, (0.29, pane_y, 0.215), (0.062, pane_h, 0.185), 0.02)
    screens = _box(x, y, end, (0.0, pane_y, 0.43), (0.25, pane_h, 0.062), 0.02)
    glass = _all(doors, screens) * 0.85
    lamp = _ball(ax, y, az, (0.25, 0.37, q.long - 0.03), 0.075)
    bumper = _box(x, y, az, (0.0, 0.22, q.long), (0.34, 0.045, 0.045), 0.03)
    return [("body", body), ("dark", _all(wheel, glass)), ("metal", _all(hub, bumper)), ("pale", lamp)]


def _dog(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    spine = 0.20 + q.leg
    trunk = _limb(x, y, z, (0.0, spine, -q.long), (0.0, spine + 0.04, q.long * 0.85), 0.20, 0.225)
    front = _limb(
        ax, y, z, (0.13, spine - 0.04, q.long * 0.85), (0.135, 0.08, q.long * 0.85 + 0.04), 0.10, 0.085
    )
    hind = _limb(ax, y, z, (0.13, spine - 0.02, -q.long), (0.135, 0.08, -q.long - 0.02), 0.12, 0.085)
    head_y, head_z = spine + 0.40, q.long + 0.20
    neck = _limb(x, y, z, (0.0, spine + 0.08, q.long * 0.8), (0.0, head_y - 0.06, head_z - 0.05), 0.16, 0.14)
    head = _ball(x, y, z, (0.0, head_y, head_z), q.head)
    nose_z = head_z + q.head * 0.65 + q.snout
    snout = _limb(x, y, z, (0.0, head_y - 0.06, head_z + 0.08), (0.0, head_y - 0.09, nose_z), 0.125, 0.085)
    tail = _limb(
        x, y, z, (0.0, spine + 0.10, -q.long - 0.1), (0.0, spine + 0.12 + q.tail, -q.long - 0.28), 0.06, 0.045
    )
    ear = _ellipsoid(
        ax, y, z, (q.head * 0.95, head_y + 0.02 - q.ear * 0.35, head_z - 0.03), (0.06, q.ear, 0.11)
    )
    coat = _join(_join(_join(_join(trunk, front, 0.06), hind, 0.06), neck, 0.06), head, 0.05)
    coat = _join(_join(_join(coat, snout, 0.04), tail, 0.03), ear, 0.015)
    tip = _ball(x, y, z, (0.0, head_y - 0.055, nose_z + 0.07), 0.052)
    eye = _ball(ax, y, z, (q.head * 0.45, head_y + q.head * 0.28, head_z + q.head * 0.80), 0.04)
    # The collar lies across the neck, which leans forward by about 40 degrees.
    v, w = y - (spine + 0.235), z - (q.long * 0.8 + 0.092)
    collar = _ring(_norm2(x, 0.77 * w - 0.64 * v), 0.77 * v + 0.64 * w, 0.165, 0.034)
    return [("body", coat), ("dark", _all(tip, eye)), ("accent", collar)]


def _lamp(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = _norm2(x, z)
    stem_top = 0.16 + q.stem
    base = _join(
        _disc(rho, y - 0.05, q.base, 0.05, 0.04),
        _ellipsoid(x, y, z, (0.0, 0.16, 0.0), (0.15, 0.15, 0.15)),
        0.08,
    )
    stem = _limb(x, y, z, (0.0, 0.2, 0.0), (0.0, stem_top + 0.2, 0.0), 0.035, 0.035)
    middle = stem_top + 0.5 * q.shade_h
    slant = (q.wide - q.narrow) / q.shade_h
    wall = rho + (y - middle) * slant - 0.5 * (q.wide + q.narrow)
    shade = torch.maximum(wall.abs() - 0.022, (y - middle).abs() - 0.5 * q.shade_h) * 0.85
    bulb = _ball(x, y, z, (0.0, stem_top + 0.12, 0.0), 0.11)
    return [("body", _all(base, shade)), ("metal", stem), ("glow", bulb)]


def _backpack(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    half = 0.5 * q.h
    main = _box(x, y, z, (0.0, half, 0.0), (q.wide, half, q.deep), 0.15)
    pocket = _box(x, y, z, (0.0, q.pocket + 0.07, q.deep), (q.wide * 0.74, q.pocket, 0.10), 0.07)
    side = _ellipsoid(ax, y, z, (q.wide, 0.24, 0.0), (0.09, 0.19, 0.13))
    grip = _norm2(_norm2(x, (y - q.h + 0.02) * 0.9) - 0.11, z + 0.04) - 0.034
    strap = _norm2(_norm2(y - q.h * 0.52, (z + q.deep * 0.8) * 1.5) - q.h * 0.36, ax - q.wide * 0.55) - 0.05
    strap = torch.maximum(strap, z + q.deep * 0.7)
    zip_line = _norm2(main.abs(), z - q.deep * 0.42) - 0.022
    zip_line = torch.maximum(zip_line, 0.25 - y)
    seam = _box(x, y, z, (0.0, q.pocket * 1.62 + 0.07, q.deep + 0.09), (q.wide * 0.62, 0.020, 0.03), 0.015)
    buckle = _box(x, y, z, (0.0, q.h * 0.70, q.deep + 0.005), (0.065, 0.05, 0.03), 0.02)
    return [
        ("body", _join(_join(main, pocket, 0.02), side, 0.03)),
        ("accent", _all(grip, strap, zip_line, seam)),
        ("metal", buckle),
    ]


def _chair(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    seat = _box(x, y, z, (0.0, q.seat, 0.0), (q.wide, 0.055, q.wide * 0.95), 0.04)
    leg_x, leg_z = q.wide - 0.06, q.wide * 0.95 - 0.06
    leg = _limb(ax, y, z.abs(), (leg_x, q.seat, leg_z), (leg_x + 0.03, 0.04, leg_z + 0.03), 0.05, 0.04)
    top = q.seat + q.back
    post = _limb(ax, y, z, (leg_x, q.seat, -leg_z), (leg_x, top, -leg_z - 0.07), 0.045, 0.045)
    panel_y = q.seat + 0.16 + 0.5 * (q.back - 0.16)
    panel = _box(
        x,
        y,
        z + (y - q.seat) * 0.08,
        (0.0, panel_y, -leg_z),
        (q.wide - 0.05, 0.5 * (q.back - 0.14), 0.035),
        0.025,
    )
    return [("body", _all(_join(seat, leg, 0.03), post, panel))]


def _mushroom(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    rho = _norm2(x, z)
    stem = _limb(x, y, z, (0.0, 0.10, 0.0), (0.0, q.stem + 0.06, 0.0), q.foot, q.foot * 0.72)
    stem = torch.maximum(stem, -y)
    cap = _ellipsoid(x, y, z, (0.0, q.stem, 0.0), (q.wide, q.dome, q.wide))
    cap = _cut(cap, y - q.stem + 0.03, 0.06)
    gills = _disc(rho, y - q.stem + 0.02, q.wide * 0.88, 0.03, 0.02)
    frill = _ring(rho, y - q.stem * 0.66, q.foot * 0.92, 0.045)
    return [("body", cap), ("pale", _all(_join(stem, frill, 0.03), gills))]


# --- extras: parts that only subjects have ----------------------------------------------------------


def _robot_arms(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Jointed arms with claws at both sides; the right one is raised."""
    # One fold for both arms: the right hand's height is mirrored, so it points up.
    ax, right = x.abs(), torch.sign(x)
    rise = -0.30 * right
    a = (q.extra_x, q.extra_y, 0.0)
    b = (q.extra_x + 0.22, q.extra_y + 0.5 * rise - 0.02, 0.10)
    c = (q.extra_x + 0.30, q.extra_y + 1.3 * rise, 0.26)
    bars = _all(_limb(ax, y, z, a, b, 0.05, 0.05), _limb(ax, y, z, b, c, 0.05, 0.045))
    knobs = _all(_ball(ax, y, z, a, 0.085), _ball(ax, y, z, b, 0.075), _ball(ax, y, z, c, 0.10))
    # 0.8: the fold is not continuous at x = 0, far from the arms but felt by the march.
    return [("metal", bars * 0.8), ("accent", knobs * 0.8)]


def _wings(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Three feathers on each side, swept up and back."""
    ax = x.abs()
    root = (q.extra_x - 0.02, q.extra_y, -0.12)
    feathers = [
        _limb(
            ax * 1.0,
            y,
            z,
            root,
            (q.extra_x + 0.34 - 0.07 * i, q.extra_y + 0.34 - 0.17 * i, -0.30),
            0.06,
            0.045,
        )
        for i in range(3)
    ]
    return [("pale", _all(*feathers))]


def _antlers(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """A pair of branched antlers."""
    ax = x.abs()
    a, b = (q.extra_x, q.extra_y, q.extra_z), (q.extra_x + 0.16, q.extra_y + 0.22, q.extra_z)
    beam = _limb(ax, y, z, a, b, 0.045, 0.038)
    tine = _limb(ax, y, z, b, (q.extra_x + 0.14, q.extra_y + 0.42, q.extra_z), 0.038, 0.022)
    spur = _limb(ax, y, z, b, (q.extra_x + 0.34, q.extra_y + 0.30, q.extra_z), 0.036, 0.022)
    return [("accent", _all(beam, tine, spur))]


def _bunny_ears(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Long ears; the left one stands, the right one is folded over."""
    left = _ellipsoid(x, y, z, (-q.extra_x, q.extra_y + 0.24, q.extra_z), (0.085, 0.30, 0.06))
    right = _join(
        _limb(x, y, z, (q.extra_x, q.extra_y, q.extra_z), (q.extra_x + 0.08, q.extra_y + 0.24, q.extra_z), 0.07, 0.08),
        _limb(
            x, y, z,
            (q.extra_x + 0.08, q.extra_y + 0.24, q.extra_z), (q.extra_x + 0.30, q.extra_y + 0.14, q.extra_z + 0.04),
            0.08, 0.06,
        ),
        0.05,
    )  # fmt: skip
    inner = _ellipsoid(x, y, z, (-q.extra_x, q.extra_y + 0.24, q.extra_z + 0.04), (0.05, 0.22, 0.04))
    return [("body", _all(left, right)), ("accent", inner)]


def _fin(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """A row of three plates along the back, the middle one tallest."""
    plates = [
        _limb(x * 0.9, y, z, (0.0, q.extra_y - 0.05, at), (0.0, q.extra_y + tall, at - 0.08), 0.09, 0.03)
        for at, tall in ((q.extra_z + 0.24, 0.12), (q.extra_z, 0.20), (q.extra_z - 0.24, 0.12))
    ]
    return [("accent", _all(*plates))]


def _bird_legs(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Big flat feet in front of the base."""
    ax = x.abs()
    toes = [
        _limb(ax, y, z, (q.extra_x, 0.07, 0.0), (q.extra_x + 0.10 * i, 0.05, q.extra_z), 0.06, 0.05)
        for i in (-1, 0, 1)
    ]
    return [("accent", _all(*toes))]


def _tail(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """A curled tail at the left with a ball at its tip."""
    a, b = (-q.extra_x, 0.16, -0.05), (-q.extra_x - 0.26, 0.20, 0.0)
    c = (-q.extra_x - 0.34, 0.52, 0.02)
    bend = _join(_limb(x, y, z, a, b, 0.08, 0.07), _limb(x, y, z, b, c, 0.07, 0.05), 0.05)
    return [("body", bend), ("accent", _ball(x, y, z, (c[0], c[1] + 0.06, c[2]), 0.11))]


def _hat(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """A top hat worn askew."""
    u, v = x * 0.96 + (y - q.extra_y) * 0.28, (y - q.extra_y) * 0.96 - x * 0.28
    rho = _norm2(u - 0.03, z - q.extra_z)
    brim = _disc(rho, v - 0.02, 0.26, 0.025, 0.02)
    crown = _disc(rho, v - 0.17, 0.16, 0.16, 0.03)
    band = _disc(rho, v - 0.075, 0.168, 0.035, 0.01)
    return [("dark", _join(brim, crown, 0.02)), ("accent", band)]


def _claws(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Three blunt claws at each hand of a stuffed animal."""
    ax = x.abs()
    hand_x = q.belly * 0.78 + q.arm * q.arm_out
    hand_y, hand_z = 0.67 - q.arm * 0.72, 0.06 + q.arm * q.arm_forward
    claws = [
        _limb(
            ax, y, z,
            (hand_x + at, hand_y - 0.01, hand_z + 0.09), (hand_x + at * 1.3, hand_y - 0.045, hand_z + 0.19),
            0.030, 0.020,
        )
        for at in (-0.055, 0.005, 0.065)
    ]  # fmt: skip
    return [("pale", _all(*claws))]


EXTRAS: dict[str, Field] = {
    "robot arms": _robot_arms,
    "wings": _wings,
    "antlers": _antlers,
    "bunny ears": _bunny_ears,
    "fin": _fin,
    "bird legs": _bird_legs,
    "tail": _tail,
    "hat": _hat,
    "claws": _claws,
}
"""Additions that no sampled scene has; placed by the proportions extra_x, extra_y, extra_z."""

EXTRA_PROPORTIONS = ("extra_x", "extra_y", "extra_z")

EXTRA_REACH: dict[str, tuple[float, float, float]] = {
    "robot arms": (0.42, 0.52, 0.38),
    "wings": (0.41, 0.41, 0.36),
    "antlers": (0.38, 0.46, 0.05),
    "bunny ears": (0.37, 0.56, 0.11),
    "fin": (0.11, 0.24, 0.44),
    "bird legs": (0.17, 0.14, 0.07),
    "tail": (0.47, 0.71, 0.14),
    "hat": (0.36, 0.42, 0.27),
    "claws": (0.0, 0.0, 0.0),
}
"""How far an extra reaches beyond extra_x to the sides, extra_y upwards and extra_z to front and back.

The tail stands on the ground, so its height counts from there; claws are within a stuffed animal's bounds.
"""


# --- the table of kinds -----------------------------------------------------------------------------


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


_FRONT = ((-60.0, 60.0),)
_SIDES = ((20.0, 115.0), (-115.0, -20.0))
_ANY = ((-180.0, 180.0),)


def _bounds_stuffed(q: Any) -> Bounds:
    head_y = 0.72 + q.head * 0.78
    hand_x = q.belly * 0.78 + q.arm * q.arm_out + q.arm_thick * 1.1
    return Bounds(
        max(hand_x, q.head * 0.80 + q.ear, q.head * 1.08, 0.43, q.belly),
        head_y + max(q.head * 0.72 + q.ear, q.head * 0.94),
        max(q.belly * 0.92, q.head * 0.96),
        max(0.10 + q.leg + 0.17, 0.05 + q.head * 0.86 + q.snout, 0.06 + q.arm * q.arm_forward + 0.22),
    )


def _bounds_robot(q: Any) -> Bounds:
    top = 0.37 + 2 * q.torso_h + 2 * q.head_h + q.antenna + 0.06
    return Bounds(q.torso_w + 0.22, top, 0.21, 0.26)


def _bounds_dog(q: Any) -> Bounds:
    front = q.long + 0.20 + q.head * 0.65 + q.snout + 0.14
    top = max(0.20 + q.leg + 0.40 + q.head, 0.37 + q.leg + q.tail)
    return Bounds(max(0.26, q.head * 0.95 + 0.07), top, q.long + 0.33, front)


_KINDS: Sequence[Kind] = (
    Kind(
        "stuffed animal",
        _stuffed_animal,
        {
            "head": (0.34, 0.42),
            "ear": (0.11, 0.17),
            "belly": (0.31, 0.39),
            "arm": (0.34, 0.46),
            "arm_out": (0.40, 0.60),
            "arm_forward": (0.35, 0.60),
            "arm_thick": (0.10, 0.13),
            "leg": (0.28, 0.40),
            "snout": (0.12, 0.17),
        },
        _bounds_stuffed,
        _FRONT,
        fuzzy=True,
    ),
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
        _ANY,
        mapping="round",
    ),
    Kind(
        "bowl",
        _bowl,
        {"r": (0.58, 0.68), "h": (0.40, 0.54), "foot": (0.22, 0.32)},
        lambda q: Bounds(q.r + 0.01, q.h + 0.01, q.r + 0.01, q.r + 0.01),
        _ANY,
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
        _ANY,
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
        "can",
        _can,
        {"r": (0.32, 0.40), "h": (0.92, 1.16)},
        lambda q: Bounds(q.r + 0.01, q.h + 0.02, q.r + 0.01, q.r + 0.01),
        _ANY,
        mapping="round",
    ),
    Kind(
        "boot",
        _boot,
        {"shaft": (0.50, 0.76), "r": (0.19, 0.25), "foot": (0.34, 0.46), "cuff": (0.035, 0.055)},
        lambda q: Bounds(q.r + q.cuff + 0.01, 0.30 + q.shaft + q.cuff, 0.17 + q.r + q.cuff, q.foot + 0.17),
        ((35.0, 125.0), (-125.0, -35.0)),
    ),
    Kind(
        "robot",
        _robot,
        {
            "torso_w": (0.25, 0.33),
            "torso_h": (0.22, 0.29),
            "head_w": (0.20, 0.28),
            "head_h": (0.14, 0.20),
            "arm": (0.30, 0.42),
            "antenna": (0.10, 0.20),
        },
        _bounds_robot,
        _FRONT,
    ),
    Kind(
        "duck",
        _duck,
        {
            "wide": (0.36, 0.44),
            "long": (0.46, 0.56),
            "head": (0.24, 0.30),
            "beak": (0.12, 0.17),
            "tail": (0.14, 0.24),
        },
        lambda q: Bounds(
            max(q.wide * 0.93 + 0.09, q.head),
            0.62 + q.head * 1.75,
            q.long + 0.19,
            q.long * 0.5 + q.head * 0.95 + q.beak,
        ),
        ((-95.0, 95.0),),
        accents=((0.96, 0.55, 0.08), (0.90, 0.38, 0.08)),
    ),
    Kind(
        "car",
        _car,
        {"long": (0.70, 0.84), "cabin": (0.27, 0.33), "wheel": (0.16, 0.20)},
        lambda q: Bounds(0.42, 0.49 + q.cabin, q.long + 0.06, q.long + 0.06),
        ((25.0, 80.0), (-80.0, -25.0), (100.0, 155.0), (-155.0, -100.0)),
    ),
    Kind(
        "dog",
        _dog,
        {
            "leg": (0.34, 0.46),
            "long": (0.26, 0.36),
            "head": (0.20, 0.25),
            "snout": (0.06, 0.12),
            "ear": (0.15, 0.22),
            "tail": (0.12, 0.30),
        },
        _bounds_dog,
        _SIDES,
        fuzzy=True,
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
        _ANY,
        mapping="round",
    ),
    Kind(
        "backpack",
        _backpack,
        {"h": (0.98, 1.14), "wide": (0.36, 0.44), "deep": (0.19, 0.25), "pocket": (0.18, 0.24)},
        lambda q: Bounds(q.wide + 0.10, q.h + 0.15, q.deep * 0.8 + q.h * 0.24 + 0.06, q.deep + 0.12),
        ((-75.0, 75.0),),
    ),
    Kind(
        "chair",
        _chair,
        {"wide": (0.32, 0.40), "seat": (0.44, 0.56), "back": (0.60, 0.78)},
        lambda q: Bounds(q.wide + 0.03, q.seat + q.back + 0.05, q.wide * 0.95 + 0.12, q.wide * 0.95 + 0.02),
        ((-70.0, 70.0),),
    ),
    Kind(
        "mushroom",
        _mushroom,
        {"stem": (0.50, 0.68), "foot": (0.15, 0.21), "wide": (0.46, 0.58), "dome": (0.34, 0.46)},
        lambda q: Bounds(q.wide + 0.02, q.stem + q.dome + 0.01, q.wide + 0.02, q.wide + 0.02),
        _ANY,
        mapping="round",
    ),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
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
    return _all(*(part for _, part in parts_of(kind, extras, x, y, z, q)))
