"""What the networks that look at pictures learn from: renders, round trips of them, shifted and mirrored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.pocket import POCKET
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import progress
from pocket_build import renders
from pocket_build.fitting import mixed
from pocket_build.renders import Renders, as_float, round_trip
from pocket_build.workshop import Workshop, fingerprint

ROUND_TRIPS = {"train": 9_600, "individuals": 4_800}  # for those who look at pictures


def through_vae(shop: Workshop, source: Renders, pictures: int) -> Renders:
    """The first pictures of a set after a round trip, kept as files of their own for each VAE."""
    vae, files = shop.vae(), []
    own = fingerprint(shop.weights / POCKET / "vae")
    with progress(f"{source.name} through the VAE", pictures) as bar:
        for shard in range(pictures // renders.SHARD):
            file = shop.folder / f"renders-vae-{own}" / f"{source.name}-{shard:04d}.npy"
            if not file.exists():
                values = []
                end = (shard + 1) * renders.SHARD
                for begin in range(shard * renders.SHARD, end, 32):
                    images = as_float(source.images(range(begin, min(begin + 32, end)))).to(shop.device)
                    with torch.no_grad(), mixed(shop.device, shop.dtype):
                        seen = round_trip(vae, images)
                    values.append(seen.mul(255.0).add(0.5).to(torch.uint8).cpu())
                with atomic_write(file) as unfinished, unfinished.open("wb") as handle:
                    np.save(handle, torch.cat(values).numpy())
            files.append(file)
            bar((shard + 1) * renders.SHARD)
    return Renders(source.name, tuple(files))


def flipped(images: Tensor, lot: torch.Generator) -> Tensor:
    """Half of them mirrored, by lot."""
    flip = torch.rand(len(images), generator=lot) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def shifted(images: Tensor, lot: torch.Generator, reach: int = 8) -> Tensor:
    """Pictures moved by up to `reach` pixels, all of a batch alike, edges continued."""
    y, x = torch.randint(0, 2 * reach + 1, (2,), generator=lot).tolist()
    side = images.shape[-1]
    wide = F.pad(images.float(), (reach,) * 4, mode="replicate")
    return wide[..., y : y + side, x : x + side].to(images.dtype)


def plain_or_seen(plain: Renders, seen: Renders, indices: Sequence[int], lot: torch.Generator) -> Tensor:
    """Each picture plain or, where there is one, by lot its round trip."""
    coin = torch.rand(len(indices), generator=lot) < 0.5
    return torch.cat(
        [
            (seen if index < len(seen) and chance else plain).images([index])
            for index, chance in zip(indices, coin.tolist(), strict=True)
        ]
    )


def drawn_from(rows: Sequence[int], count: int, lot: torch.Generator) -> list[int]:
    return [rows[i] for i in torch.randint(len(rows), (count,), generator=lot).tolist()]
