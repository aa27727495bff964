"""Noise and random numbers for painters, from tables that are the same on every machine."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.utils.seeding import generator_for

PERIOD = 16.0  # noise repeats after this many units
_TEXELS = 256
SMOOTH, CLOUDY, GRAINY = range(3)


@functools.lru_cache(maxsize=8)
def noise_tables(device: str) -> tuple[Tensor, Tensor]:
    """Tileable noise [3, 257, 257], uniform in 0..1 (SMOOTH, CLOUDY, GRAINY), and 4096 random numbers.

    Tables instead of hashing at every pixel: one bilinear lookup costs a fifth of one octave, and integer
    lookups agree between devices where sin-based hashes do not.
    """
    generator = generator_for("pocket", "noise")

    def octave(cells: int) -> Tensor:
        lattice = torch.rand(cells, cells, generator=generator)
        padded = torch.cat([lattice[-2:], lattice, lattice[:2]])
        padded = torch.cat([padded[:, -2:], padded, padded[:, :2]], dim=1)
        step = _TEXELS // cells
        big = F.interpolate(padded[None, None], scale_factor=step, mode="bicubic", align_corners=False)[0, 0]
        return big[2 * step : -2 * step, 2 * step : -2 * step]

    smooth = octave(16)
    cloudy = sum(octave(8 * 2**k) * 0.55**k for k in range(5))
    grainy = octave(128) + 0.8 * torch.rand(_TEXELS, _TEXELS, generator=generator)
    layers = []
    for layer in (smooth, cloudy, grainy):
        # By rank, so that a threshold t covers exactly the share t of the plane.
        uniform = torch.empty(_TEXELS * _TEXELS)
        uniform[layer.flatten().argsort(stable=True)] = torch.linspace(0.0, 1.0, _TEXELS * _TEXELS)
        layers.append(F.pad(uniform.view(1, 1, _TEXELS, _TEXELS), (0, 1, 0, 1), mode="circular")[0, 0])
    return torch.stack(layers).to(device), torch.rand(4096, generator=generator).to(device)
