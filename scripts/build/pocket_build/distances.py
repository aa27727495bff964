"""How far pocket's pictures are from renders: Fréchet and kernel distance in pocket-dino's features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from coeffdiff.metrics.encoders import Encoder, load_dino
from coeffdiff.pocket import POCKET, POCKET_DINO
from coeffdiff.pocket.world import render
from coeffdiff.pocket.world.subjects import picture_of
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import progress
from coeffdiff.utils.seeding import stable_seed
from pocket_build.drawn import TOGETHER, captioned_scene, drawn, measured_pipeline
from pocket_build.fitting import mixed
from pocket_build.renders import RESOLUTION, as_float, round_trip
from pocket_build.workshop import Workshop, fingerprint

SUBSETS, SUBSET = 100, 500  # of the kernel distance
GUIDANCE = 5.0  # `sample`'s own
WEAK, FEWER = 2.0, 5  # a weaker one, at which so many times fewer pictures are made


def measure_distances(shop: Workshop, pictures: int = 2_000, steps: int = 25) -> dict[str, float]:
    """Distances of pictures to renders, with equal captions; of the first fifth of them, at two guidances; and of
    renders after a round trip through the VAE, which is what no UNet can be better than. Pictures are made in the
    workshop's precision, which halves their time where it is bfloat16. Features are kept as files, so that a stopped
    measurement goes on."""
    dino = load_dino(str(shop.weights / POCKET_DINO), shop.device)
    pipe, facts = measured_pipeline(shop), shop.machine()
    of = fingerprint(shop.weights / POCKET)
    own = f"{of}-{facts['precision']}"

    def pictured(guidance: float, indices: range) -> Tensor:
        with mixed(shop.device, shop.dtype):
            return drawn(pipe, "distances", indices, steps=steps, guidance=guidance) / 255.0

    def seen(indices: range) -> Tensor:
        plain = as_float(_rendered(indices)).to(shop.device)
        with mixed(shop.device, shop.dtype):
            return round_trip(pipe.vae, plain).float()

    features = partial(_features, shop, dino)
    real = features(pictures, "renders", lambda indices: _rendered(indices) / 255.0)
    made = features(pictures, f"pictures-{own}", partial(pictured, GUIDANCE))
    fewer = pictures // FEWER
    weak = features(fewer, f"pictures-guided-by-{WEAK:g}-{own}", partial(pictured, WEAK))
    sets = {
        "": made,
        "_vae": features(pictures, f"vae-{own}", seen),
        "_of_fewer": made[:fewer],
        "_of_fewer_guided_weakly": weak,
    }
    found = {f"{n}{which}": value for which, one in sets.items() for n, value in distances(real, one).items()}
    chosen = {"pictures": pictures, "sampling_steps": steps, "guidance": GUIDANCE}
    chosen |= {"fewer": fewer, "weak_guidance": WEAK}
    shop.note("distances", **found, **chosen, of=of, **facts)
    return found


def distances(real: Tensor, other: Tensor) -> dict[str, float]:
    """Fréchet distance, and kernel distance with its deviation over subsets, between features [N, D].

    Source: arXiv 1706.08500, and 1801.01401 with its cubic polynomial kernel; torchmetrics computes them.
    """
    given = _Given(real.shape[1])
    frechet = FrechetInceptionDistance(feature=given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        subset = min(SUBSET, len(real), len(other))
        kernel = KernelInceptionDistance(feature=given, subsets=SUBSETS, subset_size=subset)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(other, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed("distances"))  # the subsets' own
        mean, deviation = kernel.compute()
    return {
        "frechet": round(float(frechet.compute()), 5),
        "kernel": round(float(mean), 6),
        "kernel_deviation": round(float(deviation), 6),
    }


class _Given(nn.Identity):
    """In the place of a network: takes features for pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def _rendered(indices: range) -> Tensor:
    images, _ = render([captioned_scene("distances", index)[0] for index in indices], RESOLUTION)
    return images.mul(255.0).round()


def _features(
    shop: Workshop, dino: Encoder, count: int, name: str, made: Callable[[range], Tensor]
) -> Tensor:
    """Features [count, D] of pictures that are made some at a time."""
    parts = []
    with progress(f"features of {name}", count) as bar:
        for begin in range(0, count, TOGETHER):
            own = range(begin, min(begin + TOGETHER, count))
            file = shop.folder / "features" / name / f"{own.start:05d}-{own.stop:05d}.npy"
            if not file.exists():
                images = [picture_of(image) for image in made(own).cpu()]
                _keep(file, dino.features(images))
            parts.append(torch.from_numpy(np.load(file)))
            bar(own.stop)
    return torch.cat(parts)


def _keep(file: Path, features: Tensor) -> None:
    with atomic_write(file) as unfinished, unfinished.open("wb") as handle:
        np.save(handle, features.cpu().numpy())
