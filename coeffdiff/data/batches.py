"""Encoded photos and captions, drawn as batches: a sample depends on seed, step and index alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coeffdiff.data.encoding import EncodedPhoto, EncodedText, EncodedView
from coeffdiff.data.shares import photos_of_sample, size_of_step
from coeffdiff.utils.seeding import generator_for, stable_seed
from coeffdiff.utils.torch_setup import copied


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
    pooled: Tensor  # [N, P], P = 0 in families without
    time_ids: Tensor  # [N, 6]
    captions: tuple[str, ...]  # N, encoded in embeds and pooled; "" where the caption was dropped
    weights: Tensor | None = None  # [B, 1, h, w], of the samples' squared errors; None: one everywhere
    class_rows: int = 0  # B with prior preservation


@dataclass(frozen=True)
class Prior:
    """Prior preservation: what the rows of the class are made of.

    captions: from each caption of the subject to that of its class.
    pictures: of the classes, in every latent size that the photos of the same subject have; without any, a sample's
        own latents, noise and timestep are used a second time, with its class caption.
    """

    captions: Mapping[str, str]
    pictures: tuple[EncodedPhoto, ...] = ()


_Noised = tuple[Tensor, Tensor, Tensor]  # latents, noise, timestep


@dataclass(frozen=True)
class _Row:
    """One row of a Batch."""

    tensors: tuple[Tensor, ...]  # the first six fields of a Batch, without the batch dimension
    caption: str


@dataclass(frozen=True)
class _Sample:
    """One sample: its row, that of its class, and the weights [1, h, w] of its squared errors."""

    row: _Row
    class_row: _Row | None
    weights: Tensor


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
        """The photos of one step: all of one latent size, drawn in proportion to how many photos have it.

        Of several subjects each has an equal share: see shares.py.
        """
        size = size_of_step(self.photos, self.seed, step)
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
        photo = pick.choice(photos_of_sample(photos, self.photos, self.seed, step, index))
        view = pick.choice(photo.views)
        caption = pick.choice(photo.captions)
        noised = self._noised(view, step, index, "noise")
        # Whether a caption is dropped is drawn apart, so that its probability changes nothing else
        chance = random.Random(stable_seed(self.seed, "caption", step, index)).random()
        used = "" if chance < self.caption_dropout else caption
        text = self.texts[caption] if used else self.unconditional
        assert text is not None, "caption_dropout needs `unconditional`"
        class_row = None
        if self.prior and self.prior.pictures:
            class_row = self._class_picture(self.prior, photo, step, index)
        elif self.prior:
            of_class = self.prior.captions[caption]
            class_row = _row(noised, self.texts[of_class], view, of_class)
        weights = torch.ones(1, *view.mean.shape[1:])
        if view.mask is not None:
            weights = self.outside_mask + (1 - self.outside_mask) * view.mask
        return _Sample(_row(noised, text, view, used), class_row, weights)

    def _class_picture(self, prior: Prior, photo: EncodedPhoto, step: int, index: int) -> _Row:
        pick = random.Random(stable_seed(self.seed, "class sample", step, index))
        of_its_class = [one for one in prior.pictures if one.subject == photo.subject]
        picture = pick.choice([one for one in of_its_class if one.bucket == photo.bucket])
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


def share_of(count: int, batch_size: int, micro: int, rank: int, processes: int) -> range:
    """The global sample indices of one process's micro-batch, of `count` samples that a step has in all."""
    start = (micro * processes + rank) * batch_size
    if start + batch_size > count:
        raise IndexError(f"micro-batch {micro} of rank {rank} lies beyond the step's {count} samples")
    return range(start, start + batch_size)


def _row(noised: _Noised, text: EncodedText, view: EncodedView, caption: str) -> _Row:
    time_ids = torch.tensor(view.time_ids, dtype=torch.float32)
    return _Row((*noised, text.embeds, text.pooled, time_ids), caption)
