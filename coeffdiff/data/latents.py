"""Photos and captions -> what the UNet trains on: encoded once, cached by content, drawn deterministically.

Letters: B batch, C latent channels, h x w latent size, T text tokens, W text width, P pooled width.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from coeffdiff.backbone import fingerprint_of
from coeffdiff.config import PhotoSettings
from coeffdiff.data.photos import Photo, View, render, render_mask, view_of
from coeffdiff.errors import ModelError
from coeffdiff.files import appearing, sweep
from coeffdiff.seeding import generator_for, stable_seed
from coeffdiff.speed import copied

CACHE_VERSION = 2
_LARGEST_ENTRY = 64 * 2**20  # bytes; 4096 pixels square take 8 MiB
_DAY = 86_400.0  # seconds; whatever is half-written after so long was left by a kill


@dataclass(frozen=True)
class EncodedView:
    """One photo as the VAE sees it. mean, std: [C, h, w] float32, before the VAE's scaling factor.

    mask: [1, h, w] float32, the share of each latent pixel that shows the subject; None where all counts.
    """

    mean: Tensor
    std: Tensor
    time_ids: tuple[int, ...]
    mask: Tensor | None = None


@dataclass(frozen=True)
class EncodedPhoto:
    """A photo in all its augmentations, which share one latent size, and the captions that may go with it."""

    views: tuple[EncodedView, ...]
    captions: tuple[str, ...]

    @property
    def bucket(self) -> tuple[int, ...]:
        return tuple(self.views[0].mean.shape)


@dataclass(frozen=True)
class EncodedText:
    """One caption for SDXL: embeds [T, W] of both text encoders side by side, pooled [P] of the second."""

    embeds: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the training device, float32 but for the long timesteps.

    With prior preservation it has two rows a sample, N = 2 B: row B + i is of the class and belongs to sample i.
    Both pass through the network in one call, so that no wrapper around it meets two forwards and one backward.
    """

    latents: Tensor  # [N, C, h, w], scaled for the UNet
    noise: Tensor  # [N, C, h, w]
    timesteps: Tensor  # [N]
    embeds: Tensor  # [N, T, W]
    pooled: Tensor  # [N, P]
    time_ids: Tensor  # [N, 6]
    captions: tuple[str, ...]  # N of them, what embeds and pooled are of; "" where the caption was dropped
    weights: Tensor | None = None  # [B, 1, h, w], of the samples' squared errors; None: one everywhere
    class_rows: int = 0  # B with prior preservation


@dataclass(frozen=True)
class Prior:
    """What the class is remembered by.

    captions: from each caption of the subject to that of its class.
    pictures: of the class, in every latent size that the photos have; without any, a sample's own latents, noise
        and timestep are seen a second time, under its class caption.
    """

    captions: Mapping[str, str]
    pictures: tuple[EncodedPhoto, ...] = ()


