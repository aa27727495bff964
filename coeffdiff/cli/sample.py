"""coeffdiff sample"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.adapters import parse_scales, select_adapters
from coeffdiff.cli.listings import list_schedulers_and_exit
from coeffdiff.cli.options import (
    NAME,
    PATH,
    AdaptersModel,
    BatchSize,
    CompileUnet,
    Count,
    DenoisingSteps,
    ModelConfig,
    OffloadOption,
    OtherVae,
    Pixels,
    PrecisionOption,
    Quantize,
    expanded_text,
)
from coeffdiff.cli.processes import start_launched
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import print_info, print_json, print_result
from coeffdiff.utils.output_folder import check_output

Prompts = Annotated[list[str] | None, typer.Option(help="A prompt; <V> stands for the token. Repeatable.")]
PromptsFile = Annotated[Path | None, typer.Option(help="Text file with a prompt a line.", **PATH)]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        parser=expanded_text,
        metavar="DIR[:SCALE]",
        help="Run or adapter folder, RUN@STEP, or user/repo\\[@revision] on the Hub; repeatable, adapters add up; none "
        "for the bare model. (default: newest run)",
    ),
]
Scales = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...", help="Draw everything at each of these scales of the first adapter: 0,0.5,1."
    ),
]
Checkpoints = Annotated[
    bool, typer.Option("--checkpoints", help="Draw everything with every step that the run keeps.")
]
FirstSeed = Annotated[int, typer.Option(min=0, help="Seed, incremented per picture.")]
Guidance = Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 or less: none.")]
NegativePrompt = Annotated[str | None, typer.Option(help="Negative prompt.")]
Scheduler = Annotated[
    str | None, typer.Option(help="Any of diffusers', such as ddim or unipc; A1111's names too.")
]
ListSchedulers = Annotated[
    bool,
    typer.Option(
        "--list-schedulers",
        is_eager=True,
        callback=list_schedulers_and_exit,
        help="Print all names of samplers.",
    ),
]
InitImage = Annotated[Path | None, typer.Option(help="A picture to begin from.", **PATH)]
Strength = Annotated[
    float | None,
    typer.Option(help="How much of it is drawn again, above 0 to 1. (default: 0.6, with a mask 1)"),
]
MaskImage = Annotated[
    Path | None, typer.Option(help="Inpainting: white where --init-image is drawn again.", **PATH)
]
Control = Annotated[
    str | None, typer.Option(help="ControlNet for the base model: hub id or diffusers folder.", **NAME)
]
ControlImage = Annotated[
    Path | None,
    typer.Option(help="What it follows, prepared as it wants it: edges, depth, a pose.", **PATH),
]
ControlScale = Annotated[float, typer.Option(help="How strongly it steers.")]
Pictures = Annotated[Path | None, typer.Option(help="Folder for the pictures. (default: samples/N)", **PATH)]
WrittenAsJson = Annotated[bool, typer.Option("--json", help="Print the files' paths as JSON on stdout.")]


@app.command()
@answering
def sample(
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    adapter: Adapters = None,
    scales: Scales = None,
    checkpoints: Checkpoints = False,
    count: Count = 1,
    seed: FirstSeed = 0,
    steps: DenoisingSteps = 30,
    guidance: Guidance = 5.0,
    negative_prompt: NegativePrompt = None,
    width: Pixels = None,
    height: Pixels = None,
    scheduler: Scheduler = None,
    list_schedulers: ListSchedulers = False,
    precision: PrecisionOption = "auto",
    offload: OffloadOption = "none",
    quantize: Quantize = None,
    batch_size: BatchSize = 1,
    compile_: CompileUnet = False,
    init_image: InitImage = None,
    strength: Strength = None,
    mask_image: MaskImage = None,
    controlnet: Control = None,
    control_image: ControlImage = None,
    control_scale: ControlScale = 1.0,
    output: Pictures = None,
    model: AdaptersModel = None,
    model_config: ModelConfig = None,
    vae: OtherVae = None,
    as_json: WrittenAsJson = False,
) -> None:
    """Make pictures with an adapter; every PNG carries its own recipe. Under accelerate launch the work is shared."""
    from coeffdiff.utils.distributed import process_group

    with process_group(start_launched) as team:
        prompts = _all_prompts(prompt or [], prompts_file)
        check_output(output)
        strengths = parse_scales(scales, adapter)
        selection = team.on_main(
            lambda: select_adapters(adapter, strengths, checkpoints=checkpoints, compiled=compile_)
        )
        from coeffdiff.models.opening import Asked
        from coeffdiff.preflight.sampling_time import expected_seconds
        from coeffdiff.sampling.drawing import draw
        from coeffdiff.sampling.image_inputs import ImageOptions
        from coeffdiff.sampling.options import Options

        drawn = draw(
            prompts,
            selection,
            Options(steps, guidance, negative_prompt or "", width, height, batch_size),
            seeds=range(seed, seed + count),
            asked=Asked(model, model_config, vae, quantize),
            scheduler=scheduler,
            precision=precision,
            offload=offload,
            compiled=compile_,
            images=ImageOptions(init_image, strength, mask_image, controlnet, control_image, control_scale),
            output=output,
            estimate=expected_seconds,
            team=team,
        )
    if not team.is_main:
        return
    if as_json:
        print_json({"folder": str(drawn.folder), "files": [str(file) for file in drawn.files]})
        return
    for file in drawn.files:
        print_result(str(file))


def _all_prompts(given: list[str], file: Path | None) -> list[str]:
    """Those of --prompt, then those of the file. Raises: ConfigError for none, or for options of other tools in one."""
    from coeffdiff.sampling.prompt_file import refuse_options

    for text in given:
        refuse_options(text, f"--prompt {text!r}")
    prompts = [*given, *(_read_prompts(file) if file else ())]
    if not prompts:
        raise ConfigError(
            'There is nothing to draw: pass --prompt "a photo of <V> dog in the snow" or --prompts-file.'
        )
    return prompts


def _read_prompts(file: Path) -> tuple[str, ...]:
    from coeffdiff.sampling.prompt_file import prompts_in

    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"The prompts file {file} cannot be read: {error.strerror or error}.") from None
    prompts, encoding = prompts_in(data, file)
    if encoding != "UTF-8":
        print_info(f"note     {file} is not UTF-8, and read as {encoding}")
    return prompts
