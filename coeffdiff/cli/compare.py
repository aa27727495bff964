"""coeffdiff compare"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coeffdiff.cli.executing import ExecutorOption, Part, RayAddress, Workers
from coeffdiff.cli.listings import print_settings
from coeffdiff.cli.options import NAME, PATH, BaseModel, NumbersAsJson, expanded_path, parsed_by
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import print_json, print_result, print_text
from coeffdiff.utils.output_folder import check_output


def parse_seeds(text: str) -> list[int]:
    """ "0,1" -> [0, 1]. Raises: ConfigError for anything but whole numbers."""
    seeds = []
    for part in text.split(",") if text else ():
        try:
            seeds.append(int(part))
        except ValueError:
            raise ConfigError(
                f"--seeds takes whole numbers with commas between them, not {part!r}."
            ) from None
    return seeds


Plan = Annotated[
    Path | None,
    typer.Argument(
        parser=expanded_path,
        metavar="[PLAN.yaml]",
        help="What to compare. (default: base, lora, coeff, coeff+lora)",
    ),
]
Subjects = Annotated[
    str | None,
    typer.Option(
        help="dev, eval, tellable, told or fresh:N of pocket's own; or a folder of photos or of such folders.",
        **NAME,
    ),
]
Arms = Annotated[
    list[str] | None, typer.Option(help="Only this arm of the plan and its reference; repeatable.")
]
Seeds = Annotated[
    Any,
    typer.Option(parser=parsed_by(parse_seeds), metavar="A,B,...", help="Training seeds. (default: 0,1)"),
]
ClassWord = Annotated[
    str | None, typer.Option(help="What the subjects are, where no list of classes names it.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="A=B", help="Anything else of the plan; repeatable.")
]
Output = Annotated[
    Path, typer.Option(help="Folder of the comparison; what it holds is not computed again.", **PATH)
]
Pack = Annotated[
    bool, typer.Option("--pack", help="At the end fold the cells into one file, cells/NAME.jsonl.")
]
ListSettings = Annotated[bool, typer.Option("--list-settings", help="Print all settings of a plan.")]


@app.command()
@answering
def compare(
    plan: Plan = None,
    subjects: Subjects = None,
    model: BaseModel = None,
    arm: Arms = None,
    seeds: Seeds = None,
    class_word: ClassWord = None,
    set_: Assignments = None,
    output: Output = Path("comparison"),
    executor: ExecutorOption = "local",
    workers: Workers = None,
    ray_address: RayAddress = None,
    part: Part = "1/1",
    pack: Pack = False,
    as_json: NumbersAsJson = False,
    list_settings: ListSettings = False,
) -> None:
    """Train and score several methods on the same subjects, here or on a Ray cluster; resumes."""
    from coeffdiff.config.loading import load_section
    from coeffdiff.evaluation.compare import compare as run_comparison
    from coeffdiff.evaluation.comparison_plan import Comparison
    from coeffdiff.evaluation.comparison_text import as_text
    from coeffdiff.execution.choosing import choose_executor

    if list_settings:
        print_settings(Comparison)
        return
    check_output(output)
    workers_on = choose_executor(executor, workers, ray_address)
    flags = {"subjects": subjects, "model.name": model, "class_word": class_word, "seeds": seeds or None}
    comparison = load_section(Comparison, plan, flags, set_ or ())
    if arm:
        comparison = comparison.only(arm)
    pack_as = (plan.stem if plan else "comparison") if pack else None
    outcome = run_comparison(comparison, output, workers_on, part, pack_as=pack_as)
    if as_json:
        print_json(outcome.results)
        return
    print_text(as_text(outcome.results))
    print_result(str(outcome.report))
