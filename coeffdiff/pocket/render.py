"""Scenes of the pocket world to pictures: sphere tracing, paint and light, many scenes in one call.

What is drawn is a Scene, and nothing else decides a picture: same scene, same pixels, whatever else is in
the batch (up to rounding). How scenes come about is world.py's business.

How it is fast: rays are marched only inside an object's box, first a cone for 2 x 2 pixels, then
one per pixel, then its subsamples, each from where the cone before touched; shadow and occlusion are shared
by the subsamples of a pixel; rays that are done are taken out of the batch; and everything is elementwise
over the scenes of one kind or one place.

Shape letters: N scenes, n scenes of one group, P rays or points of a group in no order, R resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.errors import ConfigError
from coeffdiff.pocket import places, shapes
from coeffdiff.pocket.places import PLACES, mix, ramp
from coeffdiff.pocket.shapes import KINDS, ROLES

RGB = tuple[float, float, float]

PATTERNS = ("plain", "striped", "dotted", "checkered", "wooden", "shiny")
MARK_SHAPES = ("disc", "star", "heart", "ring", "bar", "smile", "bolt", "band", "zigzag", "spiral", "half")

FIELD_OF_VIEW = 36.0  # degrees
# Standard deviations, as shares of the picture's side.
BACKDROP_BLUR = 1.6 / 128  # of everything behind and under the object
LENS_BLUR = 0.5 / 128  # of the whole picture


# --- what is drawn ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera:
    """azimuth: degrees around the object, 0 faces the backdrop.  elevation: degrees above the horizon.
    distance: world units from the point looked at.  aim: that point's height, as a share of the object's.
    """

    azimuth: float
    elevation: float
    distance: float
    aim: float = 0.5


@dataclass(frozen=True)
class Light:
    """azimuth: degrees from the camera's side of the object.  elevation: degrees above the horizon.
    strength: of the key light, 1 as usual.  warmth: -1 bluish to 1 reddish.  fill: light from the sky, 1 as usual.
    """

    azimuth: float
    elevation: float
    strength: float = 1.0
    warmth: float = 0.0
    fill: float = 1.0


@dataclass(frozen=True)
class Look:
    """How an individual is painted.

    colours: role -> sRGB, all roles of shapes.ROLES.  second: the pattern's other colour.
    width, tilt, phase: size, direction and shift of the pattern, each in 0..1.
    """

    colours: Mapping[str, RGB]
    second: RGB
    width: float = 0.5
    tilt: float = 0.2
    phase: float = 0.3


@dataclass(frozen=True)
class Mark:
    """A figure painted, or carved, on the body and pale parts of an object.

    shape: one of MARK_SHAPES. "band", "zigzag" and "spiral" run around the y axis, "half" colours all
    that lies beyond `at` in the direction it faces; the others are stamped from the direction they face.
    at: its middle in object space.  size: half width and half height (spiral: pitch and thickness).
    yaw, pitch: degrees, the direction it faces; 0, 0 is the front.  turn: degrees in its own plane.
    depth: how deep it is carved, in object units; 0 is painted only.
    """

    shape: str
    at: tuple[float, float, float]
    size: tuple[float, float]
    colour: RGB
    yaw: float = 0.0
    pitch: float = 0.0
    turn: float = 0.0
    depth: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything that decides one picture.

    kind, colour, pattern, setting: the words of captions; colour is None where no word fits.
    shape: proportions of the kind (see shapes.KINDS).  yaw: degrees the object is turned.
    size: radius of the object's box in world units.  position: x and z on the ground.
    sunk: share of its height under the ground plane (afloat).  detail: what varies in the place.
    marks, extras, subject: only of subjects.
    """

    kind: str
    colour: str | None
    pattern: str
    setting: str
    shape: Mapping[str, float]
    look: Look
    camera: Camera
    light: Light
    yaw: float
    size: float
    position: tuple[float, float]
    sunk: float
    detail: tuple[float, ...]
    marks: tuple[Mark, ...] = ()
    extras: tuple[str, ...] = ()
    subject: str | None = None


# --- scenes to tensors ------------------------------------------------------------------------------


