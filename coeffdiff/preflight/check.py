"""What is worth knowing before a run: findings on photos, settings, memory, time and disk. It refuses nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from coeffdiff.config.schema import Settings
from coeffdiff.data.photos import PhotoSet
from coeffdiff.preflight.machine import process_bytes, what_is_free
from coeffdiff.preflight.photos import look_at, photo_findings
from coeffdiff.preflight.prediction import predict
from coeffdiff.preflight.report import Free, Report
from coeffdiff.preflight.resources import find_remedies, run_findings
from coeffdiff.preflight.settings import model_findings, warmup_findings
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
    """Everything at once.

    Args:
        settings: without "auto"; subject.token may be missing. base: from find_backbone.
        budget_seconds: how long operations may be timed; 0: no time is predicted.
        free: what is free; None: measured here.
        on_photo: told how many photos have been looked at.
        class_pictures: of prior.images, whose captions are read too.
    """
    looked = look_at(settings, photos.photos, base, on_photo)
    arguments: dict[str, Any] = {"process_bytes": process_bytes()}
    free = free or what_is_free(settings, device)  # before trials, whose memory the process keeps
    prediction = predict(settings, base, photos.photos, device, budget_seconds=budget_seconds, **arguments)
    tight = prediction.peak_bytes > free.memory
    remedies = (
        tuple(find_remedies(settings, base, photos.photos, device, free.memory, **arguments)) if tight else ()
    )
    findings = (
        *photo_findings(looked, settings),
        *text_findings(settings, looked, base, class_pictures),
        *warmup_findings(settings),
        *model_findings(settings, base),
        *run_findings(settings, prediction, free, remedies),
    )
    return Report(tuple(looked), prediction, free, remedies, findings)
