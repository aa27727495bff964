"""coeffdiff sample"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.adapters import adapters_and_scales, parse_scales, steps_by_number
from coeffdiff.cli.app import answering, app
from coeffdiff.cli.listings import list_schedulers_and_exit
from coeffdiff.cli.options import (
    PATH,
    AdaptersModel,
    BatchSize,
    Count,
    DenoisingSteps,
    ModelConfig,
    OffloadOption,
    OtherVae,
    Pixels,
    PrecisionOption,
    expanded_text,
)
from coeffdiff.cli.processes import start_launched
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import duration, print_info, print_json, print_result, progress
from coeffdiff.utils.output_folder import check_output, next_folder


@app.command()
@answering
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; <V> stands for the token. Repeatable.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with a prompt a line.", **PATH)] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            parser=expanded_text,
            metavar="DIR[:SCALE]",
            help="Run or adapter folder, or RUN@STEP; repeatable, adapters add up; none for the bare model. (default: "
            "newest run)",
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Draw everything at each of these scales of the first adapter: 0,0.5,1."
        ),
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Draw everything with every step that the run keeps.")
    ] = False,
    count: Count = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next has the next.")] = 0,
    steps: DenoisingSteps = 30,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 or less: none.")] = 5.0,
    negative_prompt: Annotated[str | None, typer.Option(help="What should not be seen.")] = None,
    width: Pixels = None,
    height: Pixels = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Any of diffusers', such as ddim or unipc; A1111's names too.")
    ] = None,
    list_schedulers: Annotated[
        bool,
        typer.Option(
            "--list-schedulers",
            is_eager=True,
            callback=list_schedulers_and_exit,
            help="Print all names of samplers.",
        ),
    ] = False,
    precision: PrecisionOption = "auto",
    offload: OffloadOption = "none",
    batch_size: BatchSize = 1,
    compile_: Annotated[
        bool, typer.Option("--compile", help="torch.compile the UNet: slower to start, faster pictures.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the pictures. (default: samples/N)", **PATH)
    ] = None,
    model: AdaptersModel = None,
    model_config: ModelConfig = None,
    vae: OtherVae = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON on stdout.")
    ] = False,
) -> None:
    """Make pictures with an adapter; every PNG carries its own recipe. Under accelerate launch the work is shared."""
    from coeffdiff.utils.distributed import process_group
    from coeffdiff.utils.writable import refuse_unwritable

    with process_group(start_launched) as team:
        from coeffdiff.sampling.prompt_file import refuse_options

        for text in prompt or ():
            refuse_options(text, f"--prompt {text!r}")
        prompts = [*(prompt or ()), *_read_prompts(prompts_file)]
        if not prompts:
            raise ConfigError(
                'There is nothing to draw: pass --prompt "a photo of sks dog in the snow" or --prompts-file.'
            )
        check_output(output)
        strengths = parse_scales(scales, adapter)
        kept: dict[int, Path] = {}
        scale_of_all = None
        if checkpoints:
            kept, scale_of_all = team.from_main(lambda: steps_by_number(adapter, scales, compile_))
            wanted = [(folder, scale_of_all) for folder in kept.values()]
        else:
            wanted = team.from_main(lambda: adapters_and_scales(adapter))

        from coeffdiff.hosts.diffusers import check_apart, check_architecture, load_adapter
        from coeffdiff.hosts.token_vocabulary import announce_tokens
        from coeffdiff.method.adapter_file import read_header, read_rows
        from coeffdiff.models import opening
        from coeffdiff.models.architecture import native_resolution, unet_on_meta
        from coeffdiff.models.loading import load_pipeline
        from coeffdiff.preflight.sampling_time import expected_seconds
        from coeffdiff.sampling import output as sampling
        from coeffdiff.sampling.device import choose_device, prepare_device, refuse_offload
        from coeffdiff.sampling.memory_options import sampling_switches
        from coeffdiff.sampling.options import DTYPES, Options, Request, check_options, picture_size
        from coeffdiff.sampling.output import write_pictures
        from coeffdiff.sampling.prompts import fill_prompt, warnings_for
        from coeffdiff.sampling.schedulers import set_scheduler
        from coeffdiff.sampling.steps import write_steps
        from coeffdiff.utils.oom import oom_hints

        options = Options(
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt or "",
            width=width,
            height=height,
            batch_size=batch_size,
        )
        headers = [read_header(folder) for folder, _ in wanted]
        described = [(folder, header) for (folder, _), header in zip(wanted, headers, strict=True)]
        if not checkpoints:
            for one, other in itertools.combinations(described, 2):
                check_apart(one, other)
        trained = [opening.Trained(folder, header) for folder, header in described]
        team.from_main(lambda: refuse_unwritable(output or Path("samples")))
        device, dtype = choose_device(precision, team.device)
        base = opening.open_base(trained, opening.Asked(model, model_config, vae), dtype)
        shared = f" in {team.size} processes" if team.size > 1 else ""
        print_info(f"model    {base.name} on {device.type}, {str(dtype).removeprefix('torch.')}{shared}")
        if base.vae:
            print_info(f"vae      {opening.where(base.vae[0])}")

        # All that can be wrong is found before the weights are read, which takes a while
        if headers:
            shapes = unet_on_meta(base)
            for (path, _), header in zip(wanted, headers, strict=True):
                check_architecture(shapes, header, path)
                read_rows(path, header)
        refuse_offload(device, offload)
        outline = load_pipeline(base, dtype=dtype, parts=())  # tokenizers and scheduler alone
        announce_tokens(outline, {header.token: header.vectors for header in headers if header.vectors})
        if scheduler:
            set_scheduler(outline, scheduler)
        check_options(outline, options)
        tokens = [token for header in headers for token in header.tokens]
        prompts = [fill_prompt(text, tokens) for text in prompts]
        for warning in warnings_for(prompts, described[-1:] if checkpoints else described, outline, options):
            print_info(f"hint     {warning}")
        for line in opening.differences(trained, base, dtype):
            print_info(f"hint     {line}")
        drawn = None if width or height else picture_size(outline, options)
        narrow = next(name for name, known in DTYPES.items() if known == dtype)
        for line in opening.unlike_previews(trained, drawn, narrow if precision == "auto" else None):
            print_info(f"hint     {line}")
        seeds = range(seed, seed + count)
        requests = [
            Request(text, number, strength) for text in prompts for number in seeds for strength in strengths
        ]
        idle = team.size - len(sampling.plan(requests, batch_size))
        if idle > 0:
            print_info(
                f"hint     {idle} of {team.size} processes have nothing to do; a smaller --batch-size shares better"
            )
        team.gather(None)  # here at the latest, what one of them lacks ends all

        left = functools.partial(
            sampling_switches,
            batch_size=batch_size,
            offload=offload,
            precision=next(name for name, known in DTYPES.items() if known == dtype),
            size=(width or native_resolution(base), height or native_resolution(base)),
            device_type=device.type,
        )
        with oom_hints(left):
            pipe = load_pipeline(base, dtype=dtype)
        pipe.scheduler = outline.scheduler
        if checkpoints:
            print_info(f"steps    {', '.join(map(str, kept))}, each loaded and drawn in turn")
        for (path, scale), header in () if checkpoints else zip(wanted, headers, strict=True):
            loaded = load_adapter(pipe, path, scale)
            swept = scales is not None and path == wanted[0][0]
            at = (
                f"scales {','.join(f'{strength:g}' for strength in strengths)}"
                if swept
                else f"scale {loaded.scale:g}"
            )
            what = f"{header.described}, {header.trained_steps} steps, token {' and '.join(header.tokens)}"
            print_info(f"adapter  {path} at {at} ({what})")
        folder = team.from_main(lambda: output or next_folder(Path("samples")))
        if checkpoints:
            with oom_hints(left), progress("sampling", len(kept) * len(requests)) as bar:
                files = write_steps(
                    pipe,
                    kept,
                    scale_of_all,
                    requests,
                    options,
                    folder,
                    prepare=lambda: prepare_device(pipe, device, offload),
                    details=opening.recipe(base),
                    on_progress=lambda done: bar(done),
                    team=team,
                )
        else:
            with oom_hints(left):
                prepare_device(pipe, device, offload, compiled=compile_)
                seconds = expected_seconds(pipe, options, math.ceil(len(requests) / team.size), device)
            if seconds > 60:
                print_info(f"expect   about {duration(seconds)} on this {device.type}")
            with oom_hints(left), progress("sampling", len(requests)) as bar:
                files = write_pictures(
                    pipe,
                    requests,
                    options,
                    folder,
                    details=opening.recipe(base),
                    on_progress=lambda done: bar(done),
                    team=team,
                )
    if not team.is_main:
        return
    if as_json:
        print_json({"folder": str(folder), "files": [str(file) for file in files]})
    else:
        for file in files:
            print_result(str(file))


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    from coeffdiff.sampling.prompt_file import prompts_in

    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"The prompts file {file} cannot be read: {error.strerror or error}.") from None
    prompts, encoding = prompts_in(data, file)
    if encoding != "UTF-8":
        print_info(f"note     {file} is not UTF-8, and read as {encoding}")
    return list(prompts)
