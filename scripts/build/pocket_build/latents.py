"""What the UNet learns from: latents of every picture, as it is and varied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import progress
from coeffdiff.utils.seeding import generator_for
from pocket_build import renders
from pocket_build.fitting import mixed
from pocket_build.renders import RESOLUTION, as_float
from pocket_build.workshop import Workshop, fingerprint

VARIANTS = 2  # of each picture: as it is, and mirrored or cut out of an enlargement
_ENLARGED = (136, 160)


def build_latents(shop: Workshop) -> tuple[Tensor, Tensor]:
    """What the UNet learns from: latents as mean and deviation, and SDXL's time ids.

    Returns: [2 N, 8, 16, 16] float16 scaled by the VAE's factor, and [2 N, 6]; picture i has rows 2 i and 2 i + 1.
    """
    vae, files = shop.vae(), []
    # The decoder may still change; latents are of this encoder.
    own = fingerprint({k: v for k, v in vae.state_dict().items() if k.startswith(("encoder", "quant"))})
    vae, shards = vae.to(memory_format=torch.channels_last), len(shop.train.files)
    with progress("latents", shards) as bar:
        for shard in range(shards):
            file = shop.folder / "latents" / own / f"{shard:04d}.npz"
            if not file.exists():
                _encode_shard(shop, vae, shard, file)
            files.append(file)
            bar(shard + 1)
    parts = [np.load(file) for file in files]
    latents = torch.cat([torch.from_numpy(part["latents"]) for part in parts])
    return latents, torch.cat([torch.from_numpy(part["time_ids"]) for part in parts])


@torch.no_grad()
def _encode_shard(shop: Workshop, vae: Any, shard: int, file: Path) -> None:
    latents, time_ids = [], []
    end = (shard + 1) * renders.SHARD
    for begin in range(shard * renders.SHARD, end, 16):
        images, ids = [], []
        for index, image in enumerate(shop.train.images(range(begin, min(begin + 16, end))), start=begin):
            for variant in range(VARIANTS):
                seen, own = varied(image, generator_for("latents", index, variant), variant)
                images.append(seen)
                ids.append(own)
        batch = as_float(torch.stack(images)).to(shop.device)
        with mixed(shop.device, shop.dtype):
            posterior = vae.encode(batch).latent_dist
        both = torch.cat([posterior.mean, posterior.std], dim=1).float() * vae.config.scaling_factor
        latents.append(both.to(torch.float16).cpu())
        time_ids.append(torch.tensor(ids))
    with atomic_write(file) as unfinished, unfinished.open("wb") as handle:
        np.savez(handle, latents=torch.cat(latents).numpy(), time_ids=torch.cat(time_ids).numpy())


def varied(image: Tensor, lot: torch.Generator, variant: int) -> tuple[Tensor, list[float]]:
    """A picture [3, R, R] as bytes, and its SDXL time ids (original height and width, crop top and left, target).

    Variant 0 is the picture itself; half of these say that they were larger once, as photos were. Variant 1 is
    mirrored, or, every other time, a square out of an enlargement, with what was cut off in the ids.
    """
    chance = torch.rand(4, generator=lot).tolist()
    original, top, left = RESOLUTION, 0, 0
    if variant and chance[0] < 0.5:
        original = _ENLARGED[0] + int(chance[1] * (_ENLARGED[1] - _ENLARGED[0] + 1))
        top, left = (int(part * (original - RESOLUTION + 1)) for part in chance[2:])
        big = F.interpolate(image[None].float(), original, mode="bicubic", antialias=True)[0]
        image = big[:, top : top + RESOLUTION, left : left + RESOLUTION].round().clamp(0, 255).to(torch.uint8)
    else:
        image = image.flip(-1) if variant else image
        if chance[1] < 0.5:
            original = round(RESOLUTION * 2 ** (5 * chance[2]))
    return image, [float(n) for n in (original, original, top, left, RESOLUTION, RESOLUTION)]
