"""Whether a run that has finished is what is asked for now: its settings, its photos, its base model."""

from __future__ import annotations

from typing import Any

from coeffdiff.config.nested import by_name
from coeffdiff.config.schema import Settings
from coeffdiff.data.subjects import read_subjects
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.fingerprints import fingerprints
from coeffdiff.training.checkpoints import load_checkpoint
from coeffdiff.training.continuing import check_places, check_weights, photos_as_begun
from coeffdiff.training.prior import read_class_pictures
from coeffdiff.training.resolve import DTYPES
from coeffdiff.training.run_folder import RunFolder


def asked_settings(settings: Settings) -> dict[str, Any]:
    """The settings by dotted name as with_asked takes them: all that is no choice of the run's own."""
    offered = ("subject.class_word", "subject.token")
    return {
        name: value
        for name, value in by_name(settings).items()
        if value != "auto" and not (name in offered and value is None) and name != "subjects"
    }


def check_contents(run: RunFolder, settings: Settings) -> None:
    """Compare photos and base model, by content, with those of the run's last checkpoint.

    Raises: ResumeError where they are others or no checkpoint can be read, PhotoError or ModelError where there are
        none.
    """
    check_places(run, settings)
    newest = load_checkpoint(run)
    if newest is None:
        return
    photos_as_begun(run, newest.photos, read_subjects(settings), read_class_pictures(settings))
    base = find_backbone(settings.model)
    now = fingerprints(base, DTYPES[settings.training.precision])
    check_weights(run, newest.model, now, base)