class _Batch:
    """The numbers of N scenes as tensors; object space wherever it says so.

    eye, sun [N, 3] and basis [N, 3, 3] (rows right, up, forward) in object space, with world_ twins;
    low, high [N, 3]: the object's box, cut at the ground; scale [N]: world units per object unit.
    """

    def __init__(self, scenes: Sequence[Scene], device: torch.device) -> None:
        self.scenes = scenes
        rows = np.array([_numbers(scene) for scene in scenes], dtype=np.float64)
        world_eye, world_basis, world_sun = rows[:, 0:3], rows[:, 3:12].reshape(-1, 3, 3), rows[:, 12:15]
        yaw, scale, origin = rows[:, 15], rows[:, 16], rows[:, 17:20]
        cos, sin, zero = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)
        turn = np.stack([cos, zero, -sin, zero, zero + 1, zero, sin, zero, cos], axis=1).reshape(-1, 3, 3)

        def to_object(vectors: np.ndarray) -> np.ndarray:
            return np.einsum("nij,n...j->n...i", turn, vectors)

        def put(values: np.ndarray) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        self.device = device
        self.world_eye, self.world_basis, self.world_sun = put(world_eye), put(world_basis), put(world_sun)
        self.eye = put(to_object(world_eye - origin) / scale[:, None])
        self.basis, self.sun = put(to_object(world_basis)), put(to_object(world_sun))
        self.turn, self.origin, self.scale = put(turn), put(origin), put(scale)
        self.low, self.high = put(rows[:, 20:23]), put(rows[:, 23:26])
        self.key, self.sky, self.bounce = put(rows[:, 26:29]), put(rows[:, 29:32]), put(rows[:, 32:35])
        self.colours = put(rows[:, 35 : 35 + 3 * len(ROLES)])
        rest = rows[:, 35 + 3 * len(ROLES) :]
        self.second, self.knobs = put(rest[:, 0:3]), put(rest[:, 3:6])
        self.fuzzy, self.round = put(rest[:, 6]), put(rest[:, 7])
        self.detail = put(rest[:, 8 : 8 + places.DETAILS])
        self.pattern = torch.tensor([PATTERNS.index(scene.pattern) for scene in scenes], device=device)
        most = max(len(scene.marks) for scene in scenes)
        blank = [-1.0] + [0.0] * 15
        marks = [[_mark_numbers(m) for m in s.marks] + [blank] * (most - len(s.marks)) for s in scenes]
        self.marks = torch.tensor(marks, dtype=torch.float32, device=device).view(len(scenes), most, 16)

    def __len__(self) -> int:
        return len(self.scenes)


def _numbers(scene: Scene) -> list[float]:
    """The row of one scene, in world units and linear light; the columns are those _Batch takes apart."""
    box = shapes.object_bounds(scene.kind, scene.shape, scene.extras)
    scale = scene.size / (0.5 * math.sqrt((2 * box.x) ** 2 + box.top**2 + (box.back + box.front) ** 2))
    sink = scene.sunk * box.top
    height = (box.top - sink) * scale
    azimuth, elevation = math.radians(scene.camera.azimuth), math.radians(scene.camera.elevation)
    towards = (
        math.sin(azimuth) * math.cos(elevation),
        math.sin(elevation),
        math.cos(azimuth) * math.cos(elevation),
    )
    eye = [c * scene.camera.distance for c in towards]
    eye[1] += height * scene.camera.aim
    right = (math.cos(azimuth), 0.0, -math.sin(azimuth))
    up = (
        -math.sin(azimuth) * math.sin(elevation),
        math.cos(elevation),
        -math.cos(azimuth) * math.sin(elevation),
    )
    forward = [-c for c in towards]
    sun_at, sun_up = (
        math.radians(scene.light.azimuth + scene.camera.azimuth),
        math.radians(scene.light.elevation),
    )
    sun = (math.sin(sun_at) * math.cos(sun_up), math.sin(sun_up), math.cos(sun_at) * math.cos(sun_up))
    place = PLACES[scene.setting]
    warm = scene.light.warmth
    tint = (1.0 + 0.14 * warm, 1.0, 1.0 - 0.18 * warm)
    key = [c * t * scene.light.strength for c, t in zip(place.key, tint, strict=True)]
    sky = [c * scene.light.fill for c in place.sky]
    look = scene.look
    paint = [places.linear(c) for role in ROLES for c in look.colours[role]]
    second = [places.linear(c) for c in look.second]
    kind = KINDS[scene.kind]
    return [
        *eye, *right, *up, *forward, *sun, math.radians(scene.yaw), scale,
        scene.position[0], -sink * scale, scene.position[1],
        -box.x, sink, -box.back, box.x, box.top, box.front,
        *key, *sky, *place.bounce, *paint, *second, look.width, look.tilt, look.phase,
        float(kind.fuzzy), float(kind.mapping == "round"), *scene.detail,
    ]  # fmt: skip


def _mark_numbers(mark: Mark) -> list[float]:
    yaw, pitch = math.radians(mark.yaw), math.radians(mark.pitch)
    facing = (math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch))
    colour = [places.linear(c) for c in mark.colour]
    return [
        float(MARK_SHAPES.index(mark.shape)), *mark.at, *mark.size, *facing, math.radians(mark.turn), mark.depth,
        *colour, math.cos(yaw), -math.sin(yaw),
    ]  # fmt: skip


class _Proportions:
    """Rows of a tensor by the names of proportions: what a field's `q` is."""

    def __init__(self, names: Sequence[str], rows: Tensor) -> None:
        self.__dict__.update(zip(names, rows.unbind(0), strict=True))


