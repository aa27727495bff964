"""Photos and texts, encoded for the loop."""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate import PartialState

from coeffdiff.config.schema import Settings
from coeffdiff.data.batches import LatentData
from coeffdiff.data.class_captions import class_captions
from coeffdiff.data.encoding import encode_photos, encode_texts, encode_unconditional, latent_scaling
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.templates import captions_for, fill
from coeffdiff.models.architecture import bucket_step
from coeffdiff.models.loading import load_pipeline
from coeffdiff.sampling.prompts import encode_prompts
from coeffdiff.training.prior import counting_photos, encode_prior
from coeffdiff.training.resolve import free_memory
from coeffdiff.training.text import LearnedToken
from coeffdiff.utils.console import progress
from coeffdiff.utils.torch_setup import prepare_kernels


def encode(
    settings: Settings,
    photos: PhotoSet,
    base: Any,
    dtype: torch.dtype,
    state: PartialState,
    class_pictures: PhotoSet | None = None,
) -> tuple[LatentData, dict[str, Any], Any, LearnedToken | None]:
    """Photos and texts through the parts of the model that do not train.

    Returns: what training draws from, the validation prompts ready for sampling, the VAE (on the CPU) for them, and
        with a learned token the text encoders that it is learned in. Otherwise they leave memory here.
    """
    subject, training = settings.subject, settings.training
    token, word = str(subject.token), subject.class_word
    captions = [captions_for(photo, subject.templates, token, word) for photo in photos.photos]
    of_class, of_pictures = class_captions(subject, settings.prior.weight, captions, class_pictures)
    trained = [text for texts in (*captions, of_class.values(), *of_pictures) for text in texts]
    prompts = [fill(prompt, token, word) for prompt in settings.validation.prompts]
    pipe = load_pipeline(base, dtype=dtype, parts={"text", "vae"})
    pipe.text_encoder.to(state.device)
    pipe.text_encoder_2.to(state.device)
    learned = LearnedToken(pipe, settings) if settings.learns_token else None
    texts = encode_texts(pipe, trained, state.device)
    unconditional = encode_unconditional(pipe, state.device) if subject.caption_dropout else None
    previews = encode_prompts(pipe, prompts, guidance=settings.validation.guidance) if prompts else {}
    vae = pipe.vae
    prepare_kernels(state.device, dtype, vae)
    if not learned:
        pipe.text_encoder = pipe.text_encoder_2 = pipe.tokenizer = pipe.tokenizer_2 = None
    free_memory(state)
    through_vae = functools.partial(
        encode_photos,
        vae=vae,
        resolution=int(training.resolution),
        step=bucket_step(base, int(training.resolution)),
        seed=training.seed,
        device=state.device,
    )
    with state.local_main_process_first():
        with progress("encoding photos", len(photos.photos)) as bar:
            encoded = through_vae(
                photos.photos, captions, settings=settings.photos, on_photo=counting_photos(bar)
            )
        prior = encode_prior(settings, of_class, class_pictures, of_pictures, encoded, through_vae)
    scaling = latent_scaling(vae)
    vae = vae.to("cpu") if prompts else None  # pictures need it again
    pipe.vae = None
    free_memory(state)
    timesteps = pipe.scheduler.config.num_train_timesteps
    data = LatentData(
        encoded,
        texts,
        scaling,
        timesteps,
        training.seed,
        outside_mask=training.outside_mask,
        noise_offset=training.noise_offset,
        caption_dropout=float(subject.caption_dropout),
        unconditional=unconditional,
        prior=prior,
    )
    return data, previews, vae, learned
