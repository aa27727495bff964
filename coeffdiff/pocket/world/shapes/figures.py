"""Figures with a face: stuffed animal, robot, duck, dog."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from coeffdiff.pocket.world.shapes import sdf
from coeffdiff.pocket.world.shapes.kind import FRONT, SIDES, Bounds, Kind
from coeffdiff.pocket.world.shapes.sdf import Parts


def _stuffed_animal(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    head_y = 0.72 + q.head * 0.78
    body = sdf.ellipsoid(x, y, z, (0.0, 0.41, 0.0), (q.belly, 0.42, q.belly * 0.92))
    head = sdf.ellipsoid(x, y, z, (0.0, head_y, 0.05), (q.head * 1.08, q.head * 0.94, q.head * 0.96))
    shoulder_x, reach_x, reach_z = q.belly * 0.78, q.arm * q.arm_out, q.arm * q.arm_forward
    drop = q.arm * 0.72
    arm = sdf.limb(
        ax, y, z,
        (shoulder_x, 0.67, 0.03), (shoulder_x + reach_x, 0.67 - drop, 0.06 + reach_z),
        q.arm_thick * 0.92, q.arm_thick * 1.08,
    )  # fmt: skip
    foot_z = 0.10 + q.leg
    leg = sdf.limb(ax, y, z, (0.17, 0.15, 0.08), (0.28, 0.14, foot_z), 0.14, 0.14)
    ear = sdf.ball(ax, y, z, (q.head * 0.78, head_y + q.head * 0.72, 0.02), q.ear)
    snout_z = 0.05 + q.head * 0.86
    snout = sdf.ellipsoid(
        x, y, z, (0.0, head_y - q.head * 0.24, snout_z), (q.snout, q.snout * 0.78, q.snout * 0.8)
    )
    patch = sdf.ellipsoid(x, y, z, (0.0, 0.40, q.belly * 0.30), (q.belly * 0.66, 0.29, q.belly * 0.68))
    pad = sdf.ball(ax, y, z, (0.285, 0.14, foot_z + 0.075), 0.088)
    inner = sdf.ball(ax, y, z, (q.head * 0.78, head_y + q.head * 0.70, 0.02 + q.ear * 0.62), q.ear * 0.62)
    eye = sdf.ball(ax, y, z, (q.head * 0.36, head_y + q.head * 0.10, 0.05 + q.head * 0.86), 0.042)
    nose = sdf.ellipsoid(
        x, y, z, (0.0, head_y - q.head * 0.10, snout_z + q.snout * 0.66), (0.055, 0.04, 0.04)
    )
    fur = sdf.join(sdf.join(sdf.join(sdf.join(body, head, 0.05), arm, 0.05), leg, 0.05), ear, 0.04)
    return [("body", fur), ("pale", sdf.nearest(snout, patch, pad, inner)), ("dark", sdf.nearest(eye, nose))]


def _robot(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    top = 0.30 + 2 * q.torso_h
    head_y = top + 0.07 + q.head_h
    torso = sdf.box(x, y, z, (0.0, 0.30 + q.torso_h, 0.0), (q.torso_w, q.torso_h, 0.20), 0.05)
    head = sdf.box(x, y, z, (0.0, head_y, 0.0), (q.head_w, q.head_h, 0.18), 0.05)
    foot = sdf.box(ax, y, z, (0.16, 0.05, 0.06), (0.11, 0.05, 0.16), 0.03)
    sleeve = sdf.limb(
        ax,
        y,
        z,
        (q.torso_w + 0.07, top - 0.10, 0.0),
        (q.torso_w + 0.13, top - 0.12 - q.arm * 0.5, 0.02),
        0.09,
        0.075,
    )
    joint = sdf.nearest(
        sdf.limb(ax, y, z, (0.16, 0.32, 0.0), (0.16, 0.08, 0.0), 0.07, 0.07),
        sdf.limb(x, y, z, (0.0, top, 0.0), (0.0, top + 0.08, 0.0), 0.09, 0.09),
        sdf.limb(
            ax, y, z,
            (q.torso_w + 0.13, top - 0.12 - q.arm * 0.5, 0.02), (q.torso_w + 0.12, top - 0.12 - q.arm, 0.12),
            0.05, 0.05,
        ),
        sdf.ball(ax, y, z, (q.torso_w + 0.12, top - 0.14 - q.arm, 0.14), 0.085),
        sdf.limb(x, y, z, (0.0, head_y, 0.0), (0.0, head_y + q.head_h + q.antenna, 0.0), 0.02, 0.02),
    )  # fmt: skip
    bulb = sdf.ball(x, y, z, (0.0, head_y + q.head_h + q.antenna, 0.0), 0.055)
    eye = sdf.disc(sdf.norm2(ax - q.head_w * 0.46, y - head_y - 0.03), z - 0.18, 0.058, 0.03, 0.015)
    mouth = sdf.box(x, y, z, (0.0, head_y - q.head_h * 0.55, 0.17), (q.head_w * 0.5, 0.022, 0.03), 0.01)
    panel = sdf.box(x, y, z, (0.0, 0.32 + q.torso_h, 0.19), (q.torso_w * 0.6, q.torso_h * 0.45, 0.035), 0.02)
    return [
        ("body", sdf.nearest(torso, head, foot, sleeve)),
        ("metal", joint),
        ("glow", sdf.nearest(eye, bulb)),
        ("dark", mouth),
        ("accent", panel),
    ]


def _duck(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    body = sdf.ellipsoid(x, y, z, (0.0, 0.33, -0.02), (q.wide, 0.33, q.long))
    tail = sdf.limb(x, y, z, (0.0, 0.40, -q.long * 0.7), (0.0, 0.40 + q.tail, -q.long - 0.10), 0.17, 0.04)
    head_y, head_z = 0.62 + q.head * 0.75, q.long * 0.50
    head = sdf.ball(x, y, z, (0.0, head_y, head_z), q.head)
    wing = sdf.ellipsoid(ax, y, z, (q.wide * 0.93, 0.40, -0.06), (0.085, 0.17, 0.27))
    plump = sdf.join(sdf.join(sdf.join(body, head, 0.12), tail, 0.08), wing, 0.02)
    beak_z = head_z + q.head * 0.95
    beak = sdf.join(
        sdf.ellipsoid(x, y, z, (0.0, head_y - 0.04, beak_z), (0.13, 0.045, q.beak)),
        sdf.ellipsoid(x, y, z, (0.0, head_y - 0.10, beak_z - 0.02), (0.10, 0.04, q.beak * 0.75)),
        0.01,
    )
    eye = sdf.ball(ax, y, z, (q.head * 0.52, head_y + q.head * 0.24, head_z + q.head * 0.78), 0.048)
    return [("body", plump), ("accent", beak), ("dark", eye)]


def _dog(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    ax = x.abs()
    spine = 0.20 + q.leg
    trunk = sdf.limb(x, y, z, (0.0, spine, -q.long), (0.0, spine + 0.04, q.long * 0.85), 0.20, 0.225)
    front = sdf.limb(
        ax, y, z, (0.13, spine - 0.04, q.long * 0.85), (0.135, 0.08, q.long * 0.85 + 0.04), 0.10, 0.085
    )
    hind = sdf.limb(ax, y, z, (0.13, spine - 0.02, -q.long), (0.135, 0.08, -q.long - 0.02), 0.12, 0.085)
    head_y, head_z = spine + 0.40, q.long + 0.20
    neck = sdf.limb(
        x, y, z, (0.0, spine + 0.08, q.long * 0.8), (0.0, head_y - 0.06, head_z - 0.05), 0.16, 0.14
    )
    head = sdf.ball(x, y, z, (0.0, head_y, head_z), q.head)
    nose_z = head_z + q.head * 0.65 + q.snout
    snout = sdf.limb(x, y, z, (0.0, head_y - 0.06, head_z + 0.08), (0.0, head_y - 0.09, nose_z), 0.125, 0.085)
    tail = sdf.limb(
        x, y, z, (0.0, spine + 0.10, -q.long - 0.1), (0.0, spine + 0.12 + q.tail, -q.long - 0.28), 0.06, 0.045
    )
    ear = sdf.ellipsoid(
        ax, y, z, (q.head * 0.95, head_y + 0.02 - q.ear * 0.35, head_z - 0.03), (0.06, q.ear, 0.11)
    )
    coat = sdf.join(sdf.join(sdf.join(sdf.join(trunk, front, 0.06), hind, 0.06), neck, 0.06), head, 0.05)
    coat = sdf.join(sdf.join(sdf.join(coat, snout, 0.04), tail, 0.03), ear, 0.015)
    tip = sdf.ball(x, y, z, (0.0, head_y - 0.055, nose_z + 0.07), 0.052)
    eye = sdf.ball(ax, y, z, (q.head * 0.45, head_y + q.head * 0.28, head_z + q.head * 0.80), 0.04)
    # The collar lies across the neck, which leans forward by about 40 degrees.
    v, w = y - (spine + 0.235), z - (q.long * 0.8 + 0.092)
    collar = sdf.ring(sdf.norm2(x, 0.77 * w - 0.64 * v), 0.77 * v + 0.64 * w, 0.165, 0.034)
    return [("body", coat), ("dark", sdf.nearest(tip, eye)), ("accent", collar)]


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


FIGURES: Sequence[Kind] = (
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
        FRONT,
        fuzzy=True,
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
        FRONT,
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
        SIDES,
        fuzzy=True,
    ),
)
