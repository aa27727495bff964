"""The effect of one group of objects on the ground: shadow, occlusion, and a reflection in water."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.pocket.world.maths import ramp
from coeffdiff.pocket.world.places.waves import water_slopes, water_state
from coeffdiff.pocket.world.rendering.batch import Group
from coeffdiff.pocket.world.rendering.marching import enter_box, march, reaches_light
from coeffdiff.pocket.world.rendering.rays import pixel_grid, ray_directions, spread_basis
from coeffdiff.pocket.world.rendering.shading import light_from, normals_at


def draw_ground_light(group: Group, size: int, maps: Tensor) -> None:
    """Fill maps [N, 3, size, size] (key light, sky, nearness) where the group's objects touch the ground's light."""
    batch, members = group.batch, group.members
    u, v = pixel_grid(size, batch.device)
    ray = ray_directions(spread_basis(batch.basis[members], 2), u[None], v[None])
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
    maps[scene, 0, row, col] = reaches_light(group, x, y + 0.01, z, which, 0.02, 14)
    d_low = group.distance(x, y + 0.06, z, q)
    d_high = group.distance(x, y + 0.28, z, q)
    sky = 1.0 - 0.48 * (1.0 - d_low / 0.10).clamp(0.0, 1.0) - 0.40 * (1.0 - d_high / 0.34).clamp(0.0, 1.0)
    maps[scene, 1, row, col] = sky
    maps[scene, 2, row, col] = ramp(d_low, 0.13, 0.0)


def draw_mirror(group: Group, size: int, mirror: Tensor) -> None:
    """Fill mirror [N, 4, size, size] for the group's scenes afloat: the object in the rippled water."""
    batch = group.batch
    afloat = [k for k, i in enumerate(group.members.tolist()) if batch.scenes[i].sunk > 0.0]
    if not afloat:
        return
    local = torch.tensor(afloat, device=batch.device)
    members = group.members[local]
    u, v = pixel_grid(size, batch.device)
    ray = ray_directions(spread_basis(batch.world_basis[members], 2), u[None], v[None])
    eye = batch.world_eye[members]
    t = eye[:, 1].view(-1, 1, 1) / (-ray[1]).clamp(min=1e-3)
    x, z = eye[:, 0].view(-1, 1, 1) + t * ray[0], eye[:, 2].view(-1, 1, 1) + t * ray[2]
    phase, calm = water_state(batch.detail[members])
    lean_x, lean_z = water_slopes(x, z, phase.view(-1, 1, 1), calm.view(-1, 1, 1))
    up = F.normalize(torch.stack([-0.55 * lean_x, torch.ones_like(x), -0.55 * lean_z]), dim=0)
    down = torch.stack(ray)
    world = down - 2.0 * (down * up).sum(0) * up
    turn = batch.turn[members]
    start = torch.stack([x, torch.zeros_like(x), z]) - batch.origin[members].t().view(3, -1, 1, 1)
    bounced = [sum(turn[:, i, k].view(-1, 1, 1) * world[k] for k in range(3)) for i in range(3)]
    scale = batch.scale[members].view(-1, 1, 1)
    begin = [sum(turn[:, i, k].view(-1, 1, 1) * start[k] for k in range(3)) / scale for i in range(3)]
    low, high = batch.low[members].view(-1, 1, 1, 3), batch.high[members].view(-1, 1, 1, 3)
    near, far = enter_box(begin, bounced, low, high)
    which, row, col = ((far > near) & (ray[1] < -1e-3)).nonzero(as_tuple=True)
    if not len(which):
        return
    dirs = torch.stack([b[which, row, col] for b in bounced])
    own = local[which]
    rays = torch.cat([torch.stack([b[which, row, col] for b in begin]), dirs, group.q(own)])
    # A constant radius of 0.012 near the waterline: the ripples blur more than that.
    at, closest = march(
        group, rays, near[which, row, col].clamp(min=0.3), far[which, row, col] + 0.3, 0.02, 0.6, 24
    )
    found = (closest < 1.0).nonzero().squeeze(1)
    if not len(found):
        return
    points = [rays[k, found] + at[found] * rays[3 + k, found] for k in range(3)]
    own, pixel = own[found], torch.full((len(found),), 0.02, device=batch.device)
    normal = normals_at(group, points, rays[6:, found], group.members[own], pixel)
    full = torch.ones_like(pixel)
    shade = light_from(group, points, dirs[:, found], own, pixel, normal, 0.6 * full, full)
    share = ((1.0 - closest[found]) / 0.4).clamp(0.0, 1.0)
    spot = (group.members[own], slice(None), row[found], col[found])
    mirror[spot] = torch.cat([shade * share, share[None]]).t()
