"""Grass with sunflowers, and a tree in autumn."""

from __future__ import annotations

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import mix, ramp
from coeffdiff.pocket.world.places.blocks import gradient_sky, grass, leaves
from coeffdiff.pocket.world.places.noise import CLOUDY, GRAINY, SMOOTH
from coeffdiff.pocket.world.places.view import View


def sunflowers(view: View) -> Tensor:
    sky = gradient_sky(
        view, view.rgb(0.80, 0.91, 0.97), view.pick(0, (0.30, 0.60, 0.92), (0.48, 0.73, 0.95)), 0.25
    )
    hedge = 0.05 + 0.06 * view.noise(CLOUDY, view.bearing * 6.0, torch.zeros_like(view.rise), 2)
    leaf = view.noise(GRAINY, view.bearing * 9.0, view.rise * 9.0, 5)
    leafy = mix(view.rgb(0.12, 0.30, 0.10), view.rgb(0.30, 0.50, 0.18), leaf)
    back = mix(sky, leafy, ramp(hedge - view.rise, -0.003, 0.003))
    picture = view.over(back, view.lit(grass(view, view.rgb(0.45, 0.68, 0.18), view.rgb(0.14, 0.36, 0.08))))
    # From the far ones to the near ones; those beside the object stand clear of it.
    for index in range(11):
        j = torch.full((len(view.eye), 1, 1), float(index), device=view.dx.device)
        pick = [view.chance(j, salt, 110) for salt in range(5)]
        far = 1.0 - index / 10.0
        sign = 1.0 if index % 2 else -1.0
        x = sign * (0.35 + 1.1 * pick[0] + (0.55 * far if index < 8 else 0.75))
        z = -0.75 - 2.2 * far + 0.3 * (pick[1] - 0.5) if index < 8 else 0.15 * index - 1.3 + 0.3 * pick[1]
        tall, size = 0.75 + 0.75 * pick[2], 0.24 + 0.10 * pick[3]
        if index >= 8:
            tall = 0.30 + 0.45 * pick[2]
        z = z if isinstance(z, Tensor) else torch.full_like(x, z)
        hx, hy, depth = view.project(x, tall, z)
        _, gy, _ = view.project(x, torch.zeros_like(tall), z)
        bend = 0.05 * (pick[4] - 0.5)
        stalk_u = view.u - hx - bend * (hy - view.v)
        stalk = ramp(stalk_u.abs(), 0.034 / depth, 0.022 / depth) * (view.v < hy) * (view.v > gy)
        side = stalk_u * depth / 0.16
        level = (view.v - gy - 0.42 * (hy - gy)) * depth / 0.16
        frond = ramp((side.abs() - 1.0) ** 2 + ((level - 0.5 * side.abs()) * 2.4) ** 2, 1.0, 0.8)
        picture = mix(picture, view.rgb(0.24, 0.48, 0.14), torch.maximum(stalk, frond))
        du, dv = (view.u - hx) * depth / size, (view.v - hy) * depth / size
        radius = torch.sqrt(du * du + dv * dv)
        petals = 0.80 + 0.20 * torch.cos(torch.atan2(dv, du) * 13.0 + pick[4] * 6.0)
        yellow = mix(view.rgb(0.93, 0.62, 0.04), view.rgb(1.0, 0.84, 0.12), ramp(radius, 0.4, 0.9))
        picture = mix(picture, yellow, ramp(radius - petals, 0.03, -0.05))
        seeds = view.rgb(0.32, 0.18, 0.07) * (0.7 + 0.6 * ramp(radius, 0.30, 0.1))
        picture = mix(picture, seeds, ramp(radius, 0.46, 0.40))
    return picture


def autumn(view: View) -> Tensor:
    sky = gradient_sky(
        view, view.rgb(0.90, 0.90, 0.86), view.pick(0, (0.58, 0.74, 0.88), (0.80, 0.84, 0.86)), 0.2
    )
    hedge = 0.07 + 0.09 * view.noise(CLOUDY, view.bearing * 5.0, torch.zeros_like(view.rise), 2)
    tone = view.noise(GRAINY, view.bearing * 8.0, view.rise * 8.0, 5)
    woods = mix(view.rgb(0.56, 0.34, 0.12), view.rgb(0.80, 0.58, 0.20), tone)
    back = mix(sky, woods, ramp(hedge - view.rise, -0.004, 0.004))
    _, x, y = view.wall(view.d(1, 2.2, 3.0))
    centre = view.d(3, -1.1, 1.1)
    lean = x - centre - 0.10 * torch.sin(y * 1.1 + view.d(4) * 6.0)
    thick = 0.20 + 0.22 * torch.exp(-(y.clamp(min=0.0)) * 2.2)
    bark = view.rgb(0.33, 0.23, 0.16) * (0.55 + 0.75 * view.noise(GRAINY, x * 2.4, y * 0.4, 6))
    bark = bark * (1.0 - 0.5 * (lean / 0.3).clamp(-1.0, 1.0))
    trunk = ramp(lean.abs() - thick, 0.02, -0.02) * (y > -0.05)
    branch = ramp((y - 1.35 - lean.abs() * 0.7).abs(), 0.085, 0.06) * (lean.abs() < 1.8)
    back = mix(back, bark, torch.maximum(trunk, branch) * (y > -0.05))
    crown = ramp(y + 0.55 * view.noise(SMOOTH, x * 1.1, y * 1.1, 4) - 0.12 * (x - centre).abs(), 1.45, 1.75)
    for layer, scale in enumerate((3.4, 2.7, 2.1)):
        mask, tone = leaves(view, x * scale + 0.31 * layer, y * scale, 130 + 10 * layer, 0.62)
        leaf = mix(view.rgb(0.72, 0.20, 0.06), view.rgb(0.98, 0.70, 0.12), tone) * (0.7 + 0.2 * layer)
        back = mix(back, leaf, mask * crown)
    ground = grass(view, view.rgb(0.52, 0.56, 0.22), view.rgb(0.26, 0.32, 0.12))
    for layer, scale in enumerate((3.6, 2.9, 2.3)):
        mask, tone = leaves(view, view.x * scale + 0.4 * layer, view.z * scale, 160 + 10 * layer, 0.62)
        leaf = mix(view.rgb(0.70, 0.18, 0.05), view.rgb(0.97, 0.66, 0.10), tone)
        ground = mix(ground, leaf, mask * (0.35 + 0.65 * view.fade(0.25)))
    # The foot of the trunk stands in front of the far lawn.
    foot = trunk * (y > 0.0) * view.ground
    return mix(view.over(back, view.lit(ground)), bark * 0.9, foot)
