"""The command line: options in, one function call, one answer out. Heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from coeffdiff import __version__
from coeffdiff.console import (
    answer,
    be_lenient,
    complain,
    duration,
    hush_bitsandbytes,
    is_main_process,
    progress,
    say,
    show,
    show_json,
    show_table,
    visible,
)
from coeffdiff.errors import AdapterError, CoeffDiffError, ConfigError, KernelsUnused
from coeffdiff.outputs import check_output
from coeffdiff.paths import expanded
from coeffdiff.threads import choose_waiting


class _Commands(TyperGroup):
    """Typer's own complaints quote arguments, which may be the names of files that somebody else gave them."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _harmless_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _harmless_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _harmless_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(getattr(error, "message", None), str):
            error.message = visible(error.message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach SDXL a subject from a few photos by recombining its attention maps across heads (Coeff-Tuning).",
)


Method = Literal["coeff", "lora", "coeff+lora", "token"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
Offload = Literal["none", "model", "sequential"]


def _name_or_path(text: Any) -> str:
    """An option's value with its ~ expanded. Whoever declares an option that may be a path takes PATH or NAME."""
    try:
        return str(expanded(text))
    except ValueError as error:
        _complain(f"ConfigError: {str(text)!r}: {error}.")
        raise typer.Exit(2) from None


def _path(text: Any) -> Path:
    return Path(_name_or_path(text))


PATH: dict[str, Any] = {"parser": _path, "metavar": "PATH"}
NAME: dict[str, Any] = {"parser": _name_or_path, "metavar": "NAME"}

# Options that several commands have
Images = Annotated[Path | None, typer.Option(help="Folder with the photos.", **PATH)]
Token = Annotated[str | None, typer.Option(help="The word that will mean the subject, such as sks.")]
ClassWord = Annotated[str | None, typer.Option(help='What the subject is, such as "stuffed animal".')]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Hub id, diffusers folder, .safetensors file, or pocket. (default: SDXL base 1.0)", **NAME
    ),
]
TrainedMethod = Annotated[Method | None, typer.Option(help="What is trained. (default: coeff+lora)")]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with settings; flags override it.", **PATH)]
TrainingSteps = Annotated[int | None, typer.Option(help="Optimizer steps. (default: by model)")]
Pixels = Annotated[int | None, typer.Option(help="In pixels. (default: the model's own)")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any setting; repeatable.")
]
ResultAsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Count = Annotated[int, typer.Option("-n", min=1, help="Pictures for each prompt.")]
DenoisingSteps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
PrecisionOption = Annotated[Precision, typer.Option(help="auto: bf16 or fp16 on a GPU, fp32 elsewhere.")]
OffloadOption = Annotated[Offload, typer.Option(help="Keep parts of the model off the GPU.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures made at a time.")]
AdaptersModel = Annotated[str | None, typer.Option(help="Base model. (default: the adapter's)", **NAME)]
ModelConfig = Annotated[
    str | None,
    typer.Option(
        help="Where a single-file model takes its configs from: a diffusers folder. (default: the adapter's)",
        **NAME,
    ),
]
OtherVae = Annotated[
    str | None,
    typer.Option(
        help="Another VAE; none: the model's own. (default: what the adapter was trained with)", **NAME
    ),
]
NumbersAsJson = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON on stdout.")]


def main() -> None:
    """Entry point of the console script and of `python -m coeffdiff`."""
    hush_bitsandbytes()
    be_lenient()
    if (
        "WORLD_SIZE" in os.environ
    ):  # where torch's C++ prints its stack beside an error that we say in a sentence
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    for library in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(library, "error")
    if not sys.warnoptions:
        # Libraries' deprecations are no news to the person at the command line; what we warn of is
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=KernelsUnused)
        warnings.showwarning = lambda message, *_, **__: say(f"warning  {message}")
    app()