@dataclass(frozen=True)
class LatentData:
    """Everything that training draws from, on the CPU. It knows nothing of batches, ranks or accumulation.

    outside_mask: weight of the squared errors outside a photo's mask.
    noise_offset: spread of a constant that is added to all of a sample's noise, one draw a channel.
    caption_dropout: probability that a sample's caption is replaced by `unconditional`.
    """

    photos: tuple[EncodedPhoto, ...]
    texts: Mapping[str, EncodedText]
    scale: Callable[[Tensor], Tensor]  # the VAE's own latents -> the UNet's
    timesteps: int  # timesteps run from 0 to this, exclusive
    seed: int
    outside_mask: float = 1.0
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    unconditional: EncodedText | None = None
    prior: Prior | None = None

    def bucket(self, step: int) -> list[EncodedPhoto]:
        """The photos of one step: all of one latent size, drawn in proportion to how many photos have it."""
        sizes = [photo.bucket for photo in self.photos]
        size = random.Random(stable_seed(self.seed, "bucket", step)).choice(sizes)
        return [photo for photo in self.photos if photo.bucket == size]

    def batch(self, step: int, samples: Iterable[int], device: torch.device | str = "cpu") -> Batch:
        """The samples with these global indices of one optimizer step.

        All that is drawn for sample i comes from (seed, step, i), so that batch size, accumulation and processes
        only decide who computes it.
        """
        photos = self.bucket(step)
        drawn = [self._sample(photos, step, index) for index in samples]
        rows = [sample.row for sample in drawn]
        rows += [sample.class_row for sample in drawn if sample.class_row]
        latents, noise, timesteps, embeds, pooled, time_ids = (
            copied(torch.stack(column), device) for column in zip(*(row.tensors for row in rows), strict=True)
        )
        captions = tuple(row.caption for row in rows)
        weights = copied(torch.stack([sample.weights for sample in drawn]), device) if self._masked else None
        class_rows = len(rows) - len(drawn)
        return Batch(latents, noise, timesteps, embeds, pooled, time_ids, captions, weights, class_rows)

    @property
    def _masked(self) -> bool:
        return any(photo.views[0].mask is not None for photo in self.photos)

    def _sample(self, photos: Sequence[EncodedPhoto], step: int, index: int) -> _Sample:
        pick = random.Random(stable_seed(self.seed, "sample", step, index))
        photo = pick.choice(photos)
        view = pick.choice(photo.views)
        caption = pick.choice(photo.captions)
        noised = self._noised(view, step, index, "noise")
        # Whether a caption is dropped is drawn apart, so that its probability changes nothing else
        chance = random.Random(stable_seed(self.seed, "caption", step, index)).random()
        said = "" if chance < self.caption_dropout else caption
        text = self.texts[caption] if said else self.unconditional
        assert text is not None, "caption_dropout needs `unconditional`"
        class_row = None
        if self.prior and self.prior.pictures:
            class_row = self._class_picture(self.prior, photo.bucket, step, index)
        elif self.prior:
            of_class = self.prior.captions[caption]
            class_row = _row(noised, self.texts[of_class], view, of_class)
        weights = torch.ones(1, *view.mean.shape[1:])
        if view.mask is not None:
            weights = self.outside_mask + (1 - self.outside_mask) * view.mask
        return _Sample(_row(noised, text, view, said), class_row, weights)

    def _class_picture(self, prior: Prior, bucket: tuple[int, ...], step: int, index: int) -> _Row:
        pick = random.Random(stable_seed(self.seed, "class sample", step, index))
        picture = pick.choice([picture for picture in prior.pictures if picture.bucket == bucket])
        view, caption = pick.choice(picture.views), pick.choice(picture.captions)
        return _row(self._noised(view, step, index, "class noise"), self.texts[caption], view, caption)

    def _noised(self, view: EncodedView, step: int, index: int, purpose: str) -> _Noised:
        generator = generator_for(self.seed, purpose, step, index)
        latents = view.mean + view.std * torch.randn(view.mean.shape, generator=generator)
        noise = torch.randn(view.mean.shape, generator=generator)
        timestep = torch.randint(self.timesteps, (), generator=generator)
        if self.noise_offset:  # drawn last, so that it changes nothing else
            channels = torch.randn((view.mean.shape[0], 1, 1), generator=generator)
            noise = noise + self.noise_offset * channels
        return self.scale(latents), noise, timestep


_Noised = tuple[Tensor, Tensor, Tensor]  # latents, noise, timestep


@dataclass(frozen=True)
class _Row:
    tensors: tuple[Tensor, ...]  # the first six fields of a Batch, without the batch dimension
    caption: str


@dataclass(frozen=True)
class _Sample:
    row: _Row
    class_row: _Row | None
    weights: Tensor


def _row(noised: _Noised, text: EncodedText, view: EncodedView, caption: str) -> _Row:
    time_ids = torch.tensor(view.time_ids, dtype=torch.float32)
    return _Row((*noised, text.embeds, text.pooled, time_ids), caption)


