"""coeffdiff image-text"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coeffdiff.cli.compare import Pack, parse_seeds
from coeffdiff.cli.options import NAME, PATH, NumbersAsJson, expanded_path, parsed_by
from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import print_info, print_json, print_text
from coeffdiff.utils.output_folder import check_output, refuse_unwritable

Data = Annotated[
    Path,
    typer.Argument(
        parser=expanded_path, metavar="DATA", help="Folder with questions.jsonl and the pictures it names."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Encoder-decoder of texts by hub id or folder, such as facebook/bart-base.",
        show_default=False,
        **NAME,
    ),
]
TowerName = Annotated[
    str | None,
    typer.Option(
        help="CLIP whose vision tower sees, by hub id or folder. (default: the model's own, else CLIP ViT-B/32)",
        **NAME,
    ),
]
Arms = Annotated[
    list[str] | None,
    typer.Option(
        help="frozen, linear, lora, coeff, coeff+lora or full; repeatable. (default: all but full)",
    ),
]
Seeds = Annotated[Any, typer.Option(parser=parsed_by(parse_seeds), metavar="A,B,...", help="Tuning seeds.")]


@app.command("image-text")
@answering
def image_text(
    data: Data,
    model: Model,
    tower: TowerName = None,
    arm: Arms = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 32,
    questions: Annotated[
        int, typer.Option(min=0, help="Of each task to train on, drawn anew for each seed; 0: all.")
    ] = 0,
    seeds: Seeds = "0,1,2",
    tries: Annotated[int, typer.Option(min=1, help="Learning rates tried for each arm.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA.")] = 4,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="On alpha.")] = 0.1,
    output: Annotated[
        Path, typer.Option(help="Folder of the results; what it holds is not computed again.", **PATH)
    ] = Path("image-text"),
    pack: Pack = False,
    as_json: NumbersAsJson = False,
) -> None:
    """Tune an image-text model to several kinds of questions together, with each method, and compare their answers."""
    check_output(output)
    refuse_unwritable(output, "The folder")
    from coeffdiff.evaluation.cells import CellFolder
    from coeffdiff.sampling.device import choose_device
    from coeffdiff.tasks.image_text import DEFAULT_ARMS, Comparison, compare_arms, open_bench
    from coeffdiff.tasks.image_text_cells import TuningPlan
    from coeffdiff.tasks.image_text_results import as_markdown, differences
    from coeffdiff.utils.atomic import atomic_write
    from coeffdiff.utils.launch_environment import forget_launch
    from coeffdiff.utils.oom import halved_batch, oom_hints

    forget_launch()
    arms = tuple(dict.fromkeys(arm)) if arm else DEFAULT_ARMS
    comparison = Comparison(arms, tuple(dict.fromkeys(seeds)), tries)
    plan = TuningPlan(steps, batch_size, questions, rank, dropout)
    with oom_hints(lambda: halved_batch(batch_size)):
        bench = open_bench(data, model, tower, plan, choose_device()[0])
        results = compare_arms(bench, comparison, output / "cells")
    with atomic_write(output / "results.json") as unfinished:
        unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if pack:
        cells = CellFolder(output / "cells")
        cells.pack("image-text", cells.all())
    if as_json:
        print_json(results)
        return
    print_text(as_markdown(results))
    if lines := differences(results):
        print_text("\n" + lines)
    print_info(f"results: {output / 'results.json'}")
