"""Photos and texts, encoded for the loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coeffdiff.data.batches import LatentData, Prior
from coeffdiff.data.class_captions import class_captions
from coeffdiff.data.encoding import (
    EncodedPhoto,
    encode_photos,
    encode_texts,
    encode_unconditional,
    latent_scaling,
)
from coeffdiff.data.subjects import captions_of, prompts_of
from coeffdiff.method.families import text_encoders_of
from coeffdiff.models.architecture import bucket_step
from coeffdiff.sampling.prompts import encode_prompts
from coeffdiff.training.plan import Plan
from coeffdiff.training.prior import counting_photos, encode_prior
from coeffdiff.training.resolve import free_memory
from coeffdiff.training.text import LearnedToken
from coeffdiff.training.text_encoders import TrainedEncoders
from coeffdiff.utils.console import progress
from coeffdiff.utils.torch_setup import prepare_kernels


@dataclass(frozen=True)
class Inputs:
    """What training draws from.

    previews: validation prompts, ready for sampling; vae: on the CPU, for their pictures; learned: a learned token
    with the text encoders that it is learned in; encoders: text encoders that train. Without either they have left
    memory.
    """

    data: LatentData
    previews: dict[str, Any]
    vae: Any
    learned: LearnedToken | None
    encoders: TrainedEncoders | None = None

    @property
    def live(self) -> LearnedToken | TrainedEncoders | None:
        """What encodes captions in every step, if anything of the text learns."""
        return self.encoders or self.learned


def encode(plan: Plan) -> Inputs:
    """Photos and texts through the parts of the model that do not train."""
    settings, state = plan.settings, plan.state
    subjects = settings.each_subject
    captions = captions_of(subjects, plan.photos.photos)
    of_class, of_pictures = class_captions(subjects, settings.prior.weight, captions, plan.class_pictures)
    trained = [text for texts in (*captions, of_class.values(), *of_pictures) for text in texts]
    prompts = prompts_of(subjects, settings.validation.prompts)
    pipe = plan.load(plan.base, dtype=plan.dtype, parts={"text", "vae"})
    for encoder in text_encoders_of(pipe):
        encoder.to(state.device)
    learned = LearnedToken(pipe, settings) if settings.learns_token else None
    texts = encode_texts(pipe, trained, state.device)
    unconditional = encode_unconditional(pipe, state.device) if settings.subject.caption_dropout else None
    previews = encode_prompts(pipe, prompts, guidance=settings.validation.guidance) if prompts else {}
    vae = pipe.vae
    prepare_kernels(state.device, plan.dtype, vae)
    # After the texts: what they are encoded as is the base model's, which prior preservation's teacher reads
    encoders = TrainedEncoders(pipe, settings, learned) if settings.method.on_text_encoders else None
    if not (learned or encoders):
        for part in (*plan.base.family.text_networks, *plan.base.family.tokenizers):
            setattr(pipe, part, None)
    free_memory(state)
    photos, prior = _through_vae(plan, vae, captions, of_class, of_pictures)
    scaling = latent_scaling(vae)
    vae = vae.to("cpu") if prompts else None  # pictures need it again
    pipe.vae = None
    free_memory(state)
    data = LatentData(
        photos,
        texts,
        scaling,
        pipe.scheduler.config.num_train_timesteps,
        settings.training.seed,
        outside_mask=settings.training.outside_mask,
        noise_offset=settings.training.noise_offset,
        caption_dropout=float(settings.subject.caption_dropout),
        unconditional=unconditional,
        prior=prior,
    )
    return Inputs(data, previews, vae, learned, encoders)


def _through_vae(
    plan: Plan,
    vae: Any,
    captions: Sequence[tuple[str, ...]],
    of_class: dict[str, str],
    of_pictures: Sequence[tuple[str, ...]],
) -> tuple[tuple[EncodedPhoto, ...], Prior | None]:
    """Photos, and what prior preservation draws from, as latents; one process of a machine after the other."""
    settings, state = plan.settings, plan.state
    resolution = int(settings.training.resolution)
    encoder = functools.partial(
        encode_photos,
        vae=vae,
        resolution=resolution,
        step=bucket_step(plan.base, resolution),
        seed=settings.training.seed,
        device=state.device,
    )
    with state.local_main_process_first():
        with progress("encoding photos", len(plan.photos.photos)) as bar:
            photos = encoder(
                plan.photos.photos, captions, settings=settings.photos, on_photo=counting_photos(bar)
            )
        prior = encode_prior(settings, of_class, plan.class_pictures, of_pictures, photos, encoder)
    return photos, prior
