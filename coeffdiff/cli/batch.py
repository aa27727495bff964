"""coeffdiff batch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coeffdiff.cli.executing import ExecutorOption, Part, RayAddress, Workers
from coeffdiff.cli.options import (
    PATH,
    Assignments,
    BaseModel,
    ClassWord,
    ConfigFile,
    NumbersAsJson,
    Pixels,
    Token,
    TrainedMethod,
    TrainingSteps,
    expanded_path,
    subject_flags,
)
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import print_info, print_json, print_text
from coeffdiff.utils.output_folder import check_output

SubjectsFile = Annotated[
    Path,
    typer.Argument(
        parser=expanded_path,
        metavar="SUBJECTS.yaml",
        help="A list of subjects, each with images and, of its own, token, class_word, name and set.",
    ),
]
Output = Annotated[Path, typer.Option(help="Folder of the runs, each in OUTPUT/NAME.", **PATH)]
Evaluate = Annotated[bool, typer.Option("--evaluate", help="Also score each adapter, as evaluate does.")]
Score = Annotated[
    list[str] | None,
    typer.Option(metavar="A=B", help="How --evaluate scores, such as limit=10; repeatable."),
]
Table = Annotated[
    bool, typer.Option("--table", help="Train nothing: only gather what there is, as after a SLURM array.")
]


@app.command()
@answering
def batch(
    subjects: SubjectsFile,
    output: Output = Path("batch"),
    token: Token = None,
    class_word: ClassWord = None,
    model: BaseModel = None,
    method: TrainedMethod = None,
    config: ConfigFile = None,
    steps: TrainingSteps = None,
    resolution: Pixels = None,
    set_: Assignments = None,
    evaluate: Evaluate = False,
    score: Score = None,
    executor: ExecutorOption = "local",
    workers: Workers = None,
    ray_address: RayAddress = None,
    part: Part = "1/1",
    table: Table = False,
    as_json: NumbersAsJson = False,
) -> None:
    """Train many subjects, each in a run of its own, here or on Ray; resumes. Exit code 1 unless all are done."""
    from coeffdiff.config.loading import load_section, load_settings
    from coeffdiff.execution.choosing import choose_executor

    check_output(output)
    workers_on = choose_executor(executor, workers, ray_address)
    if table and part != (1, 1):
        raise ConfigError("--table gathers all subjects, of every part; leave out --part.")
    if score and not evaluate:
        raise ConfigError("--score is for --evaluate; add that.")
    flags = subject_flags(None, None, token, class_word, model, method, steps, resolution)
    shared = load_settings(config, flags, set_ or ())
    from coeffdiff.batch.plan import Scoring, plan_batch

    plan = plan_batch(
        subjects, shared, output, load_section(Scoring, None, {}, score or ()) if evaluate else None
    )
    results = _gathered(plan) if table else _trained(plan, workers_on, part)
    if as_json:
        print_json(results)
    else:
        from coeffdiff.batch.results import as_text

        print_text(as_text(results))
        print_info(f"written: {plan.output / 'batch.json'}, {plan.output / 'batch.txt'}")
    if results["counts"].get("done", 0) < len(results["subjects"]):
        raise typer.Exit(1)


def _trained(plan: Any, executor: Any, part: tuple[int, int]) -> dict[str, Any]:
    from coeffdiff.batch.batch import batch as run_batch

    return run_batch(plan, executor, part)


def _gathered(plan: Any) -> dict[str, Any]:
    from coeffdiff.batch.results import gather, write_results
    from coeffdiff.utils.output_folder import refuse_unwritable

    refuse_unwritable(plan.output)
    write_results(plan)
    return gather(plan, list(plan.settings))
