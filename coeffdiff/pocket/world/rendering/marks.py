"""Marks on a body, painted or carved: how much of each point one covers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import ramp
from coeffdiff.pocket.world.scene import MARK_SHAPES


def mark_weight(
    mark: Tensor, x: Tensor, y: Tensor, z: Tensor, normal: Tensor | None, pixel: Tensor
) -> Tensor:
    """Cover [P] of marks [P, 16] at points; normal [3, P] keeps stamps off the far side."""
    kind = mark[:, 0]
    rx, ry, rz = x - mark[:, 1], y - mark[:, 2], z - mark[:, 3]
    sx, sy, fx, fy, fz, turn = (mark[:, k] for k in range(4, 10))
    ax, az = mark[:, 14], mark[:, 15]  # the mark's horizontal axis
    # up = facing x horizontal
    ux, uy, uz = fy * az, fz * ax - fx * az, -fy * ax
    flat_a, flat_b = rx * ax + rz * az, rx * ux + ry * uy + rz * uz
    cos, sin = torch.cos(turn), torch.sin(turn)
    a, b = (flat_a * cos + flat_b * sin) / sx, (flat_b * cos - flat_a * sin) / sy
    out = rx * fx + ry * fy + rz * fz
    soft = (1.2 * pixel / torch.minimum(sx, sy)).clamp(min=1e-3)
    around = torch.atan2(x, z)
    cover = torch.zeros_like(x)
    for index, shape in enumerate(MARK_SHAPES):
        i = (kind == index).nonzero().squeeze(1)
        if not len(i):
            continue
        inside = _MARKS[shape](a[i], b[i], out[i], around[i], y[i] - mark[i, 2], sx[i], sy[i])
        weight = (inside / soft[i] + 0.5).clamp(0.0, 1.0)
        if shape not in ("band", "zigzag", "spiral", "half"):
            weight = weight * ramp(out[i].abs(), 0.34, 0.28)
            if normal is not None:
                towards = normal[0, i] * fx[i] + normal[1, i] * fy[i] + normal[2, i] * fz[i]
                weight = weight * ramp(towards, 0.05, 0.20)
        cover[i] = weight
    return cover


def _star(a: Tensor, b: Tensor) -> Tensor:
    turns = torch.atan2(a, b) * (5.0 / (2.0 * math.pi))
    off = (turns - turns.round()).abs() * 2.0
    return (1.0 - 0.56 * off - torch.sqrt(a * a + b * b)) * 0.8


def _heart(a: Tensor, b: Tensor) -> Tensor:
    lift = b + 0.12 - 0.62 * a.abs().clamp(max=1.2) ** 0.85
    return 0.86 - torch.sqrt(a * a + lift * lift)


def _off_whole(t: Tensor) -> Tensor:
    return (t - t.round()).abs()


def _tri(t: Tensor) -> Tensor:
    return (t - t.floor() - 0.5).abs() * 4.0 - 1.0


# a, b: the mark's own coordinates in units of its size; out: along its facing; around, up: about the y axis.
_MARKS: dict[str, Callable[..., Tensor]] = {
    "disc": lambda a, b, out, around, up, sx, sy: 1.0 - torch.sqrt(a * a + b * b),
    "star": lambda a, b, out, around, up, sx, sy: _star(a, b),
    "heart": lambda a, b, out, around, up, sx, sy: _heart(a, b),
    "ring": lambda a, b, out, around, up, sx, sy: 0.2 - (torch.sqrt(a * a + b * b) - 0.8).abs(),
    "bar": lambda a, b, out, around, up, sx, sy: 1.0 - torch.maximum(a.abs(), b.abs()),
    "smile": lambda a, b, out, around, up, sx, sy: torch.minimum(
        0.15 - (torch.sqrt(a * a + b * b) - 0.85).abs(), -0.25 - b
    ),
    "bolt": lambda a, b, out, around, up, sx, sy: torch.minimum(
        0.30 - (a + 0.42 * b - 0.85 * (b > 0.0) * 1.0 + 0.42).abs(), 1.0 - b.abs()
    ),
    "band": lambda a, b, out, around, up, sx, sy: 1.0 - up.abs() / sy,
    "zigzag": lambda a, b, out, around, up, sx, sy: (
        0.32 - (up / sy - 0.68 * _tri(around * (4.5 / math.pi))).abs()
    ),
    "spiral": lambda a, b, out, around, up, sx, sy: (
        0.5 * sy / sx - _off_whole(up / sx + around / (2 * math.pi))
    ),
    "half": lambda a, b, out, around, up, sx, sy: out / sx,
}
