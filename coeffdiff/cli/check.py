"""coeffdiff check"""

from __future__ import annotations

from typing import Annotated

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
from coeffdiff.utils.console import is_main_process, print_json, print_text

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
    if not all(subject.images for subject in settings.each_subject):
        raise ConfigError("A check needs --images; for instance: check --images photos/ --token ohwx.")
    from coeffdiff.preflight.report import table
    from coeffdiff.training.examining import examine

    report, photos, about = examine(settings)
    if not is_main_process():
        return
    if as_json:
        skipped = [{"name": one.path.name, "reason": one.reason} for one in photos.skipped]
        print_json(report.as_dict() | about | {"left_out": skipped, "notes": photos.notes})
        return
    for line in table(report, photos):
        print_text(line)
