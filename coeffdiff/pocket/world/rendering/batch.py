"""Scenes as tensors: a batch of any mix, and its groups of scenes with one distance field.

Shape letters: N scenes, P points of a group in no order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coeffdiff.pocket.world import shapes
from coeffdiff.pocket.world.maths import linear
from coeffdiff.pocket.world.places import DETAILS, PLACES
from coeffdiff.pocket.world.scene import MARK_SHAPES, PATTERNS, Mark, Scene
from coeffdiff.pocket.world.shapes import KINDS, ROLES


class Batch:
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
        self.detail = put(rest[:, 8 : 8 + DETAILS])
        self.pattern = torch.tensor([PATTERNS.index(scene.pattern) for scene in scenes], device=device)
        most = max(len(scene.marks) for scene in scenes)
        blank = [-1.0] + [0.0] * 15
        marks = [[_mark_numbers(m) for m in s.marks] + [blank] * (most - len(s.marks)) for s in scenes]
        self.marks = torch.tensor(marks, dtype=torch.float32, device=device).view(len(scenes), most, 16)

    def __len__(self) -> int:
        return len(self.scenes)


def _numbers(scene: Scene) -> list[float]:
    """The row of one scene, in world units and linear light; the columns are those Batch takes apart."""
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
    paint = [linear(c) for role in ROLES for c in look.colours[role]]
    second = [linear(c) for c in look.second]
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
    colour = [linear(c) for c in mark.colour]
    return [
        float(MARK_SHAPES.index(mark.shape)), *mark.at, *mark.size, *facing, math.radians(mark.turn), mark.depth,
        *colour, math.cos(yaw), -math.sin(yaw),
    ]  # fmt: skip


class Proportions:
    """Rows of a tensor by the names of proportions: what a field's `q` is."""

    def __init__(self, names: Sequence[str], rows: Tensor) -> None:
        self.__dict__.update(zip(names, rows.unbind(0), strict=True))


class Group:
    """The scenes of a batch with one kind and the same extras: one field for all of them."""

    def __init__(self, batch: Batch, kind: str, extras: tuple[str, ...], members: list[int]) -> None:
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
        return shapes.distance(self.kind, self.extras, x, y, z, Proportions(self.names, q))

    def roles(self, x: Tensor, y: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """Index into ROLES [P] of the nearest part."""
        best: Tensor | None = None
        for role, distance in shapes.parts_of(self.kind, self.extras, x, y, z, Proportions(self.names, q)):
            if best is None:
                best, which = distance, torch.full_like(distance, ROLES.index(role), dtype=torch.long)
            else:
                which = torch.where(distance < best, ROLES.index(role), which)
                best = torch.minimum(best, distance)
        return which
