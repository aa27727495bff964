"""A training run in plain numbers: what it computes and writes, how often and at which sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from coeffdiff.config.schema import MethodSettings, Settings, TrainingSettings, ValidationSettings
from coeffdiff.data.photos import Photo
from coeffdiff.data.subjects import captions_of, prompts_of
from coeffdiff.data.views import Crop, view_of
from coeffdiff.models.architecture import bucket_step, vae_factor
from coeffdiff.preflight.dry_run import Learned
from coeffdiff.preflight.text_dry_run import TextLearned

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """Sizes of pictures are (width, height) in pixels, sides of latents are in latent pixels.

    dtype: of the frozen weights. narrow: what autocast computes in; None: without autocast.
    token_vectors: embeddings that a learned token has in each text encoder, 0 without one.
    rows: of one forward, twice the batch with prior preservation. teaches: the base model predicts half of them.
    averaged: an average of what learns is kept.
    sizes: of each photo's bucket; latent_rows, latent_columns: of the largest one, latent_side: of a validation
        picture.
    texts: how many are encoded.
    picture_batch: rows of one forward for a validation picture, two with guidance; picture_steps: its forwards.
    pictures, checkpoints, adapters: how many the run makes or keeps. wants_pictures: there are validation prompts.
    """

    dtype: torch.dtype
    narrow: torch.dtype | None
    learned: Learned
    token_vectors: int
    text_learned: TextLearned
    optimizer: str
    optimizer_args: dict[str, Any]
    averaged: bool
    checkpointing: bool
    steps: int
    accumulate: int
    batch: int
    rows: int
    teaches: bool
    resolution: int
    sizes: tuple[tuple[int, int], ...]
    augmentations: int
    latent_rows: int
    latent_columns: int
    latent_side: int
    texts: int
    wants_pictures: bool
    picture_batch: int
    picture_steps: int
    pictures: int
    checkpoints: int
    adapters: int

    @property
    def learns_token(self) -> bool:
        return self.token_vectors > 0

    @property
    def step_arguments(self) -> dict[str, Any]:
        """Of one micro-batch, for train_step and real_step."""
        return {
            "batch": self.rows,
            "rows": self.latent_rows,
            "columns": self.latent_columns,
            "narrow": self.narrow,
            "checkpointing": self.checkpointing,
            "through_text": self.learns_token or bool(self.text_learned),
        }


def workload_of(settings: Settings, base: Any, photos: Sequence[Photo]) -> Workload:
    """What a run with these settings computes. settings: without "auto"; base: from find_backbone."""
    training, validation, prior = settings.training, settings.validation, settings.prior
    resolution, batch, factor = int(training.resolution), int(training.batch_size), vae_factor(base)
    dtype = _DTYPES[training.precision]
    sizes = buckets(photos, resolution, bucket_step(base, resolution), settings.photos.crop)
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    subjects = settings.each_subject
    captions = {text for texts in captions_of(subjects, photos) for text in texts}
    prompts = prompts_of(subjects, validation.prompts)
    return Workload(
        dtype=dtype,
        narrow=None if training.precision == "no" else dtype,
        learned=replace(learned_parts(settings.method), quantize=settings.model.quantize),
        text_learned=text_parts(settings.method),
        token_vectors=settings.method.token.vectors * len(subjects) if settings.learns_token else 0,
        optimizer=training.optimizer,
        optimizer_args=training.optimizer_args,
        averaged=training.ema is not None,
        checkpointing=bool(training.gradient_checkpointing),
        steps=int(training.steps),
        accumulate=int(training.accumulate),
        batch=batch,
        rows=2 * batch if prior.weight else batch,
        teaches=bool(prior.weight) and settings.class_folders[0] is None,
        resolution=resolution,
        sizes=tuple(sizes),
        augmentations=int(settings.photos.augmentations),
        latent_rows=height // factor,
        latent_columns=width // factor,
        latent_side=resolution // factor,
        texts=len(captions) + 2 * len(prompts),
        wants_pictures=bool(validation.prompts),
        picture_batch=2 if validation.guidance > 1 else 1,
        picture_steps=validation.steps,
        pictures=count_pictures(validation, int(training.steps), len(prompts)),
        checkpoints=count_checkpoints(training),
        adapters=count_adapters(training),
    )


def learned_parts(method: MethodSettings) -> Learned:
    """What `method` trains on the UNet."""
    return Learned(
        rank=method.lora.rank if "lora" in method.kind else None,
        lora_targets=tuple(method.lora.targets),
        dora=method.lora.dora,
        targets=method.coeff.targets if "coeff" in method.kind else None,
        blocks=tuple(method.coeff.blocks) if method.coeff.blocks else None,
        backend=method.coeff.backend,
        mixes=method.coeff.mixes,
    )


def text_parts(method: MethodSettings) -> TextLearned:
    """What `method` trains on the text encoders."""
    return TextLearned(
        rank=method.lora.rank if "lora" in method.on_text_encoders else None,
        dora=method.lora.dora,
        alpha="coeff" in method.on_text_encoders,
        mixes=method.coeff.mixes,
    )


def buckets(photos: Sequence[Photo], resolution: int, step: int, crop: Crop) -> list[tuple[int, int]]:
    """The (width, height) at which each photo is trained; see view_of."""
    where: dict[str, Any] = {"resolution": resolution, "step": step, "crop": crop}
    return [view_of(photo, **where, flip=False, seed=0, augmentation=0).size for photo in photos]


def count_pictures(validation: ValidationSettings, steps: int, prompts: int) -> int:
    """How many validation pictures of so many prompts a run of `steps` makes: every so many steps, and at the end."""
    times = 1 + ((steps - 1) // validation.every if validation.every else 0)
    return times * prompts * len(validation.seeds)


def count_checkpoints(training: TrainingSettings) -> int:
    """How many checkpoints are there when a run ends."""
    made = -(-int(training.steps) // training.checkpoint_every) if training.checkpoint_every else 1
    return min(made, training.keep_checkpoints)


def count_adapters(training: TrainingSettings) -> int:
    """How many adapters a run keeps beside its last one."""
    every = training.keep_adapters_every
    return int(training.steps) // every if every else 0
