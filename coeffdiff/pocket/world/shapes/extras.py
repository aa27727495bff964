"""Parts that only subjects have: antlers, wings, a hat and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coeffdiff.pocket.world.shapes import sdf
from coeffdiff.pocket.world.shapes.sdf import Field, Parts


def _robot_arms(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Jointed arms with claws at both sides; the right one is raised."""
    # One fold for both arms: the right hand's height is mirrored, so it points up.
    ax, right = x.abs(), torch.sign(x)
    rise = -0.30 * right
    a = (q.extra_x, q.extra_y, 0.0)
    b = (q.extra_x + 0.22, q.extra_y + 0.5 * rise - 0.02, 0.10)
    c = (q.extra_x + 0.30, q.extra_y + 1.3 * rise, 0.26)
    bars = sdf.nearest(sdf.limb(ax, y, z, a, b, 0.05, 0.05), sdf.limb(ax, y, z, b, c, 0.05, 0.045))
    knobs = sdf.nearest(
        sdf.ball(ax, y, z, a, 0.085), sdf.ball(ax, y, z, b, 0.075), sdf.ball(ax, y, z, c, 0.10)
    )
    # 0.8: the fold is not continuous at x = 0, far from the arms but felt by the march.
    return [("metal", bars * 0.8), ("accent", knobs * 0.8)]


def _wings(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Three feathers on each side, swept up and back."""
    ax = x.abs()
    root = (q.extra_x - 0.02, q.extra_y, -0.12)
    feathers = [
        sdf.limb(
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
    return [("pale", sdf.nearest(*feathers))]


def _antlers(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """A pair of branched antlers."""
    ax = x.abs()
    a, b = (q.extra_x, q.extra_y, q.extra_z), (q.extra_x + 0.16, q.extra_y + 0.22, q.extra_z)
    beam = sdf.limb(ax, y, z, a, b, 0.045, 0.038)
    tine = sdf.limb(ax, y, z, b, (q.extra_x + 0.14, q.extra_y + 0.42, q.extra_z), 0.038, 0.022)
    spur = sdf.limb(ax, y, z, b, (q.extra_x + 0.34, q.extra_y + 0.30, q.extra_z), 0.036, 0.022)
    return [("accent", sdf.nearest(beam, tine, spur))]


def _bunny_ears(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Long ears; the left one stands, the right one is folded over."""
    left = sdf.ellipsoid(x, y, z, (-q.extra_x, q.extra_y + 0.24, q.extra_z), (0.085, 0.30, 0.06))
    right = sdf.join(
        sdf.limb(
            x, y, z,
            (q.extra_x, q.extra_y, q.extra_z), (q.extra_x + 0.08, q.extra_y + 0.24, q.extra_z),
            0.07, 0.08,
        ),
        sdf.limb(
            x, y, z,
            (q.extra_x + 0.08, q.extra_y + 0.24, q.extra_z),
            (q.extra_x + 0.30, q.extra_y + 0.14, q.extra_z + 0.04),
            0.08, 0.06,
        ),
        0.05,
    )  # fmt: skip
    inner = sdf.ellipsoid(x, y, z, (-q.extra_x, q.extra_y + 0.24, q.extra_z + 0.04), (0.05, 0.22, 0.04))
    return [("body", sdf.nearest(left, right)), ("accent", inner)]


def _fin(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """A row of three plates along the back, the middle one tallest."""
    plates = [
        sdf.limb(x * 0.9, y, z, (0.0, q.extra_y - 0.05, at), (0.0, q.extra_y + tall, at - 0.08), 0.09, 0.03)
        for at, tall in ((q.extra_z + 0.24, 0.12), (q.extra_z, 0.20), (q.extra_z - 0.24, 0.12))
    ]
    return [("accent", sdf.nearest(*plates))]


def _bird_legs(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Big flat feet in front of the base."""
    ax = x.abs()
    toes = [
        sdf.limb(ax, y, z, (q.extra_x, 0.07, 0.0), (q.extra_x + 0.10 * i, 0.05, q.extra_z), 0.06, 0.05)
        for i in (-1, 0, 1)
    ]
    return [("accent", sdf.nearest(*toes))]


def _tail(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """A curled tail at the left with a ball at its tip."""
    a, b = (-q.extra_x, 0.16, -0.05), (-q.extra_x - 0.26, 0.20, 0.0)
    c = (-q.extra_x - 0.34, 0.52, 0.02)
    bend = sdf.join(sdf.limb(x, y, z, a, b, 0.08, 0.07), sdf.limb(x, y, z, b, c, 0.07, 0.05), 0.05)
    return [("body", bend), ("accent", sdf.ball(x, y, z, (c[0], c[1] + 0.06, c[2]), 0.11))]


def _hat(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """A top hat worn askew."""
    u, v = x * 0.96 + (y - q.extra_y) * 0.28, (y - q.extra_y) * 0.96 - x * 0.28
    rho = sdf.norm2(u - 0.03, z - q.extra_z)
    brim = sdf.disc(rho, v - 0.02, 0.26, 0.025, 0.02)
    crown = sdf.disc(rho, v - 0.17, 0.16, 0.16, 0.03)
    band = sdf.disc(rho, v - 0.075, 0.168, 0.035, 0.01)
    return [("dark", sdf.join(brim, crown, 0.02)), ("accent", band)]


def _claws(x: Tensor, y: Tensor, z: Tensor, q: Any) -> Parts:
    """Three blunt claws at each hand of a stuffed animal."""
    ax = x.abs()
    hand_x = q.belly * 0.78 + q.arm * q.arm_out
    hand_y, hand_z = 0.67 - q.arm * 0.72, 0.06 + q.arm * q.arm_forward
    claws = [
        sdf.limb(
            ax, y, z,
            (hand_x + at, hand_y - 0.01, hand_z + 0.09), (hand_x + at * 1.3, hand_y - 0.045, hand_z + 0.19),
            0.030, 0.020,
        )
        for at in (-0.055, 0.005, 0.065)
    ]  # fmt: skip
    return [("pale", sdf.nearest(*claws))]


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
