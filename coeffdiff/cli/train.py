"""coeffdiff train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.listings import list_settings_and_exit
from coeffdiff.cli.options import (
    PATH,
    Assignments,
    BaseModel,
    ClassWord,
    CompileUnet,
    ConfigFile,
    Images,
    Pixels,
    ResultAsJson,
    Subjects,
    Token,
    TrainedMethod,
    TrainingSteps,
    subject_flags,
)
from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import duration, is_main_process, print_info, print_json, print_result
from coeffdiff.utils.output_folder import check_output

LearnToken = Annotated[bool, typer.Option("--learn-token", help="Also train new embeddings for the token.")]
Output = Annotated[
    Path | None, typer.Option(help="Run folder. (default: runs/TOKEN, or the next free)", **PATH)
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers. (default: 0)")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run (--output, or the newest).")]
ListSettings = Annotated[
    bool,
    typer.Option(
        "--list-settings", is_eager=True, callback=list_settings_and_exit, help="Print every setting."
    ),
]


@app.command()
@answering
def train(
    images: Images = None,
    token: Token = None,
    class_word: ClassWord = None,
    subjects: Subjects = None,
    model: BaseModel = None,
    method: TrainedMethod = None,
    learn_token: LearnToken = False,
    config: ConfigFile = None,
    output: Output = None,
    steps: TrainingSteps = None,
    resolution: Pixels = None,
    seed: Seed = None,
    compile_: CompileUnet = False,
    resume: Resume = False,
    set_: Assignments = None,
    as_json: ResultAsJson = False,
    list_settings: ListSettings = False,
) -> None:
    """Learn a subject from a folder of photos, or several; the run folder holds the adapter."""
    from coeffdiff.config.loading import load_names, load_settings

    flags = subject_flags(subjects, images, token, class_word, model, method, steps, resolution) | {
        "subject.learn_token": learn_token or None,
        "training.seed": seed,
        "training.compile": compile_ or None,
        "output": str(output) if output else None,
    }
    settings = (load_names if resume else load_settings)(config, flags, set_ or ())
    if settings.output != "auto":
        check_output(settings.output)
    run = None
    if resume:
        from coeffdiff.training.resuming import run_to_resume, settings_to_resume

        run = run_to_resume(settings.output, settings.run_name)
        settings = settings_to_resume(run, config, flags, set_ or ())
    from coeffdiff.training.loop import train as run_training
    from coeffdiff.utils.distributed import destroy_process_group

    result = run_training(settings, resume=run)
    destroy_process_group()
    if not is_main_process():
        return
    if as_json:
        print_json(vars(result), default=str)
    else:
        print_info(f"done in {duration(result.seconds)}, last loss {result.loss:.4f}")
        print_result(str(result.adapter))
