"""Patterns on a body: stripes, dots, checks, wood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import mix, ramp
from coeffdiff.pocket.world.rendering.batch import Batch
from coeffdiff.pocket.world.scene import PATTERNS


def paint_pattern(
    batch: Batch, s: Tensor, x: Tensor, y: Tensor, z: Tensor, normal: Tensor, pixel: Tensor, base: Tensor
) -> Tensor:
    """Colour [3, P] of body points: the base colour [3, P] with the scene's pattern on it."""
    out = base.clone()
    for index, pattern in enumerate(PATTERNS):
        if pattern in ("plain", "shiny"):
            continue
        i = (batch.pattern[s] == index).nonzero().squeeze(1)
        if not len(i):
            continue
        si, xi, yi, zi, px = s[i], x[i], y[i], z[i], pixel[i]
        width, tilt, phase = batch.knobs[si].unbind(1)
        own, other = base[:, i], batch.second[si].t()
        if pattern == "wooden":
            out[:, i] = _wood(own, xi, yi, zi, width, tilt, phase)
            continue
        u, v = _coordinates(batch, si, xi, yi, zi, normal[:, i])
        wrapped = batch.round[si] > 0.5
        if pattern == "striped":
            period = 0.20 + 0.14 * width
            lean = (tilt - 0.3) * 0.9
            level = yi + lean * torch.where(wrapped, torch.zeros_like(xi), 0.6 * xi + zi)
            around = torch.where(
                wrapped, u * torch.where(width > 0.5, 1.5, 2.0), (0.8 * xi + 0.6 * zi) / period
            )
            t = torch.where(tilt < 0.62, level / period, around) + phase
            weight = _wave(t, 0.46, px / period)
        else:
            # Whole numbers of cells around a wrapped object.
            # (twelve or ten, checks an even number), so that the pattern closes.
            cells = torch.where(width < 0.5, 2.0, 5.0 / 3.0)
            cell = torch.where(wrapped, 0.42 / cells, 0.19 + 0.08 * width)
            a = torch.where(wrapped, u * cells, u / cell) + phase
            b = v / cell + phase * 1.7
            if pattern == "dotted":
                row = b.floor()
                a = a + 0.5 * (row - 2.0 * (row / 2.0).floor()) * (~wrapped)
                da, db = a - a.floor() - 0.5, b - row - 0.5
                radius = 0.27 + 0.08 * tilt
                weight = ((radius - torch.sqrt(da * da + db * db)) * cell / px + 0.5).clamp(0.0, 1.0)
            else:
                soft = (px / cell).clamp(min=1e-3)
                wave_a = ((0.25 - ((a * 0.5) - (a * 0.5).floor() - 0.5).abs()) * 2.0 / soft).clamp(-0.5, 0.5)
                wave_b = ((0.25 - ((b * 0.5) - (b * 0.5).floor() - 0.5).abs()) * 2.0 / soft).clamp(-0.5, 0.5)
                weight = 0.5 + 2.0 * wave_a * wave_b
        out[:, i] = mix(own, other, weight)
    return out


def _wave(t: Tensor, share: Tensor | float, soft: Tensor) -> Tensor:
    """1 in the middle `share` of every unit period of t, 0 outside, edges `soft` wide."""
    off = (t - t.floor() - 0.5).abs()
    return ((0.5 * share - off) / soft + 0.5).clamp(0.0, 1.0)


def _coordinates(
    batch: Batch, s: Tensor, x: Tensor, y: Tensor, z: Tensor, normal: Tensor
) -> tuple[Tensor, Tensor]:
    """Where a pattern lies on the surface, in object units: wrapped around, or by the nearest axis."""
    n = normal.abs()
    side = (n[0] > n[1]) & (n[0] > n[2])
    flat = (n[1] >= n[0]) & (n[1] > n[2])
    u = torch.where(side, z, x)
    v = torch.where(flat, z, y)
    wrapped = batch.round[s] > 0.5
    # Six periods' worth of circumference, so that patterns meet themselves behind the object.
    angle = torch.atan2(x, z) * (6.0 / (2.0 * math.pi))
    level = y + 0.55 * torch.where(flat & wrapped, torch.sqrt(x * x + z * z), torch.zeros_like(x))
    return torch.where(wrapped, angle, u), torch.where(wrapped, level, v)


def _wood(own: Tensor, x: Tensor, y: Tensor, z: Tensor, width: Tensor, tilt: Tensor, phase: Tensor) -> Tensor:
    """Growth rings about a leaning trunk off to one side, stained in the object's colour.

    Wide and dark enough to be seen in a small picture, and through a codec with one latent for 8 x 8 pixels.
    """
    lean = 0.5 * (tilt - 0.5)
    sway = 0.09 * torch.sin(y * 3.7 + phase * 40.0) + 0.05 * torch.sin(y * 7.9 + x * 4.3 + phase * 90.0)
    away = torch.sqrt((x + 0.55 + lean * y + sway) ** 2 + (z - 0.35 - 0.4 * phase + sway) ** 2)
    ring = away * (4.4 + 1.6 * (1.0 - width)) + phase * 3.0
    saw = ring - ring.floor()
    late = ramp(saw, 0.30, 0.74) * ramp(saw, 1.0, 0.95)  # late wood darkens slowly, early wood starts at once
    fibre = torch.sin(away * 150.0 + torch.sin(y * 2.3) * 3.0) * torch.sin(x * 83.0 - z * 71.0 + y * 4.0)
    # Brown on what is light, bare wood on what is dark.
    brown = torch.tensor([[0.085], [0.035], [0.012]], device=x.device)
    bare = torch.tensor([[0.36], [0.20], [0.08]], device=x.device)
    grain = mix(brown, bare, ramp(own.mean(0), 0.16, 0.04))
    return mix(own * (1.05 + 0.10 * fibre), grain, 0.82 * late)
