"""What a run is refused for before any weights are read: asked by `train` before it writes, and by `check`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from coeffdiff.config.schema import Settings
from coeffdiff.data.class_captions import class_captions
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.subjects import captions_of, prompts_of, tokens_of
from coeffdiff.errors import ConfigError
from coeffdiff.models.headers import refuse_unfit
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.noise_schedule import check_schedule
from coeffdiff.models.subject_token import holds
from coeffdiff.training.continuing import with_absolute_paths
from coeffdiff.training.judge import texts_of
from coeffdiff.training.prior import read_class_pictures
from coeffdiff.training.resolve import DTYPES, check_names
from coeffdiff.training.trackers import check_watching


def refuse_early(settings: Settings, photos: PhotoSet, base: Any) -> PhotoSet | None:
    """The pictures of the class, if the settings name any.

    settings: resolved; the token may be missing, for `check`.
    Raises: ConfigError, PhotoError or ModelError, with one sentence.
    """
    check_watching(settings)
    check_names(base.name, settings.model)
    check_names(base.name, with_absolute_paths(settings).model)
    class_pictures = read_class_pictures(settings)
    _check_texts(settings, photos, class_pictures)
    scheduler = load_pipeline(base, dtype=torch.float32, parts=()).scheduler
    check_schedule(DDPMScheduler.from_config(scheduler.config), base.name)
    refuse_unfit(base, DTYPES[settings.training.precision])
    return class_pictures


def _check_texts(settings: Settings, photos: PhotoSet, class_pictures: PhotoSet | None) -> None:
    subjects = settings.each_subject
    captions = captions_of(subjects, photos.photos)
    class_captions(subjects, settings.prior.weight, captions, class_pictures)
    prompts_of(subjects, settings.validation.prompts)
    scored = settings.validation.prompts and (settings.validation.dino or settings.validation.clip)
    if scored and settings.run_name:
        for token in tokens_of(subjects):
            texts_of(settings, token)
    for token in [subject.token for subject in subjects if subject.token and settings.learns_token]:
        check_token_is_said(captions, token)


def check_token_is_said(captions: list[tuple[str, ...]], token: str) -> None:
    """Raises: ConfigError if no photo has a caption with the token that is learned."""
    if not any(holds(text, token) for texts in captions for text in texts):
        raise ConfigError(
            f"No caption holds the token {token}, so there is nothing to learn it from; put {{token}} into "
            "subject.templates, or the word into the photos' .txt files."
        )
