"""The places of the pocket world: for every pixel, the light that arrives when no object is in its way.

A place paints ground and backdrop, says from where it is photographed and how it is lit. World space: the
object stands near the origin on the ground y = 0, the camera is on the +z side, the backdrop is towards -z,
an object is about 2 across. Colours are linear light here, [3, n, h, w].

Shape letters: n scenes of one place, h x w pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.seeding import generator_for

DETAILS = 8
"""How many free numbers in [0, 1) a scene gives its place: plank width, horizon, where the clouds are..."""

_PERIOD = 16.0  # noise repeats after this many units
_TEXELS = 256


def linear(value: float) -> float:
    """sRGB component in 0..1 -> linear light."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


# --- noise ------------------------------------------------------------------------------------------

SMOOTH, CLOUDY, GRAINY = range(3)


@functools.lru_cache(maxsize=8)
def _noise_tables(device: str) -> tuple[Tensor, Tensor]:
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


def mix(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return a + (b - a) * weight


def ramp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """0 below low, 1 above high, smooth between."""
    t = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


# --- what a painter is given ------------------------------------------------------------------------


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
        self._noise, self._random = _noise_tables(str(self.dx.device))
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
        cell_x, cell_y = (x / _PERIOD + move), (y / _PERIOD + move * 1.7)
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


# --- building blocks --------------------------------------------------------------------------------


def _gradient_sky(view: View, low: Tensor, high: Tensor, clouds: float) -> Tensor:
    height = view.rise.clamp(0.0, 0.6) / 0.6
    sky = mix(low, high, height.sqrt())
    if clouds:
        drift = view.noise(CLOUDY, view.bearing * 5.0, view.rise * 16.0, 2)
        cloud = ramp(drift, 1.0 - clouds, 1.15 - clouds) * ramp(view.rise, 0.0, 0.12)
        sky = mix(sky, view.rgb(0.98, 0.98, 0.99), cloud)
    return sky


def _leaves(view: View, x: Tensor, y: Tensor, salt: int, slim: float) -> tuple[Tensor, Tensor]:
    """One leaf per unit cell: its mask and a random tone, both [n, h, w]."""
    i, j = x.floor(), y.floor()
    turn = view.chance(i, j, salt) * math.pi
    du = x - i - 0.5 + 0.24 * (view.chance(i, j, salt + 1) - 0.5)
    dv = y - j - 0.5 + 0.24 * (view.chance(i, j, salt + 2) - 0.5)
    cos, sin = torch.cos(turn), torch.sin(turn)
    along, across = (du * cos + dv * sin) / 0.40, (dv * cos - du * sin) / (0.40 * slim)
    # Two crossing arcs: pointed at both ends.
    mask = ramp(across.abs() + along * along, 1.0, 0.82)
    vein = ramp(across.abs(), 0.05, 0.16) * 0.25 + 0.75
    return mask, view.chance(i, j, salt + 3) * vein


def _planks(view: View, x: Tensor, y: Tensor, tint: Tensor) -> Tensor:
    """Floor boards along y, one unit wide, as albedo."""
    column = x.floor()
    offset = y / 5.0 + view.chance(column, 0, 3) * 5.0
    board = offset.floor()
    tone = 0.72 + 0.5 * view.chance(column, board, 5)
    grain = view.noise(CLOUDY, x * 9.0 + board * 3.1, y * 0.55, 4)
    fine = view.noise(GRAINY, x * 3.0, y * 0.12, 5)
    edge = torch.minimum(x - column, column + 1.0 - x)
    end = torch.minimum(offset - board, board + 1.0 - offset) * 5.0
    gap = ramp(torch.minimum(edge, end), 0.015, 0.06)
    strength = view.fade(0.35)
    veins = 1.0 + strength * (0.34 * (grain - 0.5) + 0.22 * (fine - 0.5))
    return tint * (tone * veins * (1.0 - 0.65 * (1.0 - gap) * strength))


def _room_wall(view: View, behind: Tensor, colour: Tensor, board: Tensor) -> tuple[Tensor, Tensor]:
    """A painted wall with a skirting board, and where it is seen."""
    seen, x, y = view.wall(behind)
    tone = 1.0 + 0.05 * (view.noise(SMOOTH, x * 0.6, y * 0.6, 1) - 0.5) - 0.10 * ramp(y, 0.6, 0.0)
    wall = mix(colour * tone, board, ramp(y, 0.32, 0.30))
    wall = wall * (1.0 - 0.5 * ramp((y - 0.31).abs(), 0.03, 0.0))
    light = (view.sky * 1.25 + view.key * 0.45).t().reshape(3, -1, 1, 1)
    return wall * light, seen


def _grass(view: View, light: Tensor, dark: Tensor) -> Tensor:
    """A lawn as albedo: blades are noise stretched away from the camera."""
    blades = view.noise(GRAINY, view.x * 2.6, view.z * 0.9, 3)
    tufts = view.noise(CLOUDY, view.x * 1.4, view.z * 0.9, 4)
    strength = view.fade(0.10)
    return mix(dark, light, (0.5 + 0.75 * strength * (blades - 0.5) + 0.5 * (tufts - 0.5)).clamp(0.0, 1.0))


# --- the places -------------------------------------------------------------------------------------


def _snow(view: View) -> Tensor:
    drift = view.noise(CLOUDY, view.x * 0.9, view.z * 0.9, 1)
    lee = view.noise(CLOUDY, view.x * 0.9 - 0.16, view.z * 0.9 + 0.10, 1)
    sparkle = (view.noise(GRAINY, view.x * 3.0, view.z * 3.0, 3) - 0.5) * view.fade(0.06)
    white = view.rgb(0.93, 0.95, 0.99) * (1.0 + 0.10 * sparkle)
    ground = view.lit(white, 0.9 * (drift - lee))
    sky = _gradient_sky(
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


def _snow_flakes(view: View) -> tuple[Tensor, Tensor]:
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


def _beach(view: View) -> Tensor:
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
    sky = _gradient_sky(
        view, view.rgb(0.74, 0.89, 0.97), view.pick(6, (0.20, 0.52, 0.88), (0.35, 0.66, 0.93)), 0.32
    )
    return view.over(sky, ground)


def _jungle(view: View) -> Tensor:
    litter, tone = _leaves(view, view.x * 3.4, view.z * 3.4, 60, 0.5)
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
        mask, tone = _leaves(
            view, x * scale + layer * 0.37, y * scale + view.d(4) * 3.0, 70 + 10 * layer, 0.42
        )
        kept = view.chance(
            (x * scale + layer * 0.37).floor(), (y * scale + view.d(4) * 3.0).floor(), 76 + 10 * layer
        )
        leaf = mix(view.rgb(0.06, 0.26, 0.07), view.rgb(0.46, 0.72, 0.20), tone) * bright
        back = mix(back, leaf, mask * (kept < share))
    return torch.where(seen, back, ground)


def _cobblestones(view: View) -> Tensor:
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


def _pink_fabric(view: View) -> Tensor:
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


def _wooden_floor(view: View) -> Tensor:
    turn = view.d(0, -0.7, 0.7)
    cos, sin, wide = torch.cos(turn), torch.sin(turn), view.d(1, 0.34, 0.52)
    x, y = (view.x * cos + view.z * sin) / wide, (view.z * cos - view.x * sin) / wide
    tint = view.pick(2, (0.60, 0.39, 0.21), (0.73, 0.52, 0.31), (0.50, 0.30, 0.17))
    ground = view.lit(_planks(view, x, y, tint))
    colour = view.pick(3, (0.88, 0.85, 0.78), (0.72, 0.78, 0.76), (0.80, 0.74, 0.66))
    wall, seen = _room_wall(view, view.d(6, 2.2, 3.4), colour, view.rgb(0.95, 0.94, 0.91))
    return torch.where(seen, wall, ground)


def _mountain(view: View) -> Tensor:
    sky = _gradient_sky(
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


def _city(view: View) -> Tensor:
    back = _gradient_sky(
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


def _water(view: View) -> Tensor:
    low, high = view.rgb(0.80, 0.90, 0.95), view.pick(0, (0.26, 0.54, 0.86), (0.50, 0.70, 0.88))
    sky = _gradient_sky(view, low, high, 0.25)
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


def _sunflowers(view: View) -> Tensor:
    sky = _gradient_sky(
        view, view.rgb(0.80, 0.91, 0.97), view.pick(0, (0.30, 0.60, 0.92), (0.48, 0.73, 0.95)), 0.25
    )
    hedge = 0.05 + 0.06 * view.noise(CLOUDY, view.bearing * 6.0, torch.zeros_like(view.rise), 2)
    leaf = view.noise(GRAINY, view.bearing * 9.0, view.rise * 9.0, 5)
    leafy = mix(view.rgb(0.12, 0.30, 0.10), view.rgb(0.30, 0.50, 0.18), leaf)
    back = mix(sky, leafy, ramp(hedge - view.rise, -0.003, 0.003))
    picture = view.over(back, view.lit(_grass(view, view.rgb(0.45, 0.68, 0.18), view.rgb(0.14, 0.36, 0.08))))
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


def _white_rug(view: View) -> Tensor:
    floor = _planks(
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
    wall, seen = _room_wall(view, view.d(3, 2.0, 3.0), colour, view.rgb(0.93, 0.93, 0.92))
    return torch.where(seen, wall, ground)


def _night(view: View) -> Tensor:
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


def _autumn(view: View) -> Tensor:
    sky = _gradient_sky(
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
        mask, tone = _leaves(view, x * scale + 0.31 * layer, y * scale, 130 + 10 * layer, 0.62)
        leaf = mix(view.rgb(0.72, 0.20, 0.06), view.rgb(0.98, 0.70, 0.12), tone) * (0.7 + 0.2 * layer)
        back = mix(back, leaf, mask * crown)
    ground = _grass(view, view.rgb(0.52, 0.56, 0.22), view.rgb(0.26, 0.32, 0.12))
    for layer, scale in enumerate((3.6, 2.9, 2.3)):
        mask, tone = _leaves(view, view.x * scale + 0.4 * layer, view.z * scale, 160 + 10 * layer, 0.62)
        leaf = mix(view.rgb(0.70, 0.18, 0.05), view.rgb(0.97, 0.66, 0.10), tone)
        ground = mix(ground, leaf, mask * (0.35 + 0.65 * view.fade(0.25)))
    # The foot of the trunk stands in front of the far lawn.
    foot = trunk * (y > 0.0) * view.ground
    return mix(view.over(back, view.lit(ground)), bark * 0.9, foot)


def _kitchen(view: View) -> Tensor:
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


# --- the table of places ----------------------------------------------------------------------------

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Place:
    """One setting.

    phrase: its words in captions.  paint: View -> radiance [3, n, h, w].
    elevation: degrees from which the camera looks down; low where the backdrop matters.
    key, sky: linear colour and strength of the key light and of the light from above; bounce: from below.
    afloat: share of the object's height under water.
    foreground: what is in front of the object: View -> colour [3, ...] and cover [n, h, w].
    """

    phrase: str
    paint: Callable[[View], Tensor]
    elevation: tuple[float, float]
    key: Colour = (0.86, 0.82, 0.74)
    sky: Colour = (0.34, 0.37, 0.42)
    bounce: Colour = (0.12, 0.12, 0.11)
    afloat: tuple[float, float] = (0.0, 0.0)
    foreground: Callable[[View], tuple[Tensor, Tensor]] | None = None


_PLACES = (
    Place(
        "in the snow", _snow, (6.0, 17.0), (0.68, 0.70, 0.74), (0.44, 0.48, 0.54), (0.26, 0.28, 0.31),
        foreground=_snow_flakes,
    ),
    Place("on the beach", _beach, (7.0, 18.0), (1.00, 0.93, 0.80), (0.32, 0.38, 0.45), (0.24, 0.20, 0.14)),
    Place("in the jungle", _jungle, (6.0, 18.0), (0.84, 0.86, 0.66), (0.26, 0.33, 0.24), (0.06, 0.09, 0.04)),
    Place("on a cobblestone street", _cobblestones, (14.0, 28.0), (0.84, 0.80, 0.72), (0.36, 0.38, 0.42)),
    Place(
        "on top of pink fabric", _pink_fabric, (14.0, 32.0), (0.72, 0.70, 0.68), (0.42, 0.40, 0.41), (0.24, 0.13, 0.16)
    ),
    Place(
        "on top of a wooden floor", _wooden_floor, (14.0, 30.0), (0.84, 0.76, 0.64), (0.36, 0.35, 0.33),
        (0.15, 0.10, 0.06),
    ),
    Place("with a mountain in the background", _mountain, (3.0, 8.0), (0.94, 0.88, 0.78), (0.33, 0.38, 0.45)),
    Place("with a city in the background", _city, (3.0, 8.0), (0.92, 0.82, 0.68), (0.36, 0.38, 0.42)),
    Place(
        "floating on top of water", _water, (10.0, 22.0), (0.94, 0.90, 0.82), (0.32, 0.39, 0.46), (0.06, 0.12, 0.15),
        afloat=(0.12, 0.26),
    ),
    Place(
        "on top of green grass with sunflowers around it", _sunflowers, (7.0, 17.0), (0.98, 0.92, 0.78),
        (0.31, 0.36, 0.40), (0.09, 0.14, 0.05),
    ),
    Place(
        "on top of a white rug", _white_rug, (15.0, 30.0), (0.72, 0.69, 0.64), (0.40, 0.40, 0.40),
        (0.22, 0.21, 0.20),
    ),
    Place("at night", _night, (4.0, 11.0), (0.95, 0.80, 0.56), (0.13, 0.15, 0.26), (0.08, 0.08, 0.08)),
    Place(
        "with a tree and autumn leaves in the background", _autumn, (4.0, 12.0), (0.94, 0.86, 0.70), (0.34, 0.35, 0.36),
        (0.17, 0.12, 0.05),
    ),
    Place("in the kitchen", _kitchen, (12.0, 26.0), (0.78, 0.77, 0.74), (0.40, 0.41, 0.43), (0.10, 0.10, 0.11)),
)  # fmt: skip

PLACES: dict[str, Place] = {place.phrase: place for place in _PLACES}
"""Every setting by its words in captions."""