def _answers(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a person's mistakes into one sentence on stderr and an exit code; defects keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        choose_waiting()  # no command loads torch before it runs
        try:
            command(*args, **kwargs)
        except CoeffDiffError as error:
            _complain(f"{type(error).__name__}: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("Interrupted: stopped at once; what had been saved before is untouched.")
            raise typer.Exit(130) from None
        except Exception as error:
            from coeffdiff.shortage import is_shortage, too_little

            if is_shortage(error):
                _complain(f"OutOfMemory: {too_little(error, [])}")
            elif isinstance(error, OSError) and error.errno in _REFUSALS:
                named = f": {str(error.filename)[:200]}" if error.filename else ""
                _complain(
                    f"{type(error).__name__}: {error.strerror}{named}. What had been saved is untouched."
                )
            else:
                raise
            raise typer.Exit(2) from None

    return run


# What a system refuses is no defect of a program's; a file that should be there and is not may be one.
_REFUSALS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENAMETOOLONG,
    }
    | {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENFILE}
)


def _complain(sentence: str) -> None:
    """Say it from whichever process met it: the photos may be missing on the second machine alone."""
    complain(sentence if is_main_process() else f"[rank {os.environ['RANK']}] {sentence}")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        show(f"coeffdiff {__version__}")
        raise typer.Exit


def _list_settings(wanted: bool) -> None:
    if wanted:
        from coeffdiff.config import Settings

        _print_settings(Settings)
        raise typer.Exit


def _list_schedulers(wanted: bool) -> None:
    if wanted:
        from coeffdiff.samplers import table

        answer("\n".join(table()))
        raise typer.Exit


def _print_settings(kind: Any) -> None:
    from coeffdiff.config import documented_settings

    for setting in documented_settings(kind):
        show(f"{setting.name}  [{json.dumps(setting.default, default=str)}]\n    {setting.description}")


@app.command()
@_answers
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
        typer.Option("--list-settings", is_eager=True, callback=_list_settings, help="Print every setting."),
    ] = False,
) -> None:
    """Learn a subject from a folder of photos; the adapter lands in the run folder."""
    from coeffdiff.config import load_settings

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
        from coeffdiff.training.state import run_to_resume, settings_to_resume

        run = run_to_resume(settings.output, settings.subject.token)
        settings = settings_to_resume(run, config, flags, set_ or ())
    from coeffdiff.training.launch import end_processes
    from coeffdiff.training.loop import train as run_training

    result = run_training(settings, resume=run)
    end_processes()
    if not is_main_process():
        return
    if as_json:
        show_json({k: str(v) if isinstance(v, Path) else v for k, v in vars(result).items()})
    else:
        say(f"done in {duration(result.seconds)}, last loss {result.loss:.4f}")
        answer(str(result.adapter))


