"""coeffdiff train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.app import answering, app
from coeffdiff.cli.listings import list_settings_and_exit
from coeffdiff.cli.options import (
    PATH,
    Assignments,
    BaseModel,
    ClassWord,
    ConfigFile,
    Images,
    Pixels,
    ResultAsJson,
    Token,
    TrainedMethod,
    TrainingSteps,
)
from coeffdiff.utils.console import duration, is_main_process, print_info, print_json, print_result
from coeffdiff.utils.output_folder import check_output


@app.command()
@answering
def train(
    images: Images = None,
    token: Token = None,
    class_word: ClassWord = None,
    model: BaseModel = None,
    method: TrainedMethod = None,
    learn_token: Annotated[
        bool, typer.Option("--learn-token", help="Also train new embeddings for the token.")
    ] = False,
    config: ConfigFile = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder. (default: runs/TOKEN, or the next free)", **PATH)
    ] = None,
    steps: TrainingSteps = None,
    resolution: Pixels = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn. (default: 0)")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="torch.compile the UNet: slower to start, faster steps.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run (--output, or the newest).")
    ] = False,
    set_: Assignments = None,
    as_json: ResultAsJson = False,
    list_settings: Annotated[
        bool,
        typer.Option(
            "--list-settings", is_eager=True, callback=list_settings_and_exit, help="Print every setting."
        ),
    ] = False,
) -> None:
    """Learn a subject from a folder of photos; the adapter lands in the run folder."""
    from coeffdiff.config.loading import load_settings

    flags = {
        "subject.images": str(images) if images else None,
        "subject.token": token,
        "subject.class_word": class_word,
        "subject.learn_token": learn_token or None,
        "model.name": model,
        "method.kind": method,
        "training.steps": steps,
        "training.resolution": resolution,
        "training.seed": seed,
        "training.compile": compile_ or None,
        "output": str(output) if output else None,
    }
    settings = load_settings(config, flags, set_ or ())
    if settings.output != "auto":
        check_output(settings.output)
    run = None
    if resume:
        from coeffdiff.training.resuming import run_to_resume, settings_to_resume

        run = run_to_resume(settings.output, settings.subject.token)
        settings = settings_to_resume(run, config, flags, set_ or ())
    from coeffdiff.training.launch import end_processes
    from coeffdiff.training.loop import train as run_training

    result = run_training(settings, resume=run)
    end_processes()
    if not is_main_process():
        return
    if as_json:
        print_json({k: str(v) if isinstance(v, Path) else v for k, v in vars(result).items()})
    else:
        print_info(f"done in {duration(result.seconds)}, last loss {result.loss:.4f}")
        print_result(str(result.adapter))
