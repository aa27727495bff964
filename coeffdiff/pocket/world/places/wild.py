"""Snow, beach, jungle and mountains."""

from __future__ import annotations

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import mix, ramp
from coeffdiff.pocket.world.places.blocks import gradient_sky, leaves
from coeffdiff.pocket.world.places.noise import CLOUDY, GRAINY, SMOOTH
from coeffdiff.pocket.world.places.view import View


def snow(view: View) -> Tensor:
    drift = view.noise(CLOUDY, view.x * 0.9, view.z * 0.9, 1)
    lee = view.noise(CLOUDY, view.x * 0.9 - 0.16, view.z * 0.9 + 0.10, 1)
    sparkle = (view.noise(GRAINY, view.x * 3.0, view.z * 3.0, 3) - 0.5) * view.fade(0.06)
    white = view.rgb(0.93, 0.95, 0.99) * (1.0 + 0.10 * sparkle)
    ground = view.lit(white, 0.9 * (drift - lee))
    sky = gradient_sky(
        view, view.rgb(0.86, 0.89, 0.93), view.pick(0, (0.66, 0.74, 0.84), (0.80, 0.83, 0.87)), 0.0
    )
    back = sky
    for layer, (count, tall, tone) in enumerate(((15.0, 0.15, 0.55), (9.0, 0.24, 0.0))):
        along = view.bearing * count + view.d(3) * 9.0 + layer * 5.3
        cell = along.floor()
        height = tall * (0.55 + 0.75 * view.chance(cell, layer, 11))
        # Saw-toothed sides make firs of the triangles.
        steps = 0.16 * ((view.rise / height * 5.0) - (view.rise / height * 5.0).floor())
        side = (along - cell - 0.5).abs() * 2.0
        inside = ramp(height * (1.0 - side / (0.85 + steps)) - view.rise, -0.004, 0.004)
        dust = ramp(view.noise(GRAINY, view.bearing * 14.0, view.rise * 14.0, 2), 0.55, 0.75)
        fir = mix(view.rgb(0.16, 0.27, 0.26), view.rgb(0.90, 0.93, 0.97), 0.65 * dust)
        back = mix(back, mix(fir, view.rgb(0.78, 0.83, 0.88), torch.full_like(dust, tone)), inside)
    haze = ramp(view.t, 6.0, 30.0)
    return view.over(back, mix(ground, view.rgb(0.88, 0.91, 0.95), haze))


def snow_flakes(view: View) -> tuple[Tensor, Tensor]:
    cover = torch.zeros_like(view.dx)
    for layer, (cells, radius) in enumerate(((7.0, 0.075), (12.0, 0.10), (20.0, 0.13))):
        x = view.u * cells * 0.5 + view.d(layer) * 31.0 + view.v * 0.8
        y = view.v * cells * 0.5 + view.d(layer + 1) * 17.0
        i, j = x.floor(), y.floor()
        du = x - i - 0.5 - 0.5 * (view.chance(i, j, 20 + layer) - 0.5)
        dv = y - j - 0.5 - 0.5 * (view.chance(i, j, 30 + layer) - 0.5)
        size = radius * (0.5 + 0.8 * view.chance(i, j, 40 + layer))
        falls = (view.chance(i, j, 50 + layer) < 0.33).to(x.dtype)
        cover = torch.maximum(cover, falls * ramp(torch.sqrt(du * du + dv * dv), size, size * 0.55))
    return view.rgb(0.99, 0.99, 1.0), cover * 0.92


def beach(view: View) -> Tensor:
    ripple = view.noise(CLOUDY, view.x * 1.1, view.z * 3.2, 1)
    lee = view.noise(CLOUDY, view.x * 1.1 - 0.1, view.z * 3.2 + 0.2, 1)
    specks = (view.noise(GRAINY, view.x * 4.0, view.z * 4.0, 3) - 0.5) * view.fade(0.05)
    sand = view.pick(2, (0.89, 0.79, 0.60), (0.93, 0.85, 0.70)) * (1.0 + 0.30 * specks)
    ground = view.lit(sand, 0.7 * view.fade(0.3) * (ripple - lee))
    shore = view.d(0, 1.5, 3.0) + 0.5 * (view.noise(SMOOTH, view.x * 0.5, view.x * 0.0, 5) - 0.5)
    out = -view.z - shore
    wet = ramp(out, -0.6, 0.0)
    ground = ground * (1.0 - 0.38 * wet)
    swell = view.noise(CLOUDY, view.x * 0.5, view.z * 2.0, 4)
    sea = mix(view.rgb(0.35, 0.78, 0.76), view.rgb(0.05, 0.36, 0.62), ramp(out, 0.0, 9.0))
    sea = sea * (0.85 + 0.35 * swell)
    crest = ramp(swell, 0.80, 0.92) * ramp(out, 12.0, 1.0)
    sea = mix(sea, view.rgb(0.97, 0.99, 0.99), crest * 0.8)
    foam = ramp((out - 0.12).abs() + 0.25 * (swell - 0.5), 0.22, 0.08)
    ground = mix(mix(ground, sea, ramp(out, 0.0, 0.06)), view.rgb(0.98, 0.99, 0.98), foam)
    sky = gradient_sky(
        view, view.rgb(0.74, 0.89, 0.97), view.pick(6, (0.20, 0.52, 0.88), (0.35, 0.66, 0.93)), 0.32
    )
    return view.over(sky, ground)


