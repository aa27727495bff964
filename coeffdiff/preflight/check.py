"""Check a run before it begins: findings on photos, settings, memory, time and disk. Nothing is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values
from coeffdiff.data.latent_cache import cache_folder
from coeffdiff.data.photos import PhotoSet
from coeffdiff.models.architecture import bucket_step
from coeffdiff.preflight.machine import free_resources, process_bytes
from coeffdiff.preflight.memory_options import memory_options
from coeffdiff.preflight.photos import check_photos, photo_findings
from coeffdiff.preflight.prediction import predict
from coeffdiff.preflight.report import Finding, Free, PhotoCheck, Remedy, Report
from coeffdiff.preflight.resources import find_remedies, run_findings
from coeffdiff.preflight.settings import idle_findings, model_findings, rate_findings, warmup_findings
from coeffdiff.preflight.texts import text_findings


def check(
    settings: Settings,
    photos: PhotoSet,
    base: Any,
    device: torch.device,
    *,
    budget_seconds: float,
    free: Free | None = None,
    on_photo: Callable[[int], None] = lambda done: None,
    class_pictures: PhotoSet | None = None,
) -> Report:
    """All findings on a run, with the prediction that they are made of.

    Args:
        settings: without "auto"; subject.token may be missing. base: from find_backbone.
        budget_seconds: how long operations may be timed; 0: no time is predicted.
        free: memory and disk; None: measured here.
        on_photo: called with the number of photos that are done.
        class_pictures: of prior.images, whose captions are read too.
    """
    resolution, cache = int(settings.training.resolution), cache_folder(settings.photos.cache)
    checks = check_photos(
        photos.photos,
        settings.each_subject,
        resolution=resolution,
        step=bucket_step(base, resolution),
        crop=settings.photos.crop,
        seed=settings.training.seed,
        on_photo=on_photo,
    )
    before = process_bytes()
    output = Path("runs") if settings.output == "auto" else Path(settings.output)
    free = free or free_resources(device, output, cache)  # before trials, whose memory the process keeps
    prediction = predict(
        settings, base, photos.photos, device, process_bytes=before, budget_seconds=budget_seconds
    )
    remedies: tuple[Remedy, ...] = ()
    if prediction.peak_bytes > free.memory:
        remedies = remedies_for(settings, photos, base, device, free.memory, process_bytes=before)
    findings = (
        *photo_findings(checks, settings.training),
        *_findings_on_settings(settings, checks, base, class_pictures),
        *run_findings(prediction, free, remedies, cache=cache),
    )
    return Report(tuple(checks), prediction, free, remedies, findings)


def remedies_for(
    settings: Settings,
    photos: PhotoSet,
    base: Any,
    device: torch.device,
    free_bytes: int,
    *,
    process_bytes: int,
) -> tuple[Remedy, ...]:
    """The memory options of these settings, each with the peak that is predicted with it."""

    def peak_with(values: Mapping[str, Any]) -> int:
        changed = with_values(settings, dict(values))
        return predict(changed, base, photos.photos, device, process_bytes=process_bytes).peak_bytes

    options = memory_options(
        settings.training,
        settings.method,
        settings.validation.prompts,
        device.type,
        quantize=settings.model.quantize,
    )
    return tuple(find_remedies(options, peak_with, free_bytes))


def _findings_on_settings(
    settings: Settings, checks: list[PhotoCheck], base: Any, class_pictures: PhotoSet | None
) -> list[Finding]:
    """On texts, schedule, model, idle settings and rates."""
    method, learns_token = settings.method, settings.learns_token
    return [
        *text_findings(
            checks,
            settings.each_subject,
            base,
            token_vectors=method.token.vectors if learns_token else 0,
            prior_weight=settings.prior.weight,
            prompts=settings.validation.prompts,
            class_pictures=class_pictures,
        ),
        *warmup_findings(settings.training),
        *model_findings(base),
        *idle_findings(settings),
        *rate_findings(method, learns_token=learns_token, optimizer=settings.training.optimizer),
    ]
