"""coeffdiff evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.adapters import folder_and_scale
from coeffdiff.cli.options import (
    NAME,
    PATH,
    AdaptersModel,
    BatchSize,
    Count,
    DenoisingSteps,
    ModelConfig,
    NumbersAsJson,
    OffloadOption,
    OtherVae,
    Pixels,
    PrecisionOption,
    Quantize,
    expanded_text,
)
from coeffdiff.cli.processes import start_launched
from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import duration, print_info, print_json, print_text
from coeffdiff.utils.output_folder import check_output

Runs = Annotated[
    list[str],
    typer.Argument(
        parser=expanded_text,
        metavar="RUN[:SCALE]...",
        help="Run or adapter folders, RUN@STEP, or user/repo on the Hub, each scored alone.",
    ),
]
Photos = Annotated[
    Path | None,
    typer.Option(
        help="Photos, or a data set in DreamBooth's layout. (default: what the run was trained on)", **PATH
    ),
]
PromptList = Annotated[
    str,
    typer.Option(
        help="auto, object, living, pocket, dreambooth, or a text file with {token} in its lines.", **NAME
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many prompts, spread over the list.")]
Checkpoints = Annotated[bool, typer.Option("--checkpoints", help="Score every step that a run keeps.")]
DriftPictures = Annotated[
    int, typer.Option(min=0, help="Pictures for each prompt without the token; 0: no drift.")
]
FirstSeed = Annotated[int | None, typer.Option(help="First seed. (default: 100000, beyond training's)")]
Guidance = Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")]
Dino = Annotated[
    str | None,
    typer.Option(help="Vision transformer. (default: facebook/dino-vits16; pocket: its own)", **NAME),
]
Clip = Annotated[
    str | None,
    typer.Option(help="CLIP. (default: openai/clip-vit-base-patch32; pocket: its own)", **NAME),
]
Output = Annotated[Path | None, typer.Option(help="Output folder. (default: evaluations/N)", **PATH)]


@app.command()
@answering
def evaluate(
    runs: Runs,
    images: Photos = None,
    prompts: PromptList = "auto",
    limit: Limit = None,
    checkpoints: Checkpoints = False,
    pictures: Count = 4,
    drift_pictures: DriftPictures = 2,
    seed: FirstSeed = None,
    steps: DenoisingSteps = 30,
    guidance: Guidance = 5.0,
    width: Pixels = None,
    height: Pixels = None,
    dino: Dino = None,
    clip: Clip = None,
    precision: PrecisionOption = "auto",
    offload: OffloadOption = "none",
    quantize: Quantize = None,
    batch_size: BatchSize = 4,
    output: Output = None,
    model: AdaptersModel = None,
    model_config: ModelConfig = None,
    vae: OtherVae = None,
    as_json: NumbersAsJson = False,
) -> None:
    """Score adapters by DreamBooth's protocol, plus drift on other prompts; runs under accelerate launch."""
    from coeffdiff.config.fields import EVALUATION_FIRST_SEED
    from coeffdiff.utils.distributed import process_group

    with process_group(start_launched) as team:
        check_output(output)
        from coeffdiff.evaluation.evaluate import evaluate as run_evaluation
        from coeffdiff.evaluation.tables import summary
        from coeffdiff.hosts.hub.lookup import resolve_adapter
        from coeffdiff.sampling.options import Options
        from coeffdiff.sampling.runs import every_step

        named = [folder_and_scale(text) for text in runs]
        if team.size > 1 and not checkpoints:
            team.on_main(
                lambda: [resolve_adapter(path) for path, _ in named]
            )  # fetched once, for all processes
        result = run_evaluation(
            team.on_main(lambda: every_step(named)) if checkpoints else named,
            output,
            options=Options(
                steps=steps, guidance=guidance, width=width, height=height, batch_size=batch_size
            ),
            images=images,
            prompts=prompts,
            limit=limit,
            pictures=pictures,
            drift_pictures=drift_pictures,
            first_seed=EVALUATION_FIRST_SEED if seed is None else seed,
            model=model,
            model_config=model_config,
            vae=vae,
            quantize=quantize,
            precision=precision,
            offload=offload,
            dino=dino,
            clip=clip,
            team=team,
        )
    if not team.is_main:
        return
    if as_json:
        print_json(result.results)
        return
    print_text(summary(result.results))
    seconds = duration(result.results["seconds"])
    print_info(f"done in {seconds}: {result.report}, {result.numbers}, {result.table}")
