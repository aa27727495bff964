"""draw(): prompts and adapters -> pictures and a grid in a folder. What `coeffdiff sample` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coeffdiff.hosts.diffusers import load_adapter
from coeffdiff.hosts.hub.address import origin_of
from coeffdiff.hosts.token.vocabulary import announce_tokens
from coeffdiff.models.controlnet import find_controlnet
from coeffdiff.models.opening import Asked, recipe, unlike_previews
from coeffdiff.sampling.image_inputs import Guide, ImageOptions, read_inputs
from coeffdiff.sampling.memory_options import Offload, Precision
from coeffdiff.sampling.options import Options, Request, check_options, picture_size
from coeffdiff.sampling.output import plan, write_pictures
from coeffdiff.sampling.prompts import fill_prompt, warnings_for
from coeffdiff.sampling.schedulers import set_scheduler
from coeffdiff.sampling.selection import Selection
from coeffdiff.sampling.session import Session, open_session, print_hints, read_adapters
from coeffdiff.sampling.steps import write_steps
from coeffdiff.utils.console import duration, print_info, progress
from coeffdiff.utils.distributed import ONE_PROCESS, DistributedContext
from coeffdiff.utils.output_folder import output_folder, refuse_unwritable
from coeffdiff.utils.torch_setup import precision_name

SAMPLES = Path("samples")

# Seconds for so many pictures, see preflight.sampling_time.expected_seconds
Estimate = Callable[[Any, Options, int, torch.device], float]


@dataclass(frozen=True)
class Drawn:
    """files: the pictures' in the order of prompts, seeds and scales, or step by step; the grid's is the last."""

    folder: Path
    files: list[Path]


def draw(
    prompts: Sequence[str],
    selection: Selection = Selection(),  # noqa: B008  # frozen
    options: Options = Options(),  # noqa: B008  # frozen
    *,
    seeds: range = range(1),
    asked: Asked = Asked(),  # noqa: B008  # frozen
    scheduler: str | None = None,
    precision: Precision = "auto",
    offload: Offload = "none",
    compiled: bool = False,
    images: ImageOptions = ImageOptions(),  # noqa: B008  # frozen
    output: Path | None = None,
    estimate: Estimate | None = None,
    team: DistributedContext = ONE_PROCESS,
) -> Drawn:
    """Write a picture for each prompt, seed and scale, or step; each file holds its own recipe.

    All that can be wrong is found before the weights are read.

    Args:
        prompts: <V> stands for the adapters' one token.
        asked: a base model, configs or VAE other than the adapters' own.
        scheduler: see set_scheduler; by default the model's own.
        images: a picture to begin from, a mask, a ControlNet.
        output: by default the next free folder in SAMPLES.
        estimate: announces a wait of more than a minute.
        team: processes that share the work, all called with equal arguments.
    Raises: AdapterError, AdapterMismatch, ModelError and ConfigError with what to do; OutOfMemory with options that
        reduce memory; NonFinitePicture.
    """
    adapters = read_adapters([folder for folder, _ in selection.adapters], together=not selection.steps)
    team.on_main(lambda: refuse_unwritable(output or SAMPLES))
    session = open_session(adapters, asked, precision=precision, offload=offload, device=team.device)
    session.print_model(team.size)
    outline = _checked_outline(session, options, scheduler)
    guide, options = _guide(session, outline, images, options)
    texts = _filled(prompts, session)
    _print_hints(session, selection, texts, outline, options, precision)
    requests = [Request(text, seed, scale) for text in texts for seed in seeds for scale in selection.scales]
    _print_idle(team, plan(requests, options.batch_size))
    team.gather(None)  # an error of one process ends all before the weights are read

    with output_folder(output, SAMPLES, team) as folder:
        pipe = _loaded(session, outline, guide, options)
        if selection.steps:
            print_info(f"steps    {', '.join(map(str, selection.steps))}, each loaded and drawn in turn")
            files = _write_steps(session, pipe, selection, requests, options, guide, folder, team)
            return Drawn(folder, files)
        _load_adapters(pipe, session, selection)
        with session.oom_hints(options):
            session.prepare(pipe, compiled=compiled)
            if estimate and not images.controlnet:
                share = math.ceil(len(requests) / team.size)
                steps = guide.steps(options.steps) if guide else options.steps
                asked_steps = replace(options, steps=steps)
                _print_wait(estimate(pipe, asked_steps, share, session.device), session.device)
        return Drawn(folder, _write_pictures(session, pipe, requests, options, guide, folder, team))


def _loaded(session: Session, outline: Any, guide: Guide | None, options: Options) -> Any:
    """The pipeline with its weights and the outline's scheduler, without adapters."""
    with session.oom_hints(options):
        pipe = session.load()
    pipe.scheduler = outline.scheduler
    return guide.pipeline(pipe) if guide else pipe


