"""A cobblestone street, a city, and the night."""

from __future__ import annotations

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import mix, ramp
from coeffdiff.pocket.world.places.blocks import gradient_sky
from coeffdiff.pocket.world.places.noise import CLOUDY, GRAINY, SMOOTH
from coeffdiff.pocket.world.places.view import View


def cobblestones(view: View) -> Tensor:
    size = view.d(0, 0.26, 0.36)
    row_at = view.z / size
    row = row_at.floor()
    along = view.x / (size * 1.25) + 0.5 * (row - 2.0 * (row / 2.0).floor()) + 0.25 * view.chance(row, 3, 81)
    cell = along.floor()
    du, dv = (along - cell - 0.5) * 2.0, (row_at - row - 0.5) * 2.0
    # A superellipse with uneven sides: stones worn round.
    wobble = 0.14 * (view.noise(SMOOTH, view.x * 6.0, view.z * 6.0, 1) - 0.5)
    worn = (du.abs() ** 3.0 + dv.abs() ** 3.0 + 1e-6) ** (1.0 / 3.0) + wobble
    stone = ramp(worn, 0.94, 0.78)
    tone = 0.60 + 0.62 * view.chance(cell, row, 82)
    rough = (view.noise(GRAINY, view.x * 3.0, view.z * 3.0, 3) - 0.5) * view.fade(0.06)
    warm = view.chance(cell, row, 83)
    colour = mix(view.rgb(0.55, 0.55, 0.57), view.rgb(0.60, 0.53, 0.46), warm) * tone * (1.0 + 0.3 * rough)
    strength = view.fade(0.5)
    albedo = mix(view.rgb(0.20, 0.18, 0.16), colour, 1.0 - strength * (1.0 - stone))
    sun = view.sun.view(-1, 3, 1, 1)
    slope = 0.45 * strength * stone * (du**3 * sun[:, 0] + dv**3 * sun[:, 2])
    ground = view.lit(albedo, slope)
    seen, x, y = view.wall(view.d(1, 3.0, 4.5))
    plaster = view.pick(2, (0.80, 0.66, 0.48), (0.72, 0.48, 0.38), (0.70, 0.70, 0.66))
    wall = plaster * (0.85 + 0.25 * view.noise(CLOUDY, x * 1.2, y * 1.2, 4))
    wide, tall = x / 1.3 + view.d(3) * 3.0, (y - 0.55) / 1.6
    wx, wy = (wide - wide.floor() - 0.5).abs(), (tall - tall.floor() - 0.45).abs()
    frame = ramp(torch.maximum(wx / 0.27, wy / 0.35), 1.0, 0.96) * (y > 0.55)
    pane = ramp(torch.maximum(wx / 0.22, wy / 0.31), 1.0, 0.95) * (y > 0.55)
    wall = mix(mix(wall, view.rgb(0.88, 0.86, 0.80), frame), view.rgb(0.20, 0.25, 0.31), pane)
    wall = mix(wall, view.rgb(0.42, 0.40, 0.38), ramp(y, 0.36, 0.34))
    light = (view.sky * 1.1 + view.key * 0.4).t().reshape(3, -1, 1, 1)
    return torch.where(seen, wall * light, ground)


