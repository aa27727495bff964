"""Building blocks of several places: skies, leaves, planks, walls, grass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import mix, ramp
from coeffdiff.pocket.world.places.noise import CLOUDY, GRAINY, SMOOTH
from coeffdiff.pocket.world.places.view import View


def gradient_sky(view: View, low: Tensor, high: Tensor, clouds: float) -> Tensor:
    height = view.rise.clamp(0.0, 0.6) / 0.6
    sky = mix(low, high, height.sqrt())
    if clouds:
        drift = view.noise(CLOUDY, view.bearing * 5.0, view.rise * 16.0, 2)
        cloud = ramp(drift, 1.0 - clouds, 1.15 - clouds) * ramp(view.rise, 0.0, 0.12)
        sky = mix(sky, view.rgb(0.98, 0.98, 0.99), cloud)
    return sky


def leaves(view: View, x: Tensor, y: Tensor, salt: int, slim: float) -> tuple[Tensor, Tensor]:
    """One leaf per unit cell: its mask and a random tone, both [n, h, w]."""
    i, j = x.floor(), y.floor()
    turn = view.chance(i, j, salt) * math.pi
    du = x - i - 0.5 + 0.24 * (view.chance(i, j, salt + 1) - 0.5)
    dv = y - j - 0.5 + 0.24 * (view.chance(i, j, salt + 2) - 0.5)
    cos, sin = torch.cos(turn), torch.sin(turn)
    along, across = (du * cos + dv * sin) / 0.40, (dv * cos - du * sin) / (0.40 * slim)
    # Two crossing arcs: pointed at both ends.
    mask = ramp(across.abs() + along * along, 1.0, 0.82)
    vein = ramp(across.abs(), 0.05, 0.16) * 0.25 + 0.75
    return mask, view.chance(i, j, salt + 3) * vein


def planks(view: View, x: Tensor, y: Tensor, tint: Tensor) -> Tensor:
    """Floor boards along y, one unit wide, as albedo."""
    column = x.floor()
    offset = y / 5.0 + view.chance(column, 0, 3) * 5.0
    board = offset.floor()
    tone = 0.72 + 0.5 * view.chance(column, board, 5)
    grain = view.noise(CLOUDY, x * 9.0 + board * 3.1, y * 0.55, 4)
    fine = view.noise(GRAINY, x * 3.0, y * 0.12, 5)
    edge = torch.minimum(x - column, column + 1.0 - x)
    end = torch.minimum(offset - board, board + 1.0 - offset) * 5.0
    gap = ramp(torch.minimum(edge, end), 0.015, 0.06)
    strength = view.fade(0.35)
    veins = 1.0 + strength * (0.34 * (grain - 0.5) + 0.22 * (fine - 0.5))
    return tint * (tone * veins * (1.0 - 0.65 * (1.0 - gap) * strength))


def room_wall(view: View, behind: Tensor, colour: Tensor, board: Tensor) -> tuple[Tensor, Tensor]:
    """A painted wall with a skirting board, and where it is seen."""
    seen, x, y = view.wall(behind)
    tone = 1.0 + 0.05 * (view.noise(SMOOTH, x * 0.6, y * 0.6, 1) - 0.5) - 0.10 * ramp(y, 0.6, 0.0)
    wall = mix(colour * tone, board, ramp(y, 0.32, 0.30))
    wall = wall * (1.0 - 0.5 * ramp((y - 0.31).abs(), 0.03, 0.0))
    light = (view.sky * 1.25 + view.key * 0.45).t().reshape(3, -1, 1, 1)
    return wall * light, seen


def grass(view: View, light: Tensor, dark: Tensor) -> Tensor:
    """A lawn as albedo: blades are noise stretched away from the camera."""
    blades = view.noise(GRAINY, view.x * 2.6, view.z * 0.9, 3)
    tufts = view.noise(CLOUDY, view.x * 1.4, view.z * 0.9, 4)
    strength = view.fade(0.10)
    return mix(dark, light, (0.5 + 0.75 * strength * (blades - 0.5) + 0.5 * (tufts - 0.5)).clamp(0.0, 1.0))
