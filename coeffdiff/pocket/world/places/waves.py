"""Water, on which things float."""

from __future__ import annotations

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import mix, ramp
from coeffdiff.pocket.world.places.blocks import gradient_sky
from coeffdiff.pocket.world.places.noise import GRAINY
from coeffdiff.pocket.world.places.view import View


def water_slopes(x: Tensor, z: Tensor, phase: Tensor, calm: Tensor) -> tuple[Tensor, Tensor]:
    """How the water's surface leans along x and z; the mirror and the water itself must agree on it."""
    lean_x = torch.zeros_like(x)
    lean_z = torch.zeros_like(x)
    waves = ((2.1, 3.4, 0.045), (-3.7, 5.2, 0.032), (6.9, 4.1, 0.020), (1.3, -8.7, 0.018))
    for index, (kx, kz, height) in enumerate(waves):
        wave = torch.cos(kx * x + kz * z + phase * (5.0 + 3.0 * index)) * height * calm
        lean_x = lean_x + wave * (kx / 4.0)
        lean_z = lean_z + wave * (kz / 4.0)
    return lean_x, lean_z


def water_state(detail: Tensor) -> tuple[Tensor, Tensor]:
    """Phase and calmness of the waves from the scene's details [..., DETAILS]."""
    return detail[..., 1], 0.7 + 0.9 * detail[..., 2]


def water(view: View) -> Tensor:
    low, high = view.rgb(0.80, 0.90, 0.95), view.pick(0, (0.26, 0.54, 0.86), (0.50, 0.70, 0.88))
    sky = gradient_sky(view, low, high, 0.25)
    phase, calm = water_state(view.detail)
    far = view.fade(0.8)
    lean_x, lean_z = water_slopes(view.x, view.z, phase.view(-1, 1, 1), calm.view(-1, 1, 1))
    facing = (-view.dy + 1.6 * far * (lean_z + 0.4 * lean_x)).clamp(0.02, 1.0)
    fresnel = 0.04 + 0.90 * (1.0 - facing) ** 3
    deep = view.pick(3, (0.03, 0.30, 0.46), (0.05, 0.40, 0.47), (0.04, 0.24, 0.42))
    body = deep * (0.9 + 2.6 * far * (lean_x + lean_z)).clamp(0.3, 1.9) * (0.45 + 0.55 * view.shadow)
    if view.mirror is not None:
        cover = view.mirror[:, 3]
        image = view.mirror[:, :3].transpose(0, 1)
        body = body * (1.0 - 0.45 * cover) + image * 0.50
        fresnel = fresnel * (1.0 - 0.8 * cover)
    water = mix(body, mix(low, high, 0.35 * facing), fresnel)
    glint = ramp(lean_x * 1.3 + lean_z, 0.085, 0.13) * far * view.shadow
    water = water + glint * 0.35
    foam = view.noise(GRAINY, view.x * 2.2, view.z * 2.2, 4)
    water = mix(
        water, view.rgb(0.93, 0.97, 0.98), (view.near * ramp(foam + view.near, 0.75, 1.2)).clamp(0.0, 0.85)
    )
    return view.over(sky, water)
