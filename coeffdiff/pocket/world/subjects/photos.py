"""Photos of a subject, as tensors and as files."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from coeffdiff.pocket.world.places import SETTINGS
from coeffdiff.pocket.world.rendering import render
from coeffdiff.pocket.world.scene import Scene
from coeffdiff.pocket.world.shapes import KINDS
from coeffdiff.pocket.world.subjects.subject import Subject
from coeffdiff.utils.seeding import stable_seed

# Settings in which all subjects can be seen well
PHOTO_SETTINGS = tuple(s for s in SETTINGS if s not in ("floating on top of water", "at night"))


def photo_scenes(subject: Subject, count: int = 5, seed: int = 0) -> list[Scene]:
    """`count` scenes of a subject: settings differ as long as there are any, views, light and camera vary."""
    order = list(PHOTO_SETTINGS)
    random.Random(stable_seed("photos", subject.name, seed)).shuffle(order)
    # People photograph things from the front: of all views of the kind, the frontal ones if there are any.
    views = [
        (max(low, -65.0), min(high, 65.0)) for low, high in KINDS[subject.kind].views if low < 0.0 < high
    ]
    scenes = []
    for i in range(count):
        own = stable_seed("photo", subject.name, seed, i)
        rng = random.Random(own)
        view = {"view": rng.uniform(*rng.choice(views))} if views else {}
        scenes.append(subject.scene(own, setting=order[i % len(order)], **view))
    return scenes


def subject_photos(
    subject: Subject, count: int = 5, seed: int = 0, resolution: int = 128, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, list[Scene]]:
    """Photos of a subject: images [count, 3, R, R] in 0..1, masks [count, 1, R, R], and their scenes."""
    scenes = photo_scenes(subject, count, seed)
    images, masks = render(scenes, resolution, device)
    return images, masks, scenes


def write_photos(
    subject: Subject,
    folder: str | Path,
    count: int = 5,
    seed: int = 0,
    resolution: int = 256,
    *,
    masks: bool = False,
) -> list[Path]:
    """Photos of a subject as files 00.jpg, 01.jpg, ... (quality 95), as a user's folder would hold them.

    Args:
        folder: made if missing; files of the same names are overwritten.
        masks: also write 00.mask.png, ...: white where the subject is.
    Returns: the paths of the photos.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images, shares, _ = subject_photos(subject, count, seed, resolution)
    paths = []
    for i in range(count):
        path = folder / f"{i:02d}.jpg"
        picture_of(images[i]).save(path, quality=95)
        if masks:
            picture_of(shares[i]).save(folder / f"{i:02d}.mask.png")
        paths.append(path)
    return paths


def picture_of(values: Tensor) -> Image.Image:
    """[C, R, R] in 0..1 -> 8 bits; one channel becomes grey."""
    bytes_ = (values.clamp(0.0, 1.0) * 255.0 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(bytes_.squeeze(-1) if bytes_.shape[-1] == 1 else bytes_)