def jungle(view: View) -> Tensor:
    litter, tone = leaves(view, view.x * 3.4, view.z * 3.4, 60, 0.5)
    moss = view.noise(CLOUDY, view.x * 1.6, view.z * 1.6, 1)
    soil = mix(view.rgb(0.22, 0.17, 0.10), view.rgb(0.20, 0.33, 0.11), moss)
    soil = mix(
        soil,
        mix(view.rgb(0.13, 0.32, 0.09), view.rgb(0.45, 0.52, 0.16), tone),
        litter * view.fade(0.2) * 0.85,
    )
    dapple = 0.55 + 0.9 * view.noise(SMOOTH, view.x * 1.3, view.z * 1.3, 2)
    ground = view.lit(soil * dapple)
    behind = view.d(0, 1.7, 2.6)
    seen, x, y = view.wall(behind)
    depth = view.noise(CLOUDY, x * 1.2, y * 1.2, 3)
    back = mix(view.rgb(0.02, 0.07, 0.03), view.rgb(0.10, 0.25, 0.08), depth)
    glow = ramp(y, 1.2, 3.2) * 0.35
    back = mix(back, view.rgb(0.62, 0.80, 0.40), glow * depth)
    trunk_x = x * 0.62 + view.d(1) * 5.0 + 0.12 * torch.sin(y * 1.3 + view.d(2) * 6.0)
    trunk = ramp((trunk_x - trunk_x.floor() - 0.5).abs(), 0.10, 0.085)
    bark = view.rgb(0.30, 0.22, 0.13) * (0.5 + 0.8 * view.noise(GRAINY, x * 2.0, y * 0.35, 4))
    back = mix(back, bark, trunk * (view.chance(trunk_x.floor(), 1, 61) < 0.6))
    for layer, (scale, bright, share) in enumerate(((2.6, 0.35, 0.8), (1.9, 0.6, 0.7), (1.25, 1.0, 0.55))):
        mask, tone = leaves(
            view, x * scale + layer * 0.37, y * scale + view.d(4) * 3.0, 70 + 10 * layer, 0.42
        )
        kept = view.chance(
            (x * scale + layer * 0.37).floor(), (y * scale + view.d(4) * 3.0).floor(), 76 + 10 * layer
        )
        leaf = mix(view.rgb(0.06, 0.26, 0.07), view.rgb(0.46, 0.72, 0.20), tone) * bright
        back = mix(back, leaf, mask * (kept < share))
    return torch.where(seen, back, ground)


def mountain(view: View) -> Tensor:
    sky = gradient_sky(
        view, view.rgb(0.80, 0.89, 0.96), view.pick(0, (0.24, 0.50, 0.84), (0.45, 0.66, 0.90)), 0.22
    )
    back = sky
    flat = torch.zeros_like(view.rise)
    # A few big tents of different height, roughened by noise: peaks, not hills.
    along = view.bearing * 3.4 + view.d(1) * 7.0
    cell = along.floor()
    peak = torch.zeros_like(along)
    for step in (-1.0, 0.0, 1.0):
        at = cell + step
        top = 0.13 + 0.10 * view.chance(at, 0, 91)
        middle = at + 0.3 + 0.4 * view.chance(at, 1, 92)
        peak = torch.maximum(peak, top * (1.0 - (along - middle).abs() * 0.90))
    rough = view.noise(CLOUDY, view.bearing * 9.0, flat, 2) - 0.5
    ridge = peak + 0.035 * rough
    # Crags run down the slopes: the noise is sheared towards the foot of each mountain.
    run = view.bearing * 16.0 + view.rise * 14.0
    crags = view.noise(CLOUDY, run, view.rise * 16.0, 3)
    lee = view.noise(CLOUDY, run + 0.4, view.rise * 16.0 - 0.1, 3)
    snow_line = peak * 0.55 + view.d(4, -0.02, 0.03) + 0.05 * (crags - 0.5)
    rock = view.rgb(0.42, 0.44, 0.52) * (0.85 + 1.3 * (crags - lee)).clamp(0.35, 1.5)
    white = view.rgb(0.95, 0.96, 0.99) * (0.88 + 0.9 * (crags - lee)).clamp(0.5, 1.05)
    stone = mix(rock, white, ramp(view.rise, snow_line - 0.006, snow_line + 0.006))
    back = mix(back, stone, ramp(ridge - view.rise, -0.003, 0.003))
    hills = 0.015 + 0.035 * view.noise(SMOOTH, view.bearing * 6.0, flat, 5)
    forest = view.rgb(0.22, 0.36, 0.27) * (
        0.7 + 0.6 * view.noise(GRAINY, view.bearing * 12.0, view.rise * 12.0, 4)
    )
    back = mix(back, forest, ramp(hills - view.rise, -0.003, 0.003))
    pebbles = view.noise(GRAINY, view.x * 1.5, view.z * 1.5, 3)
    turf = view.noise(CLOUDY, view.x * 0.8, view.z * 0.8, 4)
    soil = mix(view.rgb(0.52, 0.50, 0.46), view.rgb(0.46, 0.52, 0.30), ramp(turf, 0.3, 0.7))
    ground = view.lit(soil * (1.0 + 0.5 * view.fade(0.12) * (pebbles - 0.5)))
    return view.over(back, mix(ground, view.rgb(0.50, 0.60, 0.52), ramp(view.t, 8.0, 40.0) * 0.7))