def share_of(count: int, batch_size: int, micro: int, rank: int, processes: int) -> range:
    """The global sample indices of one process's micro-batch, of `count` samples that a step has in all."""
    start = (micro * processes + rank) * batch_size
    if start + batch_size > count:
        raise IndexError(f"micro-batch {micro} of rank {rank} lies beyond the step's {count} samples")
    return range(start, start + batch_size)


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
    cache = cache_folder(settings)
    sweep(cache, older_than=_DAY)
    fingerprint = fingerprint_of(vae)
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
            file = cache / f"{_cache_key(photo, view, fingerprint, torch.device(device).type)}.safetensors"
            stored = _read_cache(file, masked=photo.mask is not None)
            if stored is None:
                image = image or photo.open()
                stored = _encode(vae.to(device), render(image, view), device)
                if photo.mask:
                    mask = mask or photo.open_mask()
                    stored["mask"] = _small_mask(mask, view, stored["mean"])
                _write_cache(file, stored)
            views.append(EncodedView(stored["mean"], stored["std"], view.time_ids, stored.get("mask")))
        result.append(EncodedPhoto(tuple(views), texts))
        on_photo(photo, image is None)
    return tuple(result)


def sizes_of(photos: Iterable[EncodedPhoto]) -> list[tuple[int, int]]:
    """The distinct (width, height) in pixels that photos are shown in, in order of appearance."""
    return list(dict.fromkeys((p.views[0].time_ids[5], p.views[0].time_ids[4]) for p in photos))


@torch.no_grad()
def encode_unconditional(pipe: Any, device: torch.device | str = "cpu") -> EncodedText:
    """What stands for no caption when pictures are made: zeros in SDXL, or "" in models whose pipeline says so."""
    _, embeds, _, pooled = pipe.encode_prompt(
        "", device=torch.device(device), num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return EncodedText(embeds[0].float().cpu(), pooled[0].float().cpu())


@torch.no_grad()
def encode_texts(
    pipe: Any, captions: Iterable[str], device: torch.device | str = "cpu"
) -> dict[str, EncodedText]:
    """Each distinct caption through both text encoders, which must be on `device`; results on the CPU, float32.

    Raises: ModelError if they are not finite.
    """
    encoded = {}
    for caption in dict.fromkeys(captions):
        embeds, _, pooled, _ = pipe.encode_prompt(
            caption, device=torch.device(device), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
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


def cache_folder(settings: PhotoSettings) -> Path:
    if settings.cache != "auto":
        return Path(settings.cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "coeffdiff" / "latents"


def _cache_key(photo: Photo, view: View, fingerprint: str, device_type: str) -> str:
    # The view holds all that was decided about crop and size, so settings that change no pixel change no key.
    what: tuple[object, ...] = (
        CACHE_VERSION,
        photo.digest,
        fingerprint,
        device_type,
        view.size,
        view.resized,
        view.crop_top_left,
    )
    if photo.mask:
        what += ("mask", photo.mask.path == photo.path, photo.mask.digest)
    return hashlib.sha256(repr((*what, view.flipped)).encode()).hexdigest()


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
        ". SDXL's own VAE overflows in half precision: use --set model.vae=madebyollin/sdxl-vae-fp16-fix, or a VAE "
        "whose config says force_upcast."
    )


def _small_mask(mask: Image.Image | None, view: View, latents: Tensor) -> Tensor:
    """The mask as the latents [C, h, w] see it: [1, h, w] float32 between 0 and 1."""
    assert mask is not None
    small = render_mask(mask, view, (latents.shape[2], latents.shape[1]))
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None].contiguous()


def _read_cache(file: Path, masked: bool) -> dict[str, Tensor] | None:
    """What _write_cache wrote under this name, or None: absent, damaged in any byte, or another entry's."""
    expected_names = {"mean", "std"} | ({"mask"} if masked else set())
    try:
        if file.stat().st_size > _LARGEST_ENTRY:
            return None
        with safe_open(file, framework="pt", device="cpu") as opened:
            if set(opened.keys()) != expected_names:
                return None
            stored = {name: opened.get_tensor(name) for name in expected_names}
            expected = (opened.metadata() or {}).get("digest")
        return stored if expected == _entry_digest(file.stem, stored) else None
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError):
        return None


def _write_cache(file: Path, tensors: dict[str, Tensor]) -> None:
    # A full or read-only disk costs time at the next run, nothing else.
    with suppress(OSError), appearing(file) as temporary:
        temporary.write_bytes(save(tensors, metadata={"digest": _entry_digest(file.stem, tensors)}))


def _entry_digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Of an entry's name, shapes and numbers: safetensors itself notices no changed byte among the numbers."""
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
