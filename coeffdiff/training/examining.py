"""A run looked at before it begins: what `coeffdiff check` and the page say of photos, memory, time and disk."""

from __future__ import annotations

from typing import Any

from coeffdiff.config.fields import PLACEHOLDER
from coeffdiff.config.schema import Settings
from coeffdiff.data.photos import PhotoSet, count_files
from coeffdiff.data.subjects import read_subjects
from coeffdiff.models.finding import find_backbone
from coeffdiff.preflight import check as preflight
from coeffdiff.preflight.report import Report
from coeffdiff.training.launch import start_processes
from coeffdiff.training.refusals import refuse_early
from coeffdiff.training.resolve import resolve
from coeffdiff.training.run_folder import new_run
from coeffdiff.utils.console import progress


def examine(settings: Settings) -> tuple[Report, PhotoSet, dict[str, Any]]:
    """The report, the photos, and the base model and settings that the report is about. Writes nothing.

    settings: each subject has a folder of photos.
    Raises: what would also end the run before its first step.
    """
    state = start_processes()
    files = sum(count_files(subject.images) for subject in settings.each_subject if subject.images)
    with progress("reading photos", files) as bar:
        photos = read_subjects(settings, on_file=bar)
    base = find_backbone(settings.model)
    settings, _ = resolve(settings, base, state)
    class_pictures = refuse_early(settings, photos, base)
    new_run(settings.output, settings.run_name or PLACEHOLDER)
    with progress("looking at photos", len(photos.photos)) as bar:
        report = preflight.check(
            settings,
            photos,
            base,
            state.device,
            budget_seconds=4,
            on_photo=bar,
            class_pictures=class_pictures,
        )
    return report, photos, {"model": base.name, "settings": settings.model_dump(mode="json")}
