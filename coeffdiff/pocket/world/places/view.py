"""The view that a painter of a place gets: for every pixel its ray, where it meets the ground, and the light there.

World space: the object stands near the origin on the ground y = 0, the camera is on the +z side, the backdrop
is towards -z, an object is about 2 across. Colours are linear light, [3, n, h, w].

Shape letters: n scenes of one place, h x w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.pocket.world.maths import linear
from coeffdiff.pocket.world.places.noise import PERIOD, noise_tables

DETAILS = 8
"""How many free numbers in [0, 1) a scene gives its place: plank width, horizon, where the clouds are..."""


@dataclass
class View:
    """n pictures of one place before the object is put in.

    dx, dy, dz: [n, h, w] unit ray directions.  u, v: [h, w] pixel coordinates in -1..1, v up.
    eye: [n, 3].  basis: [n, 3, 3] rows right, up, forward.  spread: tan of half the field of view.
    detail: [n, DETAILS].  pixel: radians per pixel.
    key, sky: [n, 3] linear light; sun: [n, 3] unit vector towards the key light.
    shadow, ao: [n, h, w], 1 where nothing is in the way; near: [n, h, w], 1 at the object's waterline.
    mirror: [n, 4, h, w] the object's reflection in the ground, premultiplied, with its coverage; or None.
    """

    dx: Tensor
    dy: Tensor
    dz: Tensor
    u: Tensor
    v: Tensor
    eye: Tensor
    basis: Tensor
    spread: float
    pixel: float
    detail: Tensor
    key: Tensor
    sky: Tensor
    sun: Tensor
    shadow: Tensor
    ao: Tensor
    near: Tensor
    mirror: Tensor | None

    def __post_init__(self) -> None:
        n = len(self.eye)
        self._noise, self._random = noise_tables(str(self.dx.device))
        self.ground = self.dy < -1e-3
        down = torch.where(self.ground, -self.dy, torch.ones_like(self.dy))
        self.t = (self.eye[:, 1].view(n, 1, 1) / down).clamp(max=80.0)
        self.x = self.eye[:, 0].view(n, 1, 1) + self.t * self.dx
        self.z = self.eye[:, 2].view(n, 1, 1) + self.t * self.dz
        self.blur = self.t * self.pixel / down.clamp(min=0.03)  # a pixel's length on the ground
        self.bearing = torch.atan2(self.dx, -self.dz)  # 0 straight towards the backdrop
        self.rise = self.dy / torch.sqrt(self.dx * self.dx + self.dz * self.dz)

    def d(self, index: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Detail number `index` stretched to low..high, [n, 1, 1]."""
        return low + (high - low) * self.detail[:, index].view(-1, 1, 1)

    def rgb(self, red: float, green: float, blue: float) -> Tensor:
        """An sRGB colour as linear light, [3, 1, 1, 1]."""
        values = [linear(red), linear(green), linear(blue)]
        return torch.tensor(values, device=self.dx.device).view(3, 1, 1, 1)

    def pick(self, index: int, *colours: tuple[float, float, float]) -> Tensor:
        """One of the colours, or a blend of neighbours, by detail number `index`: [3, n, 1, 1]."""
        table = torch.tensor([[linear(c) for c in colour] for colour in colours], device=self.dx.device)
        at = self.detail[:, index] * (len(colours) - 1)
        low = at.floor().long().clamp(max=len(colours) - 2)
        chosen = table[low] + (table[low + 1] - table[low]) * (at - low).unsqueeze(1)
        return chosen.t().reshape(3, -1, 1, 1)

    def noise(self, layer: int, x: Tensor, y: Tensor, shift: int = 0) -> Tensor:
        """Noise [n, h, w] at x, y; every scene looks at another part of the table."""
        move = self.detail[:, shift].view(-1, 1, 1) * 7.31
        cell_x, cell_y = (x / PERIOD + move), (y / PERIOD + move * 1.7)
        grid = torch.stack([cell_x - cell_x.floor(), cell_y - cell_y.floor()], dim=-1) * 2.0 - 1.0
        table = self._noise[layer].expand(len(x), 1, -1, -1)
        return F.grid_sample(table, grid, mode="bilinear", padding_mode="border", align_corners=True)[:, 0]

    def chance(self, i: Tensor, j: Tensor | float, salt: int = 0) -> Tensor:
        """A random number per integer cell (i, j), different for every scene."""
        # Cells are small whole numbers, so this is exact in float32.
        own = (self.detail[:, 7].view(-1, 1, 1) * 4096).floor()
        index = (i * 73.0 + j * 1151.0 + (own + salt * 389.0)).to(torch.int32).bitwise_and_(4095)
        return self._random.index_select(0, index.flatten()).view(index.shape)

    def fade(self, size: float) -> Tensor:
        """1 where ground texture of this size is resolved, towards 0 where a pixel spans several periods."""
        return 1.0 / (1.0 + (self.blur * (1.2 / size)) ** 2)

    def lit(self, albedo: Tensor, slope: Tensor | float = 0.0) -> Tensor:
        """Ground of this albedo under key light, sky and the object's shadow; slope > 0 faces the sun."""
        n = len(self.eye)
        key = self.key.t().reshape(3, n, 1, 1) * (self.sun[:, 1].view(n, 1, 1) + slope).clamp(min=0.0)
        sky = self.sky.t().reshape(3, n, 1, 1)
        return albedo * (key * self.shadow + sky * self.ao)

    def wall(self, behind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An upright wall at z = -behind [n, 1, 1]: where it is seen (bool), and its x and y there."""
        t = (-behind - self.eye[:, 2].view(-1, 1, 1)) / self.dz.clamp(max=-0.05)
        x = self.eye[:, 0].view(-1, 1, 1) + t * self.dx
        y = self.eye[:, 1].view(-1, 1, 1) + t * self.dy
        return y > 0.0, x, y

    def project(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where points [n, 1, 1] of the world are seen: u, v, and world units per unit of u there."""
        rel = torch.cat([x, y, z], dim=2).squeeze(1) - self.eye
        right, up, forward = ((rel * self.basis[:, i]).sum(1).view(-1, 1, 1) for i in range(3))
        depth = forward.clamp(min=0.3) * self.spread
        return right / depth, up / depth, depth

    def over(self, back: Tensor, front: Tensor) -> Tensor:
        """`front` where the ray meets the ground, `back` elsewhere."""
        return torch.where(self.ground, front, back)
