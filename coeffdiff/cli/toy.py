"""coeffdiff toy"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.options import PATH, NumbersAsJson
from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import duration, print_info, print_json, print_text, progress
from coeffdiff.utils.output_folder import check_output


@app.command()
@answering
def toy(
    output: Annotated[Path, typer.Option(help="Folder for toy.png and toy.json.", **PATH)] = Path("toy"),
    seeds: Annotated[int, typer.Option(min=1, help="Problems for each target.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps at every learning rate.")] = 1000,
    restarts: Annotated[int, typer.Option(min=1, help="Starts for each problem.")] = 3,
    as_json: NumbersAsJson = False,
) -> None:
    """The paper's toy experiment: one attention layer, three ways to tune it, what each can and cannot reach."""
    check_output(output)
    from coeffdiff.evaluation.toy.results import table
    from coeffdiff.evaluation.toy.settings import ARMS, SETTINGS
    from coeffdiff.evaluation.toy.toy import toy as run_toy
    from coeffdiff.utils.launch_environment import forget_launch

    forget_launch()
    with progress("tuning", len(SETTINGS) * len(ARMS)) as bar:
        result = run_toy(output, seeds=seeds, steps=steps, restarts=restarts, on_progress=bar)
    if as_json:
        print_json(result.results)
        return
    print_text(table(result.results))
    print_info(f"done in {duration(result.seconds)}: {result.picture}, {result.numbers}")
