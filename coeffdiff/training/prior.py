"""Prior preservation: what a class is to keep meaning while a subject is learned, and who teaches it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coeffdiff.config.schema import PhotoSettings, Settings
from coeffdiff.data.batches import Batch, Prior
from coeffdiff.data.encoding import EncodedPhoto, sizes_of
from coeffdiff.data.photos import Photo, PhotoSet, read_photos
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.hosts.guard import unwrapped
from coeffdiff.hosts.lora import lora_off
from coeffdiff.hosts.unet import alpha_off
from coeffdiff.models.pipelines import conditions
from coeffdiff.training.objective import PriorTerm
from coeffdiff.utils.console import Bar, print_info, progress


def read_class_pictures(settings: Settings) -> PhotoSet | None:
    """The pictures of prior.images, or None without any.

    Raises: ConfigError without a class word or if they are the photos themselves; PhotoError as read_photos.
    """
    subject, prior = settings.subject, settings.prior
    if not prior.weight:
        return None
    if not subject.class_word:
        raise ConfigError(
            "prior.weight keeps what the class word means, and there is none: add --class-word, or leave it at 0."
        )
    if prior.images is None:
        return None
    if subject.images is not None and prior.images.resolve() == subject.images.resolve():
        raise ConfigError(
            f"prior.images and the photos are the same folder, {prior.images}; give one with other pictures of "
            f"{subject.class_word}, or leave prior.images out."
        )
    try:
        return read_photos(prior.images, masks=False, wanted=f"some of {subject.class_word}")
    except PhotoError as error:
        raise PhotoError(f"prior.images: {error}") from None


def print_prior(settings: Settings, pictures: PhotoSet | None) -> None:
    """A line on who teaches what the class is, and what was left out of the pictures of it."""
    prior, word = settings.prior, settings.subject.class_word
    if not prior.weight:
        return
    if pictures is None:
        print_info(f"prior    weight {prior.weight:g}; the model without its adapters teaches what {word} is")
        return
    count, left_out = len(pictures.photos), len(pictures.skipped)
    print_info(
        f"prior    weight {prior.weight:g}; {count} {'pictures' if count > 1 else 'picture'} of {word} in "
        f"{prior.images}" + (f", {left_out} left out" if left_out else "")
    )
    for skipped in pictures.skipped:
        print_info(f"         left out {skipped.path.name}: {skipped.reason}")
    for note in pictures.notes:
        print_info(f"         {note}")


def encode_prior(
    settings: Settings,
    of_class: dict[str, str],
    pictures: PhotoSet | None,
    of_pictures: Sequence[tuple[str, ...]],
    photos: Sequence[EncodedPhoto],
    through_vae: Callable[..., tuple[EncodedPhoto, ...]],
) -> Prior | None:
    """What LatentData draws the class's rows from; None without prior preservation.

    A batch has one latent size, that of its photos. So every picture of the class is encoded once in each size that
    the photos have, as much of it as fits.
    through_vae: encode_photos for this model and run.
    """
    if not settings.prior.weight:
        return None
    if pictures is None:
        return Prior(of_class)
    encoded: list[EncodedPhoto] = []
    sizes, whole = sizes_of(photos), PhotoSettings(augmentations=1, cache=settings.photos.cache)
    with progress("encoding pictures of the class", len(pictures.photos) * len(sizes)) as bar:
        count = counting_photos(bar)
        for size in sizes:
            encoded += through_vae(pictures.photos, of_pictures, settings=whole, size=size, on_photo=count)
    return Prior({}, tuple(encoded))


def counting_photos(bar: Bar) -> Callable[[Photo, bool], None]:
    """An on_photo for encode_photos that moves a bar by one."""
    done = itertools.count(1)
    return lambda photo, cached: bar(next(done))


def loss_terms(batch: Batch, unet: nn.Module, settings: Settings) -> dict[str, Any]:
    """What denoising_loss is to be told of this batch beyond latents, noise and timesteps."""
    terms: dict[str, Any] = {}
    if batch.weights is not None:
        terms["weights"] = batch.weights
    if batch.class_rows:
        teacher = teacher_for(batch, unet) if settings.prior.images is None else None
        terms["prior"] = PriorTerm(batch.class_rows, settings.prior.weight, teacher)
    return terms


def teacher_for(batch: Batch, unet: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What the base model predicts for a batch's class rows: the same network, its adapters off meanwhile.

    unet: without DistributedDataParallel around it, which would wait for a backward; Accelerate's autocast, which
    replaces the module's forward, stays on.
    """
    unet, rows = unwrapped(unet), slice(-batch.class_rows, None)

    def teach(noisy: Tensor, timesteps: Tensor) -> Tensor:
        added = conditions(batch.pooled[rows], batch.time_ids[rows])
        # On again before the student's forward: what gradient checkpointing computes anew in backward is the student
        with torch.no_grad(), alpha_off(unet), lora_off(unet):
            return unet(noisy, timesteps, batch.embeds[rows], **added).sample

    return teach
