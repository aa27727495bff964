"""Light on surfaces: normals, and the light that a point sends back along its ray."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.pocket.world.maths import mix, ramp
from coeffdiff.pocket.world.rendering.batch import Group
from coeffdiff.pocket.world.rendering.marks import mark_weight
from coeffdiff.pocket.world.rendering.patterns import paint_pattern
from coeffdiff.pocket.world.scene import PATTERNS
from coeffdiff.pocket.world.shapes import ROLES


def normals_at(group: Group, points: Sequence[Tensor], q: Tensor, s: Tensor, pixel: Tensor) -> Tensor:
    """Unit normals [3, P] by differences over about a third of a pixel, carved marks included."""
    step = (0.35 * pixel).clamp(min=1.5e-3)
    total = None
    for kx, ky, kz in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        x, y, z = points[0] + kx * step, points[1] + ky * step, points[2] + kz * step
        d = group.distance(x, y, z, q)
        if group.carved:
            for index in range(group.batch.marks.shape[1]):
                mark = group.batch.marks[s, index]
                d = d + mark[:, 10] * mark_weight(mark, x, y, z, None, 2.0 * pixel + 0.02)
        part = torch.stack([kx * d, ky * d, kz * d])
        total = part if total is None else total + part
    return F.normalize(total, dim=0)


def light_from(
    group: Group, points: Sequence[Tensor], ray: Tensor, which: Tensor, pixel: Tensor,
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
    base[:, i] = paint_pattern(batch, s[i], x[i], y[i], z[i], normal[:, i], pixel[i], base[:, i])
    if batch.marks.shape[1]:
        # Eyes, metal and accents stay as they are.
        i = (is_body | (role == ROLES.index("pale"))).nonzero().squeeze(1)
        coat = base[:, i]
        for index in range(batch.marks.shape[1]):
            mark = batch.marks[s[i], index]
            cover = mark_weight(mark, x[i], y[i], z[i], normal[:, i], pixel[i])
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