class _Group:
    """The scenes of a batch with one kind and the same extras: one field for all of them."""

    def __init__(self, batch: _Batch, kind: str, extras: tuple[str, ...], members: list[int]) -> None:
        self.batch, self.kind, self.extras = batch, kind, extras
        self.members = torch.tensor(members, device=batch.device)
        self.names = tuple(KINDS[kind].ranges) + (shapes.EXTRA_PROPORTIONS if extras else ())
        values = [[batch.scenes[i].shape.get(name, 0.0) for name in self.names] for i in members]
        self.shape = torch.tensor(values, dtype=torch.float32, device=batch.device).t().contiguous()
        self.carved = bool(
            len(members) and batch.marks.shape[1] and (batch.marks[self.members, :, 10] > 0).any()
        )

    def q(self, which: Tensor) -> Tensor:
        """Proportions [K, P] of the group's scenes number `which` [P]."""
        return self.shape.index_select(1, which)

    def distance(self, x: Tensor, y: Tensor, z: Tensor, q: Tensor) -> Tensor:
        return shapes.distance(self.kind, self.extras, x, y, z, _Proportions(self.names, q))

    def roles(self, x: Tensor, y: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """Index into ROLES [P] of the nearest part."""
        best: Tensor | None = None
        for role, distance in shapes.parts_of(self.kind, self.extras, x, y, z, _Proportions(self.names, q)):
            if best is None:
                best, which = distance, torch.full_like(distance, ROLES.index(role), dtype=torch.long)
            else:
                which = torch.where(distance < best, ROLES.index(role), which)
                best = torch.minimum(best, distance)
        return which


# --- marching ---------------------------------------------------------------------------------------


def _enter_box(
    origin: Sequence[Tensor], ray: Sequence[Tensor], low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave boxes; a ray misses if it leaves before it enters. low, high broadcast, [..., 3]."""
    near: Any = None
    far: Any = None
    for axis in range(3):
        step = torch.where(ray[axis].abs() < 1e-6, torch.full_like(ray[axis], 1e-6), ray[axis])
        a, b = (low[..., axis] - origin[axis]) / step, (high[..., axis] - origin[axis]) / step
        first, last = torch.minimum(a, b), torch.maximum(a, b)
        near = first if near is None else torch.maximum(near, first)
        far = last if far is None else torch.minimum(far, last)
    return near.clamp(min=1e-3), far


def _march(
    group: _Group, rays: Tensor, start: Tensor, end: Tensor, reach: float, tolerance: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Walk rays until the surface is within reach.

    Args:
        rays: [6 + K, P]: origins, unit directions, proportions.
        start, end: [P] distances along the rays.
        reach: radius of the ray's cone per distance travelled.
        tolerance: share of that radius at which the surface counts as met.
    Returns: [P] where each ray was nearest to the surface in units of its radius, and [P] how near that
        was: <= tolerance is a hit.
    """
    at, least = start.clone(), torch.full_like(start, 1e9)
    live = torch.arange(len(start), device=start.device)
    t, t_end, best_t, best = start, end, start, least
    for step in range(steps):
        d = group.distance(rays[0] + t * rays[3], rays[1] + t * rays[4], rays[2] + t * rays[5], rays[6:])
        radius = t * reach
        near = d / radius
        closer = (near < best) & (t <= t_end)
        best, best_t = torch.where(closer, near, best), torch.where(closer, t, best_t)
        going = (near > tolerance) & (t < t_end)
        # Rays that are done stand still until they are taken out: when that is depends on the batch.
        step_on = (d - (0.75 * tolerance) * radius).clamp(min=0.0) + 0.2 * tolerance * radius
        t = torch.where(going, t + step_on, t)
        last = step == steps - 1
        count = len(t) if step % 2 == 0 and not last else int(going.sum())
        if last or count < 0.8 * len(t):
            done = slice(None) if last else (~going).nonzero().squeeze(1)
            at[live[done]], least[live[done]] = best_t[done], best[done]
            if last or count == 0:
                break
            keep = going.nonzero().squeeze(1)
            rays, live = rays.index_select(1, keep), live[keep]
            t, t_end, best_t, best = t[keep], t_end[keep], best_t[keep], best[keep]
    return at, least


def _reaches_light(
    group: _Group, x: Tensor, y: Tensor, z: Tensor, which: Tensor, start: float, steps: int
) -> Tensor:
    """Share of the key light [P] that reaches points [P] of the group's scenes `which`: 1 lit, 0 in shadow.

    The closest approach on the way to the light, seen from the point, gives the penumbra.
    """
    scene = group.members[which]
    sun = group.batch.sun[scene]
    ray = sun.unbind(1)
    near, far = _enter_box((x, y, z), ray, group.batch.low[scene] - 0.06, group.batch.high[scene] + 0.06)
    light = torch.ones_like(x)
    live = (far > near).nonzero().squeeze(1)
    if not len(live):
        return light
    rays = torch.cat([torch.stack([x, y, z])[:, live], torch.stack(ray)[:, live], group.q(which[live])])
    t, far = near[live].clamp(min=start), far[live]
    share = torch.ones_like(t)
    for _ in range(steps):
        d = group.distance(rays[0] + t * rays[3], rays[1] + t * rays[4], rays[2] + t * rays[5], rays[6:])
        share = torch.where(t < far, torch.minimum(share, 0.5 + 0.5 * d / (0.09 * t)), share)
        t = t + d.clamp(0.035, 0.25)
    share = share.clamp(0.0, 1.0)
    light[live] = share * share * (3.0 - 2.0 * share)
    return light


# --- paint ------------------------------------------------------------------------------------------


def _wave(t: Tensor, share: Tensor | float, soft: Tensor) -> Tensor:
    """1 in the middle `share` of every unit period of t, 0 outside, edges `soft` wide."""
    off = (t - t.floor() - 0.5).abs()
    return ((0.5 * share - off) / soft + 0.5).clamp(0.0, 1.0)


def _coordinates(
    batch: _Batch, s: Tensor, x: Tensor, y: Tensor, z: Tensor, normal: Tensor
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


def _paint_pattern(
    batch: _Batch, s: Tensor, x: Tensor, y: Tensor, z: Tensor, normal: Tensor, pixel: Tensor, base: Tensor
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


def _mark_weight(
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


# --- light ------------------------------------------------------------------------------------------


def _normals(group: _Group, points: Sequence[Tensor], q: Tensor, s: Tensor, pixel: Tensor) -> Tensor:
    """Unit normals [3, P] by differences over about a third of a pixel, carved marks included."""
    step = (0.35 * pixel).clamp(min=1.5e-3)
    total = None
    for kx, ky, kz in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        x, y, z = points[0] + kx * step, points[1] + ky * step, points[2] + kz * step
        d = group.distance(x, y, z, q)
        if group.carved:
            for index in range(group.batch.marks.shape[1]):
                mark = group.batch.marks[s, index]
                d = d + mark[:, 10] * _mark_weight(mark, x, y, z, None, 2.0 * pixel + 0.02)
        part = torch.stack([kx * d, ky * d, kz * d])
        total = part if total is None else total + part
    return F.normalize(total, dim=0)


def _shade(
    group: _Group, points: Sequence[Tensor], ray: Tensor, which: Tensor, pixel: Tensor,
    normal: Tensor, light: Tensor, open_sky: Tensor,
) -> Tensor:  # fmt: skip
    """Linear light [3, P] that surface points send back along their rays.

    Args:
        points: three [P].  ray: [3, P] unit directions.  which: [P] scene of the group.
        pixel: [P] size of a subsample there.  normal: [3, P].
        light, open_sky: [P] shares of the key light and of the sky that arrive.
    """
    batch = group.batch
    s = group.members[which]
    x, y, z = points
    role = group.roles(x, y, z, group.q(which))
    base = batch.colours.view(-1, 3)[s * len(ROLES) + role].t()
    is_body = role == ROLES.index("body")
    i = is_body.nonzero().squeeze(1)
    base[:, i] = _paint_pattern(batch, s[i], x[i], y[i], z[i], normal[:, i], pixel[i], base[:, i])
    if batch.marks.shape[1]:
        # Eyes, metal and accents stay as they are.
        i = (is_body | (role == ROLES.index("pale"))).nonzero().squeeze(1)
        coat = base[:, i]
        for index in range(batch.marks.shape[1]):
            mark = batch.marks[s[i], index]
            cover = _mark_weight(mark, x[i], y[i], z[i], normal[:, i], pixel[i])
            coat = mix(coat, mark[:, 11:14].t(), cover)
        base[:, i] = coat
    fuzzy = batch.fuzzy[s] * (is_body | (role == ROLES.index("pale")))
    nap = torch.sin(x * 91.0 + torch.sin(y * 67.0) * 2.0) * torch.sin(
        z * 83.0 + torch.sin(x * 59.0) * 2.0 + y * 77.0
    )
    base = base * (1.0 + 0.13 * fuzzy * nap)

    sun = batch.sun[s].t()
    facing_sun = (normal * sun).sum(0)
    facing_eye = (-(normal * ray).sum(0)).clamp(0.0, 1.0)
    # Plush lets light in at its edges; hard things follow Lambert.
    direct = torch.where(fuzzy > 0, (facing_sun + 0.25) / 1.25, facing_sun).clamp(min=0.0) * light
    above = 0.5 + 0.5 * normal[1]
    key, sky, bounce = batch.key[s].t(), batch.sky[s].t(), batch.bounce[s].t()
    ambient = (sky * above * open_sky + bounce * (1.0 - above) * (0.4 + 0.6 * open_sky)) * 1.25
    out = base * (key * direct + ambient)
    out = out + base * (0.35 * fuzzy * (1.0 - facing_eye) ** 3) * sky

    shiny = (batch.pattern[s] == PATTERNS.index("shiny")) & is_body
    metal = role == ROLES.index("metal")
    glossy = shiny | metal | (role == ROLES.index("dark"))
    half = F.normalize(sun - ray, dim=0)
    lobe = (normal * half).sum(0).clamp(min=0.0)
    hard = (1.0 - fuzzy) * light
    out = out + key * hard * torch.where(glossy, 1.6 * lobe**140, 0.10 * lobe**18)
    mirror = shiny | metal
    i = mirror.nonzero().squeeze(1)
    if len(i):
        n, r = normal[:, i], ray[:, i]
        back = r - 2.0 * (n * r).sum(0) * n
        fresnel = 0.13 + 0.72 * (1.0 - facing_eye[i]) ** 3
        # A studio around the object: dim floor, bright horizon, and a window beside the sun.
        heaven = mix(bounce[:, i], sky[:, i] * 2.0, ramp(back[1], -0.2, 0.3))
        strip = ramp((back[1] - 0.30).abs(), 0.16, 0.10) * 0.9
        # Upright walls see no window above them: a tall lamp stands at the sun's side.
        level = torch.rsqrt((back[0] ** 2 + back[2] ** 2) * (sun[0, i] ** 2 + sun[2, i] ** 2) + 1e-6)
        tall = ramp((back[0] * sun[0, i] + back[2] * sun[2, i]) * level, 0.95, 0.98) * ramp(
            back[1], 0.55, 0.35
        )
        tall = tall * (0.3 + 0.7 * light[i])
        window = ramp((back * sun[:, i]).sum(0), 0.82, 0.88) * (0.3 + 0.7 * light[i])
        heaven = heaven + key[:, i] * (9.0 * window + 2.0 * strip + 4.0 * tall)
        tinted = torch.where(metal[i], base[:, i] * 1.7, torch.ones_like(fresnel))
        weight = torch.where(metal[i], 0.30 + 0.50 * fresnel, fresnel)
        arrives = weight * (0.35 + 0.65 * open_sky[i])
        out[:, i] = (
            out[:, i] * torch.where(metal[i], 1.0, 0.8) * (1.0 - 0.5 * weight)
            + heaven.clamp(max=6.0) * tinted * arrives
        )
    glow = (role == ROLES.index("glow")).to(x.dtype)
    return mix(out, base * (1.15 + 0.25 * facing_eye), glow * 0.85)


# --- one group of objects ---------------------------------------------------------------------------


def _pixel_grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """u to the right and v up, in -1..1 at pixel centres, each [size, size]."""
    at = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    return at.view(1, -1).expand(size, size), -at.view(-1, 1).expand(size, size)


def _directions(basis: Tensor, u: Tensor, v: Tensor) -> list[Tensor]:
    """Unit ray directions, three of u's shape [n, ...]; basis [n, 3, 3] or with u's trailing axes."""
    spread = math.tan(math.radians(FIELD_OF_VIEW / 2))
    across, upward = u * spread, v * spread
    length = torch.rsqrt(1.0 + across * across + upward * upward)
    return [(basis[0][k] * across + basis[1][k] * upward + basis[2][k]) * length for k in range(3)]


def _spread_basis(basis: Tensor, axes: int) -> list[list[Tensor]]:
    """basis [n, 3, 3] as nested lists of [n, 1, ...] tensors for _directions."""
    shape = (-1,) + (1,) * axes
    return [[basis[:, i, k].reshape(shape) for k in range(3)] for i in range(3)]


def _draw_objects(group: _Group, size: int, fine: int, colour: Tensor, cover: Tensor) -> None:
    """Fill colour [N, 3, F, F] (premultiplied) and cover [N, F, F] for the group's scenes, F = size * fine."""
    batch, members = group.batch, group.members
    basis, eye = batch.basis[members], batch.eye[members]
    spread = 2.0 * math.tan(math.radians(FIELD_OF_VIEW / 2))
    pixel = spread / size  # per distance, in the picture's middle

    # First one cone for 2 x 2 pixels, wherever it may meet the box.
    coarse = size // 2
    u, v = _pixel_grid(coarse, batch.device)
    ray = _directions(_spread_basis(basis, 2), u[None], v[None])
    low, high = (edge[members].view(-1, 1, 1, 3) for edge in (batch.low, batch.high))
    margin = 2.0 * pixel * eye.norm(dim=1).view(-1, 1, 1, 1)
    near, far = _enter_box([eye[:, k].view(-1, 1, 1) for k in range(3)], ray, low - margin, high + margin)
    which, row, col = (far > near).nonzero(as_tuple=True)
    at, far = near[which, row, col], far[which, row, col]
    rays = torch.cat([eye[which].t(), torch.stack([r[which, row, col] for r in ray]), group.q(which)])
    frames = basis.view(-1, 9)
    # Each level starts where the one before may have touched; with tolerance 1 a cone that holds its
    # square's corners (0.72 of its side) stops there. The last level are single rays.
    for grid, divide in ((size, 2), (size * fine, fine)):
        at, closest = _march(group, rays, at, far, 0.72 * spread / (grid // divide), 1.0, 40)
        seen = (closest <= 1.0).nonzero().squeeze(1)
        if not len(seen):
            return
        parts = divide * divide
        sub = torch.arange(parts, device=batch.device)
        row = (row[seen].view(-1, 1) * divide + sub // divide).flatten()
        col = (col[seen].view(-1, 1) * divide + sub % divide).flatten()
        which = which[seen].repeat_interleave(parts)
        at, far = at[seen].repeat_interleave(parts), far[seen].repeat_interleave(parts)
        u, v = (col + 0.5) * (2.0 / grid) - 1.0, 1.0 - (row + 0.5) * (2.0 / grid)
        dirs = torch.stack(_directions(frames[which].t().view(3, 3, -1), u, v))
        rays = torch.cat([eye[which].t(), dirs, group.q(which)])
    # The last rays end at the ground, so that nobody sees the underside of what stands on it.
    floor = (batch.low[members[which], 1] - rays[1]) / rays[4].clamp(max=-1e-4)
    far = torch.where(rays[4] < -1e-4, torch.minimum(far, floor), far)
    at, closest = _march(group, rays, at, far, pixel / fine, 0.2, 36)
    # Rays that pass within a subsample's radius cover it in part: smooth edges from few samples.
    share = ((1.0 - closest) / 0.8).clamp(0.0, 1.0)

    # One point per pixel, its best covered, stands for shadow and occlusion of all its subsamples.
    parts = fine * fine
    best = share.view(-1, parts).argmax(1)
    best = best + torch.arange(len(best), device=batch.device) * parts
    hit = share > 0.0
    step = at * (pixel / fine)
    points = [rays[k] + at * rays[3 + k] for k in range(3)]
    found = hit.nonzero().squeeze(1)
    normal = torch.zeros(3, len(at), device=batch.device)
    place = [p[found] for p in points]
    normal[:, found] = _normals(group, place, rays[6:, found], members[which[found]], step[found])
    lone = best[hit[best]]
    out_x, out_y, out_z = (points[k][lone] + 0.02 * normal[k, lone] for k in range(3))
    q = group.q(which[lone])
    light = torch.ones(len(best), device=batch.device)
    sky = torch.ones_like(light)
    pixel_of = lone // parts
    light[pixel_of] = _reaches_light(group, out_x, out_y, out_z, which[lone], 0.03, 9)
    opening = torch.ones_like(out_x)
    for away, weight in ((0.07, 0.45), (0.20, 0.40)):
        x, y, z = (points[k][lone] + away * normal[k, lone] for k in range(3))
        d = group.distance(x, y, z, q)
        opening = opening - weight * (1.0 - d / away).clamp(0.0, 1.0)
    # The ground takes light from what is close to it.
    ground = batch.low[members[which[lone]], 1]
    opening = opening * (0.72 + 0.28 * ramp(points[1][lone] - ground, 0.0, 0.22))
    sky[pixel_of] = opening
    back = found // parts
    shade = _shade(
        group, place, dirs[:, found], which[found], step[found], normal[:, found], light[back], sky[back]
    )
    scene, share = members[which[found]], share[found]
    colour[scene, :, row[found], col[found]] = (shade * share).t()
    cover[scene, row[found], col[found]] = share


def _draw_ground_light(group: _Group, size: int, maps: Tensor) -> None:
    """Fill maps [N, 3, size, size] (key light, sky, nearness) where the group's objects touch the ground's light."""
    batch, members = group.batch, group.members
    u, v = _pixel_grid(size, batch.device)
    ray = _directions(_spread_basis(batch.basis[members], 2), u[None], v[None])
    eye, low, high = batch.eye[members], batch.low[members], batch.high[members]
    floor = low[:, 1].view(-1, 1, 1)
    t = (floor - eye[:, 1].view(-1, 1, 1)) / ray[1].clamp(max=-1e-4)
    x, z = eye[:, 0].view(-1, 1, 1) + t * ray[0], eye[:, 2].view(-1, 1, 1) + t * ray[2]
    sun = batch.sun[members]
    # The shadow of the box: slide the ground point to half the box's height towards the light.
    reach = 0.5 * (high[:, 1] - low[:, 1])
    slide_x, slide_z = sun[:, 0] / sun[:, 1] * reach, sun[:, 2] / sun[:, 1] * reach

    def within(x: Tensor, z: Tensor, margin_x: Tensor, margin_z: Tensor) -> Tensor:
        inside_x = (x > (low[:, 0] - margin_x).view(-1, 1, 1)) & (x < (high[:, 0] + margin_x).view(-1, 1, 1))
        return (
            inside_x
            & (z > (low[:, 2] - margin_z).view(-1, 1, 1))
            & (z < (high[:, 2] + margin_z).view(-1, 1, 1))
        )

    around = torch.full_like(reach, 0.45)
    shaded = within(
        x + slide_x.view(-1, 1, 1), z + slide_z.view(-1, 1, 1), slide_x.abs() + 0.15, slide_z.abs() + 0.15
    )
    touched = (ray[1] < -1e-3) & (within(x, z, around, around) | shaded)
    which, row, col = touched.nonzero(as_tuple=True)
    if not len(which):
        return
    x, z = x[which, row, col], z[which, row, col]
    y = low[which, 1]
    q, scene = group.q(which), members[which]
    maps[scene, 0, row, col] = _reaches_light(group, x, y + 0.01, z, which, 0.02, 14)
    d_low = group.distance(x, y + 0.06, z, q)
    d_high = group.distance(x, y + 0.28, z, q)
    sky = 1.0 - 0.48 * (1.0 - d_low / 0.10).clamp(0.0, 1.0) - 0.40 * (1.0 - d_high / 0.34).clamp(0.0, 1.0)
    maps[scene, 1, row, col] = sky
    maps[scene, 2, row, col] = ramp(d_low, 0.13, 0.0)


def _draw_mirror(group: _Group, size: int, mirror: Tensor) -> None:
    """Fill mirror [N, 4, size, size] for the group's scenes afloat: the object in the rippled water."""
    batch = group.batch
    afloat = [k for k, i in enumerate(group.members.tolist()) if batch.scenes[i].sunk > 0.0]
    if not afloat:
        return
    local = torch.tensor(afloat, device=batch.device)
    members = group.members[local]
    u, v = _pixel_grid(size, batch.device)
    ray = _directions(_spread_basis(batch.world_basis[members], 2), u[None], v[None])
    eye = batch.world_eye[members]
    t = eye[:, 1].view(-1, 1, 1) / (-ray[1]).clamp(min=1e-3)
    x, z = eye[:, 0].view(-1, 1, 1) + t * ray[0], eye[:, 2].view(-1, 1, 1) + t * ray[2]
    phase, calm = places.water_state(batch.detail[members])
    lean_x, lean_z = places.water_slopes(x, z, phase.view(-1, 1, 1), calm.view(-1, 1, 1))
    up = F.normalize(torch.stack([-0.55 * lean_x, torch.ones_like(x), -0.55 * lean_z]), dim=0)
    down = torch.stack(ray)
    world = down - 2.0 * (down * up).sum(0) * up
    turn = batch.turn[members]
    start = torch.stack([x, torch.zeros_like(x), z]) - batch.origin[members].t().view(3, -1, 1, 1)
    bounced = [sum(turn[:, i, k].view(-1, 1, 1) * world[k] for k in range(3)) for i in range(3)]
    scale = batch.scale[members].view(-1, 1, 1)
    begin = [sum(turn[:, i, k].view(-1, 1, 1) * start[k] for k in range(3)) / scale for i in range(3)]
    low, high = batch.low[members].view(-1, 1, 1, 3), batch.high[members].view(-1, 1, 1, 3)
    near, far = _enter_box(begin, bounced, low, high)
    which, row, col = ((far > near) & (ray[1] < -1e-3)).nonzero(as_tuple=True)
    if not len(which):
        return
    dirs = torch.stack([b[which, row, col] for b in bounced])
    own = local[which]
    rays = torch.cat([torch.stack([b[which, row, col] for b in begin]), dirs, group.q(own)])
    # A constant radius of 0.012 near the waterline: the ripples blur more than that.
    at, closest = _march(
        group, rays, near[which, row, col].clamp(min=0.3), far[which, row, col] + 0.3, 0.02, 0.6, 24
    )
    found = (closest < 1.0).nonzero().squeeze(1)
    if not len(found):
        return
    points = [rays[k, found] + at[found] * rays[3 + k, found] for k in range(3)]
    own, pixel = own[found], torch.full((len(found),), 0.02, device=batch.device)
    normal = _normals(group, points, rays[6:, found], group.members[own], pixel)
    full = torch.ones_like(pixel)
    shade = _shade(group, points, dirs[:, found], own, pixel, normal, 0.6 * full, full)
    share = ((1.0 - closest[found]) / 0.4).clamp(0.0, 1.0)
    spot = (group.members[own], slice(None), row[found], col[found])
    mirror[spot] = torch.cat([shade * share, share[None]]).t()


# --- the picture ------------------------------------------------------------------------------------


def render(
    scenes: Sequence[Scene],
    resolution: int = 128,
    device: str | torch.device = "cpu",
    *,
    supersample: int = 2,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pictures of scenes and where their objects are.

    Args:
        scenes: N scenes of any mix.
        resolution: R, pixels per side; 128 is native, a multiple of 2.
        device: where to compute and where the results lie.
        supersample: rays per pixel and axis; 2 is smooth, 1 for previews.
        chunk: scenes computed at a time; by default what suits the device at this resolution.
    Returns: images [N, 3, R, R] float32 sRGB in 0..1, and masks [N, 1, R, R]: the share of each pixel
        that the object covers, what is under water or behind not counted.
    Raises: ConfigError for an empty list or an odd resolution.
    """
    if not scenes:
        raise ConfigError("render got no scenes; pass at least one.")
    if resolution < 16 or resolution % 2:
        raise ConfigError(f"A resolution of {resolution} was asked for; use an even number, at least 16.")
    device = torch.device(device)
    if chunk is None:
        pixels = (resolution * supersample) ** 2
        chunk = max(1, (512 if device.type == "cuda" else 128) * 256**2 // pixels)
    with torch.no_grad():
        done = [
            _render_chunk(_Batch(scenes[i : i + chunk], device), resolution, supersample)
            for i in range(0, len(scenes), chunk)
        ]
    return torch.cat([image for image, _ in done]), torch.cat([mask for _, mask in done])


def _render_chunk(batch: _Batch, size: int, fine: int) -> tuple[Tensor, Tensor]:
    count, full, device = len(batch), size * fine, batch.device
    colour = torch.zeros(count, 3, full, full, device=device)
    cover = torch.zeros(count, full, full, device=device)
    # Shadows are soft: half resolution is enough for them.
    maps = torch.zeros(count, 3, size // 2, size // 2, device=device)
    maps[:, :2] = 1.0
    mirror = torch.zeros(count, 4, size, size, device=device)
    by_kind: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    by_place: dict[str, list[int]] = {}
    for i, scene in enumerate(batch.scenes):
        by_kind.setdefault((scene.kind, scene.extras), []).append(i)
        by_place.setdefault(scene.setting, []).append(i)
    for (kind, extras), members in by_kind.items():
        group = _Group(batch, kind, extras, members)
        _draw_objects(group, size, fine, colour, cover)
        _draw_ground_light(group, size // 2, maps)
        _draw_mirror(group, size, mirror)
    image = torch.empty(count, 3, size, size, device=device)
    mask = torch.empty(count, 1, size, size, device=device)
    # On a CPU few pictures at a time, so that a painter's intermediate results stay in the cache.
    step = count if device.type == "cuda" else max(1, 256**2 // full**2)
    for setting, members in by_place.items():
        for k in range(0, len(members), step):
            part = torch.tensor(members[k : k + step], device=device)
            image[part], mask[part] = _compose(batch, setting, part, colour, cover, maps, mirror, fine)
    return image, mask


def _compose(
    batch: _Batch,
    setting: str,
    part: Tensor,
    colour: Tensor,
    cover: Tensor,
    maps: Tensor,
    mirror: Tensor,
    fine: int,
) -> tuple[Tensor, Tensor]:
    """Object over place, through the lens: images [n, 3, R, R] and masks [n, 1, R, R] of one setting's scenes."""
    place = PLACES[setting]
    full = cover.shape[-1]
    u, v = _pixel_grid(full, batch.device)
    basis = batch.world_basis[part]
    dx, dy, dz = _directions(_spread_basis(basis, 2), u[None], v[None])
    ground = F.interpolate(maps[part], size=(full, full), mode="bilinear", align_corners=False)
    spread = math.tan(math.radians(FIELD_OF_VIEW / 2))
    afloat = place.afloat[1] > 0.0
    view = places.View(
        dx=dx, dy=dy, dz=dz, u=u, v=v, eye=batch.world_eye[part], basis=basis, spread=spread, pixel=2.0 * spread / full,
        detail=batch.detail[part], key=batch.key[part], sky=batch.sky[part], sun=batch.world_sun[part],
        shadow=ground[:, 0], ao=ground[:, 1], near=ground[:, 2],
        mirror=F.interpolate(mirror[part], size=(full, full), mode="bilinear", align_corners=False) if afloat else None,
    )  # fmt: skip
    # The lens is focused on the object, and wide open: that is how things are photographed.
    # At the picture's own resolution: nothing finer is left of it anyway.
    soft = _blurred(F.avg_pool2d(place.paint(view), fine), BACKDROP_BLUR * (full // fine))
    picture = F.interpolate(soft, size=(full, full), mode="bilinear", align_corners=False)
    own = cover[part]
    picture = picture * (1.0 - own) + colour[part].transpose(0, 1)
    if place.foreground is not None:
        paint, weight = place.foreground(view)
        picture = mix(picture, paint, weight)
    picture = F.avg_pool2d(_develop(picture).transpose(0, 1), fine)
    picture = _blurred(picture, LENS_BLUR * (full // fine))
    return picture ** (1.0 / 2.2), F.avg_pool2d(own[:, None], fine)


def _blurred(picture: Tensor, sigma: float) -> Tensor:
    """[A, B, h, w] under a Gaussian of sigma pixels, edges continued."""
    reach = math.ceil(2.5 * sigma)
    steps = torch.arange(-reach, reach + 1, device=picture.device, dtype=picture.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = F.pad(picture.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None])
    return flat.view_as(picture)


def _develop(light: Tensor) -> Tensor:
    """Linear light to linear 0..1: straight up to 0.8, then a shoulder, so that highlights do not clip hard."""
    light = light.clamp(min=0.0)
    return torch.where(light < 0.8, light, 1.0 - 0.2 * torch.exp(-(light - 0.8) / 0.2))
