"""Pictures of scenes: objects over places, through the lens.

Shape letters: N scenes, n scenes of one place, R resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.errors import ConfigError
from coeffdiff.pocket.world.maths import mix
from coeffdiff.pocket.world.places import PLACES, View
from coeffdiff.pocket.world.rendering.batch import Batch, Group
from coeffdiff.pocket.world.rendering.ground import draw_ground_light, draw_mirror
from coeffdiff.pocket.world.rendering.objects import draw_objects
from coeffdiff.pocket.world.rendering.rays import pixel_grid, ray_directions, spread_basis
from coeffdiff.pocket.world.scene import FIELD_OF_VIEW, Scene

# Standard deviations, as shares of the picture's side.
BACKDROP_BLUR = 1.6 / 128  # of everything behind and under the object
LENS_BLUR = 0.5 / 128  # of the whole picture


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
            _render_chunk(Batch(scenes[i : i + chunk], device), resolution, supersample)
            for i in range(0, len(scenes), chunk)
        ]
    return torch.cat([image for image, _ in done]), torch.cat([mask for _, mask in done])


def _render_chunk(batch: Batch, size: int, fine: int) -> tuple[Tensor, Tensor]:
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
        group = Group(batch, kind, extras, members)
        draw_objects(group, size, fine, colour, cover)
        draw_ground_light(group, size // 2, maps)
        draw_mirror(group, size, mirror)
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
    batch: Batch,
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
    u, v = pixel_grid(full, batch.device)
    basis = batch.world_basis[part]
    dx, dy, dz = ray_directions(spread_basis(basis, 2), u[None], v[None])
    ground = F.interpolate(maps[part], size=(full, full), mode="bilinear", align_corners=False)
    spread = math.tan(math.radians(FIELD_OF_VIEW / 2))
    afloat = place.afloat[1] > 0.0
    view = View(
        dx=dx, dy=dy, dz=dz, u=u, v=v, eye=batch.world_eye[part], basis=basis, spread=spread, pixel=2.0 * spread / full,
        detail=batch.detail[part], key=batch.key[part], sky=batch.sky[part], sun=batch.world_sun[part],
        shadow=ground[:, 0], ao=ground[:, 1], near=ground[:, 2],
        mirror=F.interpolate(mirror[part], size=(full, full), mode="bilinear", align_corners=False) if afloat else None,
    )  # fmt: skip
    # The lens is focused on the object, and wide open: that is how things are photographed.
    # At the picture's own resolution: the blur leaves nothing finer.
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
