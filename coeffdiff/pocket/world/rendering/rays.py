"""Pixels and the directions in which their rays leave the camera."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coeffdiff.pocket.world.scene import FIELD_OF_VIEW


def pixel_grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """u to the right and v up, in -1..1 at pixel centres, each [size, size]."""
    at = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    return at.view(1, -1).expand(size, size), -at.view(-1, 1).expand(size, size)


def ray_directions(basis: Tensor, u: Tensor, v: Tensor) -> list[Tensor]:
    """Unit ray directions, three of u's shape [n, ...]; basis [n, 3, 3] or with u's trailing axes."""
    spread = math.tan(math.radians(FIELD_OF_VIEW / 2))
    across, upward = u * spread, v * spread
    length = torch.rsqrt(1.0 + across * across + upward * upward)
    return [(basis[0][k] * across + basis[1][k] * upward + basis[2][k]) * length for k in range(3)]


def spread_basis(basis: Tensor, axes: int) -> list[list[Tensor]]:
    """basis [n, 3, 3] as nested lists of [n, 1, ...] tensors for ray_directions."""
    shape = (-1,) + (1,) * axes
    return [[basis[:, i, k].reshape(shape) for k in range(3)] for i in range(3)]