@app.command()
@_answers
def check(
    images: Images = None,
    token: Token = None,
    class_word: ClassWord = None,
    model: BaseModel = None,
    method: TrainedMethod = None,
    config: ConfigFile = None,
    steps: TrainingSteps = None,
    resolution: Pixels = None,
    set_: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Before a run: what is odd about the photos, and what memory, time and disk it will take. Nothing is written."""
    from coeffdiff.config import PLACEHOLDER, load_settings
    from coeffdiff.data.photos import with_offers
    from coeffdiff.launched import forget_launch

    forget_launch()
    flags = {
        "subject.images": str(images) if images else None,
        "subject.token": token,
        "subject.class_word": class_word,
        "model.name": model,
        "method.kind": method,
        "training.steps": steps,
        "training.resolution": resolution,
    }
    settings = with_offers(load_settings(config, flags, set_ or ()))
    folder = settings.subject.images
    if folder is None:
        raise ConfigError("A check needs --images; for instance: check --images photos/ --token sks.")
    from coeffdiff import backbone, preflight
    from coeffdiff.data.photos import read_photos
    from coeffdiff.training.launch import start_processes
    from coeffdiff.training.prepare import resolve
    from coeffdiff.training.refusals import refuse_early
    from coeffdiff.training.state import new_run

    state = start_processes()
    with progress("reading photos", len(list(folder.iterdir())) if folder.is_dir() else 0) as bar:
        photos = read_photos(folder, settings.training.masked_loss, on_file=bar)
    base = backbone.find_backbone(settings.model)
    settings, _ = resolve(settings, base, state)
    class_pictures = refuse_early(settings, photos, base)
    new_run(settings.output, settings.subject.token or PLACEHOLDER)
    with progress("looking at photos", len(photos.photos)) as bar:
        report = preflight.check(
            settings,
            photos,
            base,
            state.device,
            budget_seconds=4,
            on_photo=bar,
            class_pictures=class_pictures,
        )
    if not is_main_process():
        return
    if as_json:
        skipped = [{"name": one.path.name, "reason": one.reason} for one in photos.skipped]
        about = {"model": base.name, "settings": settings.model_dump(mode="json")}
        show_json(report.as_dict() | about | {"left_out": skipped, "notes": photos.notes})
        return
    for line in preflight.table(report, photos):
        show(line)


@app.command()
@_answers
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; <V> stands for the token. Repeatable.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with a prompt a line.", **PATH)] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            parser=_name_or_path,
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
            "--list-schedulers", is_eager=True, callback=_list_schedulers, help="Print all names of samplers."
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
    from coeffdiff.files import refuse_unwritable
    from coeffdiff.processes import together

    with together(_start_processes) as team:
        from coeffdiff.promptfile import refuse_options

        for text in prompt or ():
            refuse_options(text, f"--prompt {text!r}")
        prompts = [*(prompt or ()), *_read_prompts(prompts_file)]
        if not prompts:
            raise ConfigError(
                'There is nothing to draw: pass --prompt "a photo of sks dog in the snow" or --prompts-file.'
            )
        check_output(output)
        strengths = _scales(scales, adapter)
        kept: dict[int, Path] = {}
        scale_of_all = None
        if checkpoints:
            kept, scale_of_all = team.from_main(lambda: _kept_steps(adapter, scales, compile_))
            wanted = [(folder, scale_of_all) for folder in kept.values()]
        else:
            wanted = team.from_main(lambda: _adapters(adapter))

        from coeffdiff import backbone, estimate, opening, sampling
        from coeffdiff.method.adapter import (
            check_apart,
            check_architecture,
            load_adapter,
            read_header,
            read_rows,
        )
        from coeffdiff.method.token import announce_tokens
        from coeffdiff.shortage import explained, sampling_switches
        from coeffdiff.steps import write_steps

        options = sampling.Options(
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
        device, dtype = sampling.choose_device(precision, team.device)
        base = opening.open_base(trained, opening.Asked(model, model_config, vae), dtype)
        shared = f" in {team.size} processes" if team.size > 1 else ""
        say(f"model    {base.name} on {device.type}, {str(dtype).removeprefix('torch.')}{shared}")
        if base.vae:
            say(f"vae      {opening.where(base.vae[0])}")

        # All that can be wrong is found before the weights are read, which takes a while
        if headers:
            shapes = backbone.unet_on_meta(base)
            for (path, _), header in zip(wanted, headers, strict=True):
                check_architecture(shapes, header, path)
                read_rows(path, header)
        sampling.refuse_offload(device, offload)
        outline = backbone.load_pipeline(base, dtype=dtype, parts=())  # tokenizers and scheduler alone
        announce_tokens(outline, {header.token: header.vectors for header in headers if header.vectors})
        if scheduler:
            sampling.set_scheduler(outline, scheduler)
        sampling.check_options(outline, options)
        tokens = [token for header in headers for token in header.tokens]
        prompts = [sampling.fill_prompt(text, tokens) for text in prompts]
        for warning in sampling.warnings_for(
            prompts, described[-1:] if checkpoints else described, outline, options
        ):
            say(f"hint     {warning}")
        for line in opening.differences(trained, base, dtype):
            say(f"hint     {line}")
        drawn = None if width or height else sampling.picture_size(outline, options)
        narrow = next(name for name, known in sampling.DTYPES.items() if known == dtype)
        for line in opening.unlike_previews(trained, drawn, narrow if precision == "auto" else None):
            say(f"hint     {line}")
        seeds = range(seed, seed + count)
        requests = [
            sampling.Request(text, number, strength)
            for text in prompts
            for number in seeds
            for strength in strengths
        ]
        idle = team.size - len(sampling.plan(requests, batch_size))
        if idle > 0:
            say(
                f"hint     {idle} of {team.size} processes have nothing to do; a smaller --batch-size shares better"
            )
        team.gather(None)  # here at the latest, what one of them lacks ends all

        left = functools.partial(
            sampling_switches,
            batch_size=batch_size,
            offload=offload,
            precision=next(name for name, known in sampling.DTYPES.items() if known == dtype),
            size=(width or backbone.native_resolution(base), height or backbone.native_resolution(base)),
            device_type=device.type,
        )
        with explained(left):
            pipe = backbone.load_pipeline(base, dtype=dtype)
        pipe.scheduler = outline.scheduler
        if checkpoints:
            say(f"steps    {', '.join(map(str, kept))}, each loaded and drawn in turn")
        for (path, scale), header in () if checkpoints else zip(wanted, headers, strict=True):
            loaded = load_adapter(pipe, path, scale)
            swept = scales is not None and path == wanted[0][0]
            at = (
                f"scales {','.join(f'{strength:g}' for strength in strengths)}"
                if swept
                else f"scale {loaded.scale:g}"
            )
            what = f"{header.described}, {header.trained_steps} steps, token {' and '.join(header.tokens)}"
            say(f"adapter  {path} at {at} ({what})")
        folder = team.from_main(lambda: output or _next_folder(Path("samples")))
        if checkpoints:
            with explained(left), progress("sampling", len(kept) * len(requests)) as bar:
                files = write_steps(
                    pipe,
                    kept,
                    scale_of_all,
                    requests,
                    options,
                    folder,
                    prepare=lambda: sampling.prepare_device(pipe, device, offload),
                    details=opening.recipe(base),
                    on_progress=lambda done: bar(done),
                    team=team,
                )
        else:
            with explained(left):
                sampling.prepare_device(pipe, device, offload, compiled=compile_)
                seconds = estimate.expected_seconds(
                    pipe, options, math.ceil(len(requests) / team.size), device
                )
            if seconds > 60:
                say(f"expect   about {duration(seconds)} on this {device.type}")
            with explained(left), progress("sampling", len(requests)) as bar:
                files = sampling.write_pictures(
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
        show_json({"folder": str(folder), "files": [str(file) for file in files]})
    else:
        for file in files:
            answer(str(file))


def _start_processes() -> Any:
    from coeffdiff.training.launch import start_processes

    return start_processes()


@app.command()
@_answers
def inspect(
    adapter: Annotated[
        Path | None,
        typer.Argument(
            parser=_path, metavar="ADAPTER", help="Run or adapter folder. (default: newest finished run)"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for a picture of all alphas as heat maps.", **PATH)
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="How many of the most recombined heads are listed.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.")] = False,
) -> None:
    """What an adapter holds and how far it moved from the base model; no model is loaded for it."""
    check_output(output)
    from coeffdiff.files import refuse_unwritable
    from coeffdiff.inspection import inspect_adapter, tables
    from coeffdiff.launched import forget_launch

    forget_launch()
    [(folder, _)] = _adapters([str(adapter)] if adapter else None, with_scales=False)
    if output:
        refuse_unwritable(output)
    found = inspect_adapter(folder)
    file = None
    if output:
        if not found.deviations:
            raise AdapterError(f"{folder} is of kind {found.header.kind}: it has no alpha to draw.")
        from coeffdiff.heatmap import draw_heat_maps
        from coeffdiff.pictures import free_name, save_png

        maps = {layer: deviation.numpy() for layer, deviation in found.deviations.items()}
        title = f"alpha of {' and '.join(found.header.tokens)} ({folder})"[:100]
        sheet = draw_heat_maps(maps, title, found.taken)
        file = free_name(output / "alpha.png")
        save_png(sheet, file)
    if as_json:
        show_json(found.as_json() | {"heat_maps": str(file) if file else None})
        return
    show_table(tables(found, heads))
    if file:
        answer(str(file))


@app.command()
@_answers
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(parser=_name_or_path, metavar="DIR[:SCALE]...", help="Run or adapter folders."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the merged adapter.", **PATH)],
    model: Annotated[
        str | None, typer.Option(help="Base model, where the adapters name different ones.", **NAME)
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="VAE, where the adapters name different ones; none: the model's own.", **NAME),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print its header as JSON on stdout.")] = False,
) -> None:
    """One adapter that does what several do together: coeff = I + the sum of scale x alpha, LoRAs added up."""
    check_output(output)
    from coeffdiff.launched import forget_launch
    from coeffdiff.method.merging import merge_adapters

    forget_launch()
    vae = os.path.abspath(vae) if vae and Path(vae).is_dir() else vae  # noqa: PTH100
    header = merge_adapters([*map(_folder_and_scale, adapters)], output, model, vae)
    if as_json:
        show_json({"adapter": str(output), "header": header.model_dump(mode="json")})
        return
    for part in header.merged:
        say(f"part     {part.token} x {part.scale:g} ({part.kind}, {part.trained_steps} steps)")
    answer(str(output))


@app.command()
@_answers
def demo(
    output: Annotated[
        Path | None, typer.Option(help="Folder for all of it. (default: demo, or the next free)", **PATH)
    ] = None,
    subject: Annotated[
        str, typer.Option(help="Which of the made-up subjects is learned.")
    ] = "grey_sloth_plushie",
    method: Annotated[Method, typer.Option(help="What is trained.")] = "coeff+lora",
    steps: TrainingSteps = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training and of the pictures.")] = 0,
    as_json: ResultAsJson = False,
) -> None:
    """Photos, training and pictures on a small model that comes along: no network, no GPU, a few minutes."""
    check_output(output)
    from coeffdiff.demo import GUIDANCE, readable_size
    from coeffdiff.demo import demo as run_demo

    result = run_demo(output, subject=subject, method=method, steps=steps, seed=seed)
    if as_json:
        show_json({k: str(v) if isinstance(v, Path) else v for k, v in vars(result).items()})
        return
    word = result.class_word
    say(f"done in {duration(result.seconds)}")
    say(f"photos   {result.photos}")
    say(f"adapter  {result.adapter} ({readable_size(result.adapter_bytes)}, the only thing to keep or share)")
    say(f"pictures {result.pictures}, each with its recipe; all in one, to be opened first:")
    answer(str(result.figure))
    say(
        *f"""
More of these:
    coeffdiff sample --adapter {result.run} --prompt "a photo of <V> {word} at night" --guidance {GUIDANCE:g} -n 4
With your own photos, and SDXL in place of the small model (a download of 7 GB, and a GPU to be quick):
    coeffdiff train --images YOUR_PHOTOS/ --token ohwx --class-word "stuffed animal"
    coeffdiff sample --prompt "a photo of <V> stuffed animal in the snow" -n 4""".split("\n")
    )


@app.command()
@_answers
def evaluate(
    runs: Annotated[
        list[str],
        typer.Argument(
            parser=_name_or_path, metavar="RUN[:SCALE]...", help="Run or adapter folders, each scored alone."
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Photos, or a data set in DreamBooth's layout. (default: what the run was trained on)",
            **PATH,
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            help="auto, object, living, pocket, dreambooth, or a text file with {token} in its lines.", **NAME
        ),
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many prompts, spread over the list.")
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Score every step that a run keeps.")
    ] = False,
    pictures: Count = 4,
    drift_pictures: Annotated[
        int, typer.Option(min=0, help="Pictures for each prompt without the token; 0: no drift.")
    ] = 2,
    seed: Annotated[int | None, typer.Option(help="First seed. (default: 100000, beyond training's)")] = None,
    steps: DenoisingSteps = 30,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 5.0,
    width: Pixels = None,
    height: Pixels = None,
    dino: Annotated[
        str | None,
        typer.Option(help="Vision transformer. (default: facebook/dino-vits16; pocket: its own)", **NAME),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="(default: openai/clip-vit-base-patch32; pocket: its own)", **NAME)
    ] = None,
    precision: PrecisionOption = "auto",
    offload: OffloadOption = "none",
    batch_size: BatchSize = 4,
    output: Annotated[
        Path | None, typer.Option(help="Folder for all of it. (default: evaluations/N)", **PATH)
    ] = None,
    model: AdaptersModel = None,
    model_config: ModelConfig = None,
    vae: OtherVae = None,
    as_json: NumbersAsJson = False,
) -> None:
    """Score adapters by DreamBooth's protocol, and how far they move what nobody asked them to. Processes share it."""
    from coeffdiff.config import EVALUATION_FIRST_SEED
    from coeffdiff.processes import together

    with together(_start_processes) as team:
        check_output(output)
        from coeffdiff import sampling
        from coeffdiff.evaluation.evaluate import evaluate as run_evaluation
        from coeffdiff.evaluation.evaluate import summary
        from coeffdiff.steps import every_step

        asked = [_folder_and_scale(text) for text in runs]
        if checkpoints:
            asked = team.from_main(lambda: every_step(asked))

        options = sampling.Options(
            steps=steps, guidance=guidance, width=width, height=height, batch_size=batch_size
        )
        result = run_evaluation(
            asked,
            team.from_main(lambda: output or _next_folder(Path("evaluations"))),
            options=options,
            images=images,
            prompts=prompts,
            limit=limit,
            pictures=pictures,
            drift_pictures=drift_pictures,
            first_seed=EVALUATION_FIRST_SEED if seed is None else seed,
            model=model,
            model_config=model_config,
            vae=vae,
            precision=precision,
            offload=offload,
            dino=dino,
            clip=clip,
            team=team,
        )
    if not team.is_main:
        return
    if as_json:
        show_json(result.results)
        return
    show(summary(result.results))
    say(f"done in {duration(result.results['seconds'])}: {result.report}, {result.numbers}, {result.table}")


@app.command()
@_answers
def compare(
    plan: Annotated[
        Path | None,
        typer.Argument(
            parser=_path,
            metavar="[PLAN.yaml]",
            help="What is to be compared. (default: base, lora, coeff, coeff+lora)",
        ),
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(
            help="dev, eval or fresh:N of pocket's own; or a folder of photos or of such folders.", **NAME
        ),
    ] = None,
    model: BaseModel = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Only this arm of the plan and its reference; repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="A,B,...", help="Of training. (default: 0,1)")] = None,
    class_word: Annotated[
        str | None, typer.Option(help="What the subjects are, where no list of classes says it.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=B", help="Anything else of the plan; repeatable.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the comparison; what it holds is not computed again.", **PATH)
    ] = Path("comparison"),
    part: Annotated[
        str,
        typer.Option(
            metavar="K/N",
            help="Only every N-th subject and seed, for machines that share no folder.",
        ),
    ] = "1/1",
    pack: Annotated[
        bool, typer.Option("--pack", help="At the end fold the cells into one file, cells/PLAN.jsonl.")
    ] = False,
    as_json: NumbersAsJson = False,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", help="Print everything that a plan may say.")
    ] = False,
) -> None:
    """Train and score several methods on the same subjects; resumes, and processes may be started side by side."""
    from coeffdiff.config import load_section
    from coeffdiff.evaluation.compare import Comparison
    from coeffdiff.evaluation.compare import compare as run_comparison
    from coeffdiff.evaluation.paired import as_text

    if list_settings:
        _print_settings(Comparison)
        return
    check_output(output)
    flags = {
        "subjects": subjects,
        "model.name": model,
        "class_word": class_word,
        "seeds": [_whole(text, "--seeds") for text in seeds.split(",")] if seeds else None,
    }
    asked = load_section(Comparison, plan, flags, set_ or ())
    pack_as = (plan.stem if plan else "comparison") if pack else None
    outcome = run_comparison(asked.only(arm) if arm else asked, output, _part(part), pack_as=pack_as)
    if as_json:
        show_json(outcome.results)
        return
    show(as_text(outcome.results))
    answer(str(outcome.report))