def _checked_outline(session: Session, options: Options, scheduler: str | None) -> Any:
    """The pipeline without networks, with the chosen scheduler and the adapters' tokens."""
    for adapter in session.adapters:
        session.check_adapter(adapter)
    session.refuse_offload()
    outline = session.outline()
    headers = [adapter.header for adapter in session.adapters]
    learned = [header for header in headers if header.vectors]
    announce_tokens(outline, {token: header.vectors for header in learned for token in header.tokens})
    if scheduler:
        set_scheduler(outline, scheduler)
    check_options(outline, options)
    return outline


def _guide(
    session: Session, outline: Any, asked: ImageOptions, options: Options
) -> tuple[Guide | None, Options]:
    """What pictures begin from and are steered by, read and checked, and the options with the size that it gives."""
    if not asked:
        return None, options
    factor = outline.vae_scale_factor
    native = outline.default_sample_size * factor
    inputs, options = read_inputs(asked, options, native, math.lcm(8, factor))
    check_options(outline, options)
    found = None
    if asked.controlnet:
        half = session.dtype != torch.float32
        found = find_controlnet(asked.controlnet, session.unet_config, half=half)
        print_info(f"control  {found.name} at {asked.control_scale:g}")
    return Guide(inputs, found, session.dtype), options


def _filled(prompts: Sequence[str], session: Session) -> list[str]:
    tokens = [token for adapter in session.adapters for token in adapter.header.tokens]
    return [fill_prompt(text, tokens) for text in prompts]


def _print_hints(
    session: Session,
    selection: Selection,
    texts: Sequence[str],
    outline: Any,
    options: Options,
    precision: Precision,
) -> None:
    """What the user may not have intended: in the prompts, the base model, the size and the precision."""
    described = [(adapter.folder, adapter.header) for adapter in session.adapters]
    print_hints(warnings_for(texts, described[-1:] if selection.steps else described, outline, options))
    session.print_differences()
    size = None if options.width or options.height else picture_size(outline, options)
    automatic = precision_name(session.dtype) if precision == "auto" else None
    print_hints(unlike_previews(session.adapters, size, automatic))


def _print_idle(team: DistributedContext, batches: Sequence[Any]) -> None:
    idle = team.size - len(batches)
    if idle > 0:
        print_hints(
            [f"{idle} of {team.size} processes have nothing to do; a smaller --batch-size shares better"]
        )


def _print_wait(seconds: float, device: torch.device) -> None:
    if seconds > 60:
        print_info(f"expect   about {duration(seconds)} on this {device.type}")


def _load_adapters(pipe: Any, session: Session, selection: Selection) -> None:
    """Load all adapters together, and announce each with its scale."""
    first = selection.adapters[0][0] if selection.adapters else None
    swept = ",".join(f"{scale:g}" for scale in selection.scales if scale is not None)
    for (path, scale), adapter in zip(selection.adapters, session.adapters, strict=True):
        loaded, header = load_adapter(pipe, path, scale), adapter.header
        at = f"scales {swept}" if swept and path == first else f"scale {loaded.scale:g}"
        what = f"{header.described}, {header.trained_steps} steps, token {' and '.join(header.tokens)}"
        print_info(f"adapter  {origin_of(path)} at {at} ({what})")


def _write_pictures(
    session: Session,
    pipe: Any,
    requests: Sequence[Request],
    options: Options,
    guide: Guide | None,
    folder: Path,
    team: DistributedContext,
) -> list[Path]:
    with session.oom_hints(options), progress("sampling", len(requests)) as bar:
        return write_pictures(
            pipe,
            requests,
            options,
            folder,
            images=guide.inputs if guide else None,
            details=recipe(session.base),
            on_progress=bar,
            team=team,
        )


def _write_steps(
    session: Session,
    pipe: Any,
    selection: Selection,
    requests: Sequence[Request],
    options: Options,
    guide: Guide | None,
    folder: Path,
    team: DistributedContext,
) -> list[Path]:
    kept = {step: path for step, (path, _) in zip(selection.steps, selection.adapters, strict=True)}
    with session.oom_hints(options), progress("sampling", len(kept) * len(requests)) as bar:
        return write_steps(
            pipe,
            kept,
            selection.adapters[0][1],
            requests,
            options,
            folder,
            images=guide.inputs if guide else None,
            prepare=lambda: session.prepare(pipe),
            details=recipe(session.base),
            on_progress=bar,
            team=team,
        )
