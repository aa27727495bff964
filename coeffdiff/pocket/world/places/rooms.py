"""Indoors: pink fabric, a wooden floor, a white rug, a kitchen."""

from __future__ import annotations

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import mix, ramp
from coeffdiff.pocket.world.places.blocks import planks, room_wall
from coeffdiff.pocket.world.places.noise import CLOUDY, GRAINY, SMOOTH
from coeffdiff.pocket.world.places.view import View


def pink_fabric(view: View) -> Tensor:
    seen, wx, wy = view.wall(view.d(0, 1.5, 2.3))
    # One cloth: it lies on the floor and is drawn up behind.
    x = torch.where(seen, wx, view.x)
    y = torch.where(seen, view.d(0, 1.5, 2.3) + wy, -view.z)
    turn = view.d(1, -0.9, 0.9)
    a, b = x * torch.cos(turn) + y * torch.sin(turn), y * torch.cos(turn) - x * torch.sin(turn)
    warp = view.noise(SMOOTH, a * 0.9, b * 0.9, 2) * 5.0
    first = torch.sin(a * 2.6 + warp) + 0.5 * torch.sin(a * 4.7 - b * 1.9 + warp * 1.3)
    crease = view.noise(CLOUDY, a * 1.5, b * 0.6, 3) - view.noise(CLOUDY, a * 1.5 + 0.14, b * 0.6 + 0.05, 3)
    weave = (view.noise(GRAINY, x * 4.0, y * 4.0, 4) - 0.5) * 0.08 * view.fade(0.05)
    pink = view.pick(5, (0.95, 0.56, 0.70), (0.98, 0.68, 0.79)) * (1.0 + weave)
    cloth = pink * (1.0 + 0.16 * first)
    ground = view.lit(cloth, 0.75 * crease)
    light = (view.sky * 1.0 + view.key * 0.62).t().reshape(3, -1, 1, 1)
    return torch.where(seen, cloth * (1.0 + 0.8 * crease) * light, ground)


def wooden_floor(view: View) -> Tensor:
    turn = view.d(0, -0.7, 0.7)
    cos, sin, wide = torch.cos(turn), torch.sin(turn), view.d(1, 0.34, 0.52)
    x, y = (view.x * cos + view.z * sin) / wide, (view.z * cos - view.x * sin) / wide
    tint = view.pick(2, (0.60, 0.39, 0.21), (0.73, 0.52, 0.31), (0.50, 0.30, 0.17))
    ground = view.lit(planks(view, x, y, tint))
    colour = view.pick(3, (0.88, 0.85, 0.78), (0.72, 0.78, 0.76), (0.80, 0.74, 0.66))
    wall, seen = room_wall(view, view.d(6, 2.2, 3.4), colour, view.rgb(0.95, 0.94, 0.91))
    return torch.where(seen, wall, ground)


def white_rug(view: View) -> Tensor:
    floor = planks(
        view, view.x / 0.45 + 9.0, view.z / 0.45, view.pick(2, (0.30, 0.19, 0.12), (0.42, 0.27, 0.16))
    )
    half_x, half_z = view.d(0, 1.35, 1.8), view.d(1, 1.15, 1.5)
    fringe = 0.10 * (view.noise(GRAINY, view.x * 1.6, view.z * 1.6, 3) - 0.5)
    edge = ((view.x / half_x).abs() ** 4 + (view.z / half_z).abs() ** 4 + 1e-6) ** 0.25 + fringe
    rug = ramp(edge, 1.02, 0.97)
    tufts = view.noise(GRAINY, view.x * 1.5, view.z * 1.5, 4) - view.noise(
        GRAINY, view.x * 1.5 + 0.05, view.z * 1.5, 4
    )
    clumps = view.noise(CLOUDY, view.x * 3.0, view.z * 3.0, 5)
    white = view.rgb(0.96, 0.94, 0.90) * (0.86 + 0.24 * clumps)
    ground = view.lit(
        mix(floor * (1.0 - 0.4 * ramp(edge, 1.10, 1.0)), white, rug), 0.5 * tufts * rug * view.fade(0.1)
    )
    colour = view.pick(6, (0.46, 0.55, 0.62), (0.62, 0.66, 0.60), (0.68, 0.60, 0.56))
    wall, seen = room_wall(view, view.d(3, 2.0, 3.0), colour, view.rgb(0.93, 0.93, 0.92))
    return torch.where(seen, wall, ground)


def kitchen(view: View) -> Tensor:
    specks = view.noise(GRAINY, view.x * 2.2, view.z * 2.2, 3)
    flecks = view.noise(CLOUDY, view.x * 5.0, view.z * 5.0, 4)
    stone = view.pick(2, (0.62, 0.53, 0.44), (0.50, 0.42, 0.36), (0.72, 0.66, 0.58))
    strength = view.fade(0.1)
    counter = stone * (1.0 + strength * (0.45 * ramp(specks, 0.70, 0.95) - 0.16 * ramp(flecks, 0.5, 0.9)))
    behind = view.d(0, 1.3, 1.9)
    seen, x, y = view.wall(behind)
    ground = view.lit(counter) + 0.06 * ramp(-view.z, 0.0, 1.6) * view.shadow
    wide, tall = view.d(1, 0.50, 0.62), view.d(4, 0.26, 0.34)
    row = (y / tall).floor()
    along = x / wide + 0.5 * (row - 2.0 * (row / 2.0).floor())
    cell = along.floor()
    du, dv = (along - cell - 0.5).abs() * wide, (y / tall - row - 0.5).abs() * tall
    edge = torch.minimum(0.5 * wide - du, 0.5 * tall - dv)
    tile = view.rgb(0.93, 0.95, 0.95) * (0.88 + 0.12 * view.chance(cell, row, 190))
    tile = tile * (1.0 + 0.08 * (along - cell - 0.5)) + 0.10 * ramp((y / tall - row - 0.8).abs(), 0.08, 0.0)
    strip = view.pick(3, (0.20, 0.46, 0.66), (0.16, 0.56, 0.54), (0.30, 0.40, 0.70))
    tile = mix(tile, strip * (0.8 + 0.4 * view.chance(cell, row, 191)), (row == 1.0).to(x.dtype))
    wall = mix(view.rgb(0.60, 0.61, 0.60), tile, ramp(edge, 0.008, 0.022))
    light = (view.sky * 1.05 + view.key * 0.50).t().reshape(3, -1, 1, 1) * (1.0 - 0.35 * ramp(y, 0.25, 0.0))
    return torch.where(seen, wall * light, ground)