def _whole(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers with commas between them, not {text!r}.") from None


def _part(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part takes a share such as 1/4, 2/4, 3/4 or 4/4, not {text!r}.")
    return int(match[1]), int(match[2])


@app.command()
@_answers
def toy(
    output: Annotated[Path, typer.Option(help="Folder for toy.png and toy.json.", **PATH)] = Path("toy"),
    seeds: Annotated[int, typer.Option(min=1, help="Problems for each target.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps at every learning rate.")] = 1000,
    restarts: Annotated[int, typer.Option(min=1, help="Starts for each problem.")] = 3,
    as_json: NumbersAsJson = False,
) -> None:
    """The paper's toy experiment: one attention layer, three ways to tune it, what each can and cannot reach."""
    check_output(output)
    from coeffdiff.evaluation.toy import ARMS, SETTINGS, table
    from coeffdiff.evaluation.toy import toy as run_toy
    from coeffdiff.launched import forget_launch

    forget_launch()
    with progress("tuning", len(SETTINGS) * len(ARMS)) as bar:
        result = run_toy(output, seeds=seeds, steps=steps, restarts=restarts, on_progress=bar)
    if as_json:
        show_json(result.results)
        return
    show(table(result.results))
    say(f"done in {duration(result.seconds)}: {result.picture}, {result.numbers}")


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    from coeffdiff.promptfile import prompts_in

    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"The prompts file {file} cannot be read: {error.strerror or error}.") from None
    prompts, encoding = prompts_in(data, file)
    if encoding != "UTF-8":
        say(f"note     {file} is not UTF-8, and read as {encoding}")
    return list(prompts)


def _scales(text: str | None, adapters: list[str] | None) -> list[float | None]:
    """The scales that everything is drawn at; [None] for each adapter at its own."""
    if text is None:
        return [None]
    if adapters == ["none"]:
        raise ConfigError(
            "--scales needs an adapter, and --adapter none is the bare model; leave one of them out."
        )
    if adapters and _folder_and_scale(adapters[0])[1] is not None:
        raise ConfigError(
            f"--scales takes the place of the first adapter's own scale, and --adapter {adapters[0]} has one; "
            "leave one of them out."
        )
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"--scales takes numbers with commas between them, such as 0,0.5,1; not {text!r}.")
    return list(dict.fromkeys(found))


