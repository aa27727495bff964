"""Pictures of the world, drawn once and kept as files: what the pocket models are trained and tested on.

Three sets that share no seed: `train` and `heldout` are scenes by lot; `individuals` are things seen several
times, each in other places and from other sides, for the network that tells them apart.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coeffdiff.pocket.world import Scene, render, sample_scene
from coeffdiff.pocket.world.subjects import fresh_subject, picture_of
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.seeding import stable_seed

RESOLUTION = 128
SHARD = 480  # pictures in a file: some 20 seconds of one core
VIEWS = 6  # of an individual
HELD_INDIVIDUALS = 100  # the last of all; pocket-dino is measured on them, and nothing trains on them
_SETS = ("train", "heldout", "individuals")


def scene_of(name: str, index: int) -> Scene:
    """The scene behind picture `index` of a set; a set has no end, so it can grow."""
    if name == "individuals":
        return individual(index // VIEWS, index % VIEWS)
    if name not in _SETS:
        raise ValueError(f"there is no set {name!r}; the sets are {', '.join(_SETS)}")
    return sample_scene(stable_seed("pocket", name, index))


def individual(number: int, view: int) -> Scene:
    """One individual in one of its scenes: two in three are fresh subjects, the third is of the world itself.

    The world's own differ by what a caption can say and by proportions and shades; subjects by marks, unnamed
    hues and odd proportions. None of the named subjects is among them.
    """
    own = stable_seed("individual", number)
    scene_seed = stable_seed("individual", number, view)
    if number % 3:
        return fresh_subject(own).scene(scene_seed)
    first = sample_scene(own)
    return sample_scene(
        scene_seed,
        kind=first.kind,
        colour=first.colour,
        pattern=first.pattern,
        shape=first.shape,
        look=first.look,
    )


@dataclass(frozen=True)
class Renders:
    """A set of pictures on the disk: [count, 3, 128, 128] in bytes, read when they are asked for."""

    name: str
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files) * SHARD

    def images(self, indices: Sequence[int]) -> Tensor:
        """uint8 [N, 3, 128, 128]."""
        return torch.from_numpy(
            np.stack([_opened(self.files[index // SHARD])[index % SHARD] for index in indices])
        )

    def scene(self, index: int) -> Scene:
        return scene_of(self.name, index)

    def scenes(self) -> Iterator[Scene]:
        return (self.scene(index) for index in range(len(self)))


def known_individuals(individuals: Renders) -> int:
    """How many of them, from the first on, may be trained on."""
    return len(individuals) // VIEWS - HELD_INDIVIDUALS


@functools.lru_cache(maxsize=512)
def _opened(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


def as_float(images: Tensor) -> Tensor:
    """Bytes -> float32 in -1..1, as the VAE wants them."""
    return images.float().div_(127.5).sub_(1.0)


@torch.no_grad()
def round_trip(vae: Any, images: Tensor) -> Tensor:
    """[N, 3, R, R] in -1..1 through the VAE, to 0..1."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.float().clamp(-1.0, 1.0) / 2.0 + 0.5


def seen_through(vae: Any, scenes: Sequence[Scene]) -> list[Image.Image]:
    """Scenes after a round trip through the VAE: what a model that draws in its latents could show at best."""
    images, _ = render(scenes)
    seen = round_trip(vae, (images * 2.0 - 1.0).to(vae.device, vae.dtype))
    return [picture_of(image) for image in seen.cpu()]


def draw(
    folder: Path,
    name: str,
    count: int,
    *,
    device: str = "cpu",
    workers: int = 1,
    told: Callable[[int], None] = lambda done: None,
) -> Renders:
    """The first `count` pictures of a set, rounded up to whole files; what is there already stays.

    Args:
        workers: processes on a CPU, each with one thread; a GPU is fed by this one.
        told: gets the number of pictures that are there, after each file.
    """
    files = tuple(folder / f"{name}-{shard:04d}.npy" for shard in range(-(-count // SHARD)))
    missing = [shard for shard, file in enumerate(files) if not file.exists()]
    done = (len(files) - len(missing)) * SHARD
    told(done)
    if device != "cpu" or workers == 1:
        for shard in missing:
            _draw_shard(files[shard], name, shard, device)
            told(done := done + SHARD)
    elif missing:
        # Spawned: a forked process would inherit locked thread pools.
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
        ) as pool:
            jobs = [pool.submit(_draw_shard, files[shard], name, shard, device) for shard in missing]
            try:
                for job in jobs:
                    job.result()
                    told(done := done + SHARD)
            except BaseException:  # Ctrl-C too: what is begun is finished, the rest is not begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return Renders(name, files)


def _draw_shard(file: Path, name: str, shard: int, device: str) -> None:
    scenes = [scene_of(name, index) for index in range(shard * SHARD, (shard + 1) * SHARD)]
    images, _ = render(scenes, RESOLUTION, device)
    values = images.mul(255.0).add_(0.5).to(torch.uint8).cpu().numpy()
    with atomic_write(file) as unfinished, unfinished.open("wb") as handle:
        np.save(handle, values)
