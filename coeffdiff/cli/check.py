"""coeffdiff check"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coeffdiff.cli.options import (
    Assignments,
    BaseModel,
    ClassWord,
    ConfigFile,
    Images,
    Pixels,
    Subjects,
    Token,
    TrainedMethod,
    TrainingSteps,
    subject_flags,
)
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import is_main_process, print_json, print_text, progress

if TYPE_CHECKING:
    from coeffdiff.config.schema import Settings
    from coeffdiff.data.photos import PhotoSet
    from coeffdiff.preflight.report import Report


ReportAsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


@app.command()
@answering
def check(
    images: Images = None,
    token: Token = None,
    class_word: ClassWord = None,
    subjects: Subjects = None,
    model: BaseModel = None,
    method: TrainedMethod = None,
    config: ConfigFile = None,
    steps: TrainingSteps = None,
    resolution: Pixels = None,
    set_: Assignments = None,
    as_json: ReportAsJson = False,
) -> None:
    """Before a run: problems with the photos, and the memory, time and disk that it will take. Writes nothing."""
    from coeffdiff.config.loading import load_settings
    from coeffdiff.data.subjects import with_offered_words
    from coeffdiff.utils.launch_environment import forget_launch

    forget_launch()
    flags = subject_flags(subjects, images, token, class_word, model, method, steps, resolution)
    settings = load_settings(config, flags, set_ or ())
    settings = with_offered_words(settings)
    folders = [subject.images for subject in settings.each_subject if subject.images]
    if len(folders) < len(settings.each_subject):
        raise ConfigError("A check needs --images; for instance: check --images photos/ --token sks.")
    from coeffdiff.preflight.report import table

    report, photos, about = _check(settings, folders)
    if not is_main_process():
        return
    if as_json:
        skipped = [{"name": one.path.name, "reason": one.reason} for one in photos.skipped]
        print_json(report.as_dict() | about | {"left_out": skipped, "notes": photos.notes})
        return
    for line in table(report, photos):
        print_text(line)


def _check(settings: Settings, folders: list[Path]) -> tuple[Report, PhotoSet, dict[str, Any]]:
    """The report, the photos, and the base model and settings that the report is about.

    Raises: what would also end the run before its first step.
    """
    from coeffdiff.config.fields import PLACEHOLDER
    from coeffdiff.data.photos import count_files
    from coeffdiff.data.subjects import read_subjects
    from coeffdiff.models.finding import find_backbone
    from coeffdiff.preflight import check as preflight
    from coeffdiff.training.launch import start_processes
    from coeffdiff.training.refusals import refuse_early
    from coeffdiff.training.resolve import resolve
    from coeffdiff.training.run_folder import new_run

    state = start_processes()
    with progress("reading photos", sum(map(count_files, folders))) as bar:
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
