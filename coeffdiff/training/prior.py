"""Prior preservation: what a class is to keep meaning while a subject is learned, and who teaches it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coeffdiff.config.schema import PhotoSettings, Settings, SubjectSettings
from coeffdiff.data.batches import Batch, Prior
from coeffdiff.data.encoding import EncodedPhoto, sizes_of
from coeffdiff.data.photos import Photo, PhotoSet, read_photos
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.hosts.guard import unwrapped
from coeffdiff.hosts.lora.layers import lora_off
from coeffdiff.hosts.unet import alpha_off
from coeffdiff.models.pipelines import conditions
from coeffdiff.training.objective import PriorTerm
from coeffdiff.utils.console import Bar, print_info, progress


def read_class_pictures(settings: Settings) -> PhotoSet | None:
    """The pictures of prior.images, or of each subject's prior_images; None without any.

    Raises: ConfigError without a class word or a weight, or if they are the photos; PhotoError as read_photos.
    """
    if not settings.prior.weight:
        if any(settings.class_folders):
            raise ConfigError("prior_images have no effect at prior.weight 0; DreamBooth's weight is 1.")
        return None
    pictures: list[Photo] = []
    sets: list[PhotoSet] = []
    pairs = zip(settings.each_subject, settings.class_folders, strict=True)
    for number, (subject, folder) in enumerate(pairs):
        if not subject.class_word:
            raise ConfigError(
                "prior.weight keeps what the class word means, and there is none"
                + (f" for {subject.token}: add it, " if settings.subjects else ": add --class-word, ")
                + "or leave it at 0."
            )
        if folder is not None:
            found = _class_pictures(subject, folder, "prior_images" if settings.subjects else "prior.images")
            pictures += [replace(picture, subject=number) for picture in found.photos]
            sets.append(found)
    if not sets:
        return None
    skipped = tuple(one for found in sets for one in found.skipped)
    return PhotoSet(tuple(pictures), skipped, tuple(note for found in sets for note in found.notes))


def _class_pictures(subject: SubjectSettings, folder: Path, setting: str) -> PhotoSet:
    if subject.images is not None and folder.resolve() == subject.images.resolve():
        raise ConfigError(
            f"{setting} and the photos are the same folder, {folder}; give one with other pictures of "
            f"{subject.class_word}, or leave {setting} out."
        )
    try:
        return read_photos(folder, masks=False, wanted=f"some of {subject.class_word}")
    except PhotoError as error:
        raise PhotoError(f"{setting}: {error}") from None


def print_prior(settings: Settings, pictures: PhotoSet | None) -> None:
    """A line on who teaches what the classes are, and what was left out of the pictures of them."""
    prior, words = settings.prior, [str(subject.class_word) for subject in settings.each_subject]
    if not prior.weight:
        return
    if pictures is None:
        what = " and ".join(dict.fromkeys(words))
        print_info(f"prior    weight {prior.weight:g}; the model without its adapters teaches what {what} is")
        return
    for number, (word, folder) in enumerate(zip(words, settings.class_folders, strict=True)):
        count = sum(picture.subject == number for picture in pictures.photos)
        left_out = sum(skipped.path.parent == folder for skipped in pictures.skipped)
        print_info(
            f"prior    weight {prior.weight:g}; {count} {'pictures' if count > 1 else 'picture'} of {word} in "
            f"{folder}" + (f", {left_out} left out" if left_out else "")
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

    A batch has one latent size, that of its photos. So every picture of a class is encoded once in each size that the
    photos of its subject have, as much of it as fits.
    through_vae: encode_photos for this model and run.
    """
    if not settings.prior.weight:
        return None
    if pictures is None:
        return Prior(of_class)
    encoded: list[EncodedPhoto] = []
    whole = PhotoSettings(augmentations=1, cache=settings.photos.cache)
    work = []
    for number in range(len(settings.each_subject)):
        pairs = zip(pictures.photos, of_pictures, strict=True)
        own = [(picture, texts) for picture, texts in pairs if picture.subject == number]
        work += [(size, own) for size in sizes_of(photo for photo in photos if photo.subject == number)]
    with progress("encoding pictures of the class", sum(len(own) for _, own in work)) as bar:
        count = counting_photos(bar)
        for size, own in work:
            chosen, texts = zip(*own, strict=True)
            encoded += through_vae(chosen, texts, settings=whole, size=size, on_photo=count)
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
        teacher = teacher_for(batch, unet) if settings.class_folders[0] is None else None
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
