"""Photos to latents and captions to text embeddings, once before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coeffdiff.config.schema import PhotoSettings
from coeffdiff.data.latent_cache import DAY_SECONDS, cache_folder, cache_key, read_cache, write_cache
from coeffdiff.data.photos import Photo
from coeffdiff.data.views import View, render, render_mask, view_of
from coeffdiff.errors import ModelError
from coeffdiff.models.fingerprints import network_fingerprint
from coeffdiff.models.pipelines import text_embeddings
from coeffdiff.utils.atomic import sweep


@dataclass(frozen=True)
class EncodedView:
    """One photo in the VAE's latents. mean, std: [C, h, w] float32, before the VAE's scaling factor.

    mask: [1, h, w] float32, the share of each latent pixel that shows the subject; None where all counts.
    """

    mean: Tensor
    std: Tensor
    time_ids: tuple[int, ...]
    mask: Tensor | None = None


@dataclass(frozen=True)
class EncodedPhoto:
    """A photo in all its augmentations, which share one latent size, and the captions that may go with it.

    subject: which of the run's subjects it is of, from 0.
    """

    views: tuple[EncodedView, ...]
    captions: tuple[str, ...]
    subject: int = 0

    @property
    def bucket(self) -> tuple[int, ...]:
        return tuple(self.views[0].mean.shape)


@dataclass(frozen=True)
class EncodedText:
    """One caption: embeds [T, W] of all text encoders side by side, pooled [P]; P is 0 where the UNet takes none."""

    embeds: Tensor
    pooled: Tensor


@torch.no_grad()
def encode_photos(
    photos: Sequence[Photo],
    captions: Sequence[tuple[str, ...]],
    vae: Any,
    settings: PhotoSettings,
    *,
    resolution: int,
    step: int,
    seed: int,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    on_photo: Callable[[Photo, bool], None] = lambda photo, cached: None,
) -> tuple[EncodedPhoto, ...]:
    """Run every photo through the VAE in each of its augmentations, or read it from the cache.

    Args:
        captions: the possible captions of each photo.
        vae: an AutoencoderKL; it is moved to `device` at the first photo that is not cached and stays there.
        settings: photos.* with augmentations resolved.
        resolution, step: side of the square with a bucket's area, and what bucket sides are multiples of; pixels.
        size: (width, height) in pixels for all of them, instead of each photo's own bucket.
        on_photo: called after each photo; cached is True if nothing had to be computed.
    Raises: ModelError if the VAE gives values that are not finite; PhotoError if a photo has changed since.
    """
    cache = cache_folder(settings.cache)
    sweep(cache, older_than=DAY_SECONDS)
    fingerprint = network_fingerprint(vae)
    result = []
    for photo, texts in zip(photos, captions, strict=True):
        views, image, mask = [], None, None
        for augmentation in range(int(settings.augmentations)):
            view = view_of(
                photo,
                resolution=resolution,
                step=step,
                crop=settings.crop,
                flip=settings.flip,
                seed=seed,
                augmentation=augmentation,
                size=size,
            )
            file = cache / f"{cache_key(photo, view, fingerprint, torch.device(device).type)}.safetensors"
            stored = read_cache(file, masked=photo.mask is not None)
            if stored is None:
                image = image or photo.open()
                stored = _encode(vae.to(device), render(image, view), device)
                if photo.mask:
                    mask = mask or photo.open_mask()
                    stored["mask"] = _small_mask(mask, view, stored["mean"])
                write_cache(file, stored)
            views.append(EncodedView(stored["mean"], stored["std"], view.time_ids, stored.get("mask")))
        result.append(EncodedPhoto(tuple(views), texts, photo.subject))
        on_photo(photo, image is None)
    return tuple(result)


def sizes_of(photos: Iterable[EncodedPhoto]) -> list[tuple[int, int]]:
    """The distinct sizes of encoded photos, (width, height) in pixels, in order of appearance."""
    return list(dict.fromkeys((p.views[0].time_ids[5], p.views[0].time_ids[4]) for p in photos))


@torch.no_grad()
def encode_unconditional(pipe: Any, device: torch.device | str = "cpu") -> EncodedText:
    """The empty caption as sampling uses it: zeros in SDXL, "" encoded elsewhere or if SDXL's config asks for that."""
    _, embeds, _, pooled = text_embeddings(pipe, "", torch.device(device), guided=True)
    assert embeds is not None and pooled is not None
    return EncodedText(embeds[0].float().cpu(), pooled[0].float().cpu())


@torch.no_grad()
def encode_texts(
    pipe: Any, captions: Iterable[str], device: torch.device | str = "cpu"
) -> dict[str, EncodedText]:
    """Each distinct caption through the text encoders, which must be on `device`; results on the CPU, float32.

    Raises: ModelError if they are not finite.
    """
    encoded = {}
    for caption in dict.fromkeys(captions):
        embeds, _, pooled, _ = text_embeddings(pipe, caption, torch.device(device), guided=False)
        encoded[caption] = EncodedText(embeds[0].float().cpu(), pooled[0].float().cpu())
        if not (embeds.isfinite().all() and pooled.isfinite().all()):
            dtype = str(embeds.dtype).removeprefix("torch.")
            raise ModelError(
                f"The text encoders give values that are not finite in {dtype}: they "
                + (
                    "are damaged; take another copy of the model."
                    if dtype == "float32"
                    else "overflow in it or are damaged; try --set training.precision=bf16, or another copy."
                )
            )
    return encoded


def latent_scaling(vae: Any) -> Callable[[Tensor], Tensor]:
    """From the VAE's latents to the UNet's: the scaling factor and, where a model has them, mean and deviation."""
    config = vae.config
    factor, mean, std = config.scaling_factor, config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return lambda latents: latents * factor
    shape = (len(mean), 1, 1)
    centre, width = torch.tensor(mean).view(shape), torch.tensor(std).view(shape)
    return lambda latents: (latents - centre) * factor / width


def _encode(vae: Any, image: Image.Image, device: torch.device | str) -> dict[str, Tensor]:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    posterior = vae.encode(pixels[None].to(device, vae.dtype)).latent_dist
    encoded = {
        "mean": posterior.mean[0].float().cpu().contiguous(),
        "std": posterior.std[0].float().cpu().contiguous(),
    }
    if not all(tensor.isfinite().all() for tensor in encoded.values()):
        raise ModelError(f"The VAE gives values that are not finite in {vae.dtype}{_why_not_finite(vae)}")
    return encoded


def _why_not_finite(vae: Any) -> str:
    broken = next((name for name, weight in vae.named_parameters() if not weight.isfinite().all()), None)
    if vae.dtype == torch.float32:
        held = f", and its weights hold such values in {broken}" if broken else ""
        return f"{held}: it is damaged; take another copy, or another VAE with model.vae."
    return (
        "; it overflows in half precision, as SDXL's own does: use a VAE whose config says force_upcast, or for SDXL "
        "--set model.vae=madebyollin/sdxl-vae-fp16-fix."
    )


def _small_mask(mask: Image.Image | None, view: View, latents: Tensor) -> Tensor:
    """The mask at the size of the latents [C, h, w]: [1, h, w] float32 between 0 and 1."""
    assert mask is not None
    small = render_mask(mask, view, (latents.shape[2], latents.shape[1]))
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None].contiguous()
