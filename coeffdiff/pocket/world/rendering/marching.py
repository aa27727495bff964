"""Sphere tracing: where rays meet the surface, and how much of the light reaches a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coeffdiff.pocket.world.rendering.batch import Group


def enter_box(
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


def march(
    group: Group, rays: Tensor, start: Tensor, end: Tensor, reach: float, tolerance: float, steps: int
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


def reaches_light(
    group: Group, x: Tensor, y: Tensor, z: Tensor, which: Tensor, start: float, steps: int
) -> Tensor:
    """Share of the key light [P] that reaches points [P] of the group's scenes `which`: 1 lit, 0 in shadow.

    The closest approach on the way to the light, seen from the point, gives the penumbra.
    """
    scene = group.members[which]
    sun = group.batch.sun[scene]
    ray = sun.unbind(1)
    near, far = enter_box((x, y, z), ray, group.batch.low[scene] - 0.06, group.batch.high[scene] + 0.06)
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
