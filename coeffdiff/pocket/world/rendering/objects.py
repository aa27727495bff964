"""One group of objects: their pixels, from cones for 2 x 2 pixels down to subsamples.

Shape letters: N scenes, n scenes of one group, P rays or points of a group in no order, F pixels a side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coeffdiff.pocket.world.maths import ramp
from coeffdiff.pocket.world.rendering.batch import Group
from coeffdiff.pocket.world.rendering.marching import enter_box, march, reaches_light
from coeffdiff.pocket.world.rendering.rays import pixel_grid, ray_directions, spread_basis
from coeffdiff.pocket.world.rendering.shading import light_from, normals_at
from coeffdiff.pocket.world.scene import FIELD_OF_VIEW


def draw_objects(group: Group, size: int, fine: int, colour: Tensor, cover: Tensor) -> None:
    """Fill colour [N, 3, F, F] (premultiplied) and cover [N, F, F] for the group's scenes, F = size * fine."""
    batch, members = group.batch, group.members
    basis, eye = batch.basis[members], batch.eye[members]
    spread = 2.0 * math.tan(math.radians(FIELD_OF_VIEW / 2))
    pixel = spread / size  # per distance, in the picture's middle

    # First one cone for 2 x 2 pixels, wherever it may meet the box.
    coarse = size // 2
    u, v = pixel_grid(coarse, batch.device)
    ray = ray_directions(spread_basis(basis, 2), u[None], v[None])
    low, high = (edge[members].view(-1, 1, 1, 3) for edge in (batch.low, batch.high))
    margin = 2.0 * pixel * eye.norm(dim=1).view(-1, 1, 1, 1)
    near, far = enter_box([eye[:, k].view(-1, 1, 1) for k in range(3)], ray, low - margin, high + margin)
    which, row, col = (far > near).nonzero(as_tuple=True)
    at, far = near[which, row, col], far[which, row, col]
    rays = torch.cat([eye[which].t(), torch.stack([r[which, row, col] for r in ray]), group.q(which)])
    frames = basis.view(-1, 9)
    # Each level starts where the one before may have touched; with tolerance 1 a cone that holds its
    # square's corners (0.72 of its side) stops there. The last level are single rays.
    for grid, divide in ((size, 2), (size * fine, fine)):
        at, closest = march(group, rays, at, far, 0.72 * spread / (grid // divide), 1.0, 40)
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
        dirs = torch.stack(ray_directions(frames[which].t().view(3, 3, -1), u, v))
        rays = torch.cat([eye[which].t(), dirs, group.q(which)])
    # The last rays end at the ground, so that the underside of an object is never seen.
    floor = (batch.low[members[which], 1] - rays[1]) / rays[4].clamp(max=-1e-4)
    far = torch.where(rays[4] < -1e-4, torch.minimum(far, floor), far)
    at, closest = march(group, rays, at, far, pixel / fine, 0.2, 36)
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
    normal[:, found] = normals_at(group, place, rays[6:, found], members[which[found]], step[found])
    lone = best[hit[best]]
    out_x, out_y, out_z = (points[k][lone] + 0.02 * normal[k, lone] for k in range(3))
    q = group.q(which[lone])
    light = torch.ones(len(best), device=batch.device)
    sky = torch.ones_like(light)
    pixel_of = lone // parts
    light[pixel_of] = reaches_light(group, out_x, out_y, out_z, which[lone], 0.03, 9)
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
    shade = light_from(
        group, place, dirs[:, found], which[found], step[found], normal[:, found], light[back], sky[back]
    )
    scene, share = members[which[found]], share[found]
    colour[scene, :, row[found], col[found]] = (shade * share).t()
    cover[scene, row[found], col[found]] = share
