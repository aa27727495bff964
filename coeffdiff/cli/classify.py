"""coeffdiff classify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coeffdiff.cli.options import NAME, PATH, NumbersAsJson, expanded_path, parsed_by
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import print_info, print_json, print_text
from coeffdiff.utils.output_folder import check_output


def parse_shots(text: str) -> tuple[int, ...]:
    """ "4,16" -> (4, 16). Raises: ConfigError for anything but whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--shots takes whole numbers with commas between them, not {text!r}.") from None


Data = Annotated[
    Path,
    typer.Argument(
        parser=expanded_path,
        metavar="DATA",
        help="A folder with a folder of pictures for each class, or a .csv or .tsv file of texts.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Hub id or folder of a transformer for pictures or texts, or pocket-dino, pocket-clip.", **NAME
    ),
]
Arms = Annotated[
    list[str] | None,
    typer.Option(help="linear, lora, coeff or coeff+lora; repeatable. (default: all four)"),
]
Shots = Annotated[
    Any,
    typer.Option(
        parser=parsed_by(parse_shots), metavar="A,B,...", help="Examples of each class to train on."
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="How many draws of the shots; each trains every arm.")]
Tries = Annotated[
    int, typer.Option(min=1, help="Learning rates that each arm tries first; 1 takes the defaults untried.")
]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps of each training.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples a step.")]
Rank = Annotated[int, typer.Option(min=1, help="Of LoRA.")]
LoraTarget = Annotated[
    list[str] | None,
    typer.Option(help="End of the name of a layer for LoRA; repeatable. (default: queries and values)"),
]
Dropout = Annotated[float, typer.Option(min=0, max=0.99, help="On alpha.")]
Test = Annotated[int, typer.Option(min=1, help="Examples of each class to test on, at most.")]
Validation = Annotated[int, typer.Option(min=1, help="Examples of each class to tune rates on, at most.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column of their classes.")]
Output = Annotated[
    Path, typer.Option(help="Folder of the results; trainings that it holds are not repeated.", **PATH)
]
Pack = Annotated[
    str | None, typer.Option(help="At the end fold the trainings into one file, cells/NAME.jsonl.", **NAME)
]
Save = Annotated[
    bool, typer.Option("--save", help="Keep head, alpha and LoRA of every tested training, below trained/.")
]


@app.command()
@answering
def classify(
    data: Data,
    model: Model,
    arm: Arms = None,
    shots: Shots = "4,16",
    seeds: Seeds = 6,
    tries: Tries = 5,
    steps: Steps = 150,
    batch_size: BatchSize = 32,
    rank: Rank = 4,
    lora_target: LoraTarget = None,
    dropout: Dropout = 0.1,
    test: Test = 40,
    validation: Validation = 20,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    output: Output = Path("classification"),
    save: Save = False,
    pack: Pack = None,
    as_json: NumbersAsJson = False,
) -> None:
    """Few-shot classification of pictures or texts: linear head, LoRA, alpha, both; rates tuned alike; resumes."""
    check_output(output)
    from coeffdiff.tasks.arms import ARMS
    from coeffdiff.tasks.classify import classify as run
    from coeffdiff.tasks.classify_plan import Plan
    from coeffdiff.tasks.classify_report import as_text
    from coeffdiff.tasks.few_shot import Recipe
    from coeffdiff.utils.launch_environment import forget_launch
    from coeffdiff.utils.oom import halved_batch, oom_hints

    forget_launch()
    targets = tuple(lora_target) if lora_target else None
    plan = Plan(
        data=data, model=model, arms=tuple(arm) if arm else ARMS, shots=shots, seeds=seeds, tries=tries, test=test,
        validation=validation, text_column=text_column, label_column=label_column,
        recipe=Recipe(steps, batch_size, rank, targets, dropout),
    )  # fmt: skip
    with oom_hints(lambda: halved_batch(batch_size)):
        results = run(plan, output, pack_as=pack, keep=save)
    if as_json:
        print_json(results)
        return
    print_text(as_text(results))
    print_info(f"done: {output / 'classification.json'}")