def _kept_steps(
    given: list[str] | None, scales: str | None, compiled: bool
) -> tuple[dict[int, Path], float | None]:
    """The adapters of one run by step, and the scale for all of them."""
    from coeffdiff.sampling import find_newest_run
    from coeffdiff.steps import steps_of

    if scales is not None or compiled:
        other = "--scales" if scales is not None else "--compile"
        why = (
            "draws each step at one scale"
            if scales is not None
            else "changes what would be compiled at each step"
        )
        raise ConfigError(f"--checkpoints {why}; leave {other} out.")
    if given == ["none"] or len(given or ()) > 1:
        raise ConfigError("--checkpoints draws the steps of one run: name it, alone, with --adapter RUN.")
    path, scale = _folder_and_scale(given[0]) if given else (str(find_newest_run(Path("runs"))), None)
    return steps_of(path)[1], scale


def _adapters(given: list[str] | None, with_scales: bool = True) -> list[tuple[Path, float | None]]:
    """Folders and scales; without any, the newest finished run."""
    from coeffdiff.sampling import find_newest_run

    if given == ["none"] and with_scales:
        return []
    if not given:
        run = find_newest_run(Path("runs"))
        say(f"run      {run} (the newest finished one)")
        return [(run / "adapter", None)]
    from coeffdiff.method.adapter import find_adapter

    pairs = map(_folder_and_scale, given) if with_scales else [(folder, None) for folder in given]
    return [(find_adapter(folder), scale) for folder, scale in pairs]


def _folder_and_scale(text: str) -> tuple[str, float | None]:
    folder, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, None
    try:
        return folder, float(scale)
    except ValueError:
        if Path(folder).exists() or Path(re.sub(r"@\w+$", "", folder)).is_dir():
            raise AdapterError(f"--adapter {text}: the scale {scale!r} is not a number.") from None
        return text, None


def _next_folder(parent: Path) -> Path:
    number = 1
    while (parent / f"{number:03d}").exists():
        number += 1
    return parent / f"{number:03d}"