def city(view: View) -> Tensor:
    back = gradient_sky(
        view, view.pick(0, (0.97, 0.84, 0.70), (0.86, 0.90, 0.94)), view.rgb(0.50, 0.68, 0.88), 0.15
    )
    for layer, (count, tall, haze) in enumerate(((9.0, 0.21, 0.5), (6.0, 0.17, 0.10))):
        along = view.bearing * count + view.d(1) * 11.0 + layer * 3.7
        cell = along.floor()
        height = tall * (0.30 + 0.80 * view.chance(cell, layer, 101))
        inside = ramp(height - view.rise, -0.002, 0.002)
        tone = view.chance(cell, layer, 102)
        front = mix(view.rgb(0.42, 0.47, 0.56), view.rgb(0.70, 0.60, 0.54), tone)
        u, v = (along - cell) * (3.0 + 1.0 * (tone > 0.5)), view.rise * (42.0 if layer else 60.0)
        i, j = u.floor(), v.floor()
        window = ramp((u - i - 0.5).abs(), 0.34, 0.26) * ramp((v - j - 0.5).abs(), 0.32, 0.24)
        home = (view.chance(i + cell * 7.0, j, 103) < 0.3).to(u.dtype)
        glass = mix(view.rgb(0.16, 0.21, 0.30), view.rgb(0.98, 0.88, 0.55), home)
        side = ramp((along - cell - 0.5).abs(), 0.49, 0.46)
        front = mix(front, glass, window * side * 0.85) * (0.72 + 0.28 * side)
        back = mix(back, mix(front, view.rgb(0.80, 0.81, 0.84), torch.full_like(u, haze)), inside)
    slab = view.d(2, 0.8, 1.2)
    x, z = view.x / slab, view.z / slab
    joint = torch.minimum((x - x.round()).abs(), (z - z.round()).abs())
    tone = 0.92 + 0.16 * view.chance(x.round(), z.round(), 104)
    specks = (view.noise(GRAINY, view.x * 3.0, view.z * 3.0, 3) - 0.5) * view.fade(0.06)
    groove = 1.0 - 0.45 * ramp(joint, 0.03, 0.01) * view.fade(0.2)
    paving = view.rgb(0.60, 0.60, 0.61) * (1.0 + 0.35 * specks) * tone * groove
    return view.over(back, mix(view.lit(paving), view.rgb(0.62, 0.63, 0.66), ramp(view.t, 10.0, 50.0) * 0.6))


def night(view: View) -> Tensor:
    height = view.rise.clamp(0.0, 0.5) / 0.5
    back = mix(view.rgb(0.11, 0.14, 0.30), view.rgb(0.02, 0.03, 0.10), height)
    x, y = view.bearing * 22.0, view.rise * 22.0
    i, j = x.floor(), y.floor()
    du = x - i - 0.5 - 0.5 * (view.chance(i, j, 120) - 0.5)
    dv = y - j - 0.5 - 0.5 * (view.chance(i, j, 121) - 0.5)
    star = ramp(torch.sqrt(du * du + dv * dv), 0.13, 0.05) * (view.chance(i, j, 122) < 0.42)
    back = mix(back, view.rgb(0.97, 0.97, 0.90), star * (0.4 + 0.6 * view.chance(i, j, 123)))
    moon_x, moon_y = view.d(0, -0.26, 0.26), view.d(1, 0.10, 0.16)
    moon = torch.sqrt((view.bearing - moon_x) ** 2 + (view.rise - moon_y) ** 2)
    back = back + view.rgb(0.45, 0.47, 0.60) * torch.exp(-moon * 16.0) * 0.6
    craters = 0.85 + 0.25 * view.noise(CLOUDY, view.bearing * 40.0, view.rise * 40.0, 3)
    back = mix(back, view.rgb(0.96, 0.94, 0.82) * craters, ramp(moon, 0.040, 0.036))
    hills = 0.03 + 0.06 * view.noise(SMOOTH, view.bearing * 5.0, torch.zeros_like(view.rise), 2)
    back = mix(back, view.rgb(0.04, 0.05, 0.10), ramp(hills - view.rise, -0.003, 0.003))
    cell = (view.bearing * 16.0).floor()
    lit = torch.sqrt((view.bearing * 16.0 - cell - 0.5) ** 2 + ((view.rise - hills * 0.4) * 16.0) ** 2)
    back = mix(back, view.rgb(1.0, 0.80, 0.42), ramp(lit, 0.16, 0.06) * (view.chance(cell, 5, 124) < 0.5))
    specks = (view.noise(GRAINY, view.x * 2.5, view.z * 2.5, 3) - 0.5) * view.fade(0.07)
    soil = (
        view.rgb(0.40, 0.41, 0.46)
        * (1.0 + 0.4 * specks)
        * (0.8 + 0.4 * view.noise(CLOUDY, view.x, view.z, 4))
    )
    pool = torch.exp(-(view.x**2 + view.z**2) / view.d(5, 1.6, 2.6))
    n = len(view.eye)
    lamp = view.key.t().reshape(3, n, 1, 1) * view.sun[:, 1].view(n, 1, 1) * view.shadow * pool
    ground = soil * (lamp + view.sky.t().reshape(3, n, 1, 1) * view.ao * 0.55)
    return view.over(back, ground)
