"""Pictures as PNG files that hold their recipe, and one grid of all."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from coeffdiff import __version__
from coeffdiff.hosts.diffusers import loaded_adapters
from coeffdiff.hosts.hub.address import origin_of
from coeffdiff.sampling.generation import batches_of, dtype_name, generate
from coeffdiff.sampling.image_inputs import ImageInputs
from coeffdiff.sampling.options import Encoded, OnProgress, Options, Request, picture_size
from coeffdiff.sampling.schedulers import settings_of_scheduler
from coeffdiff.sampling.vae_precision import needs_upcast
from coeffdiff.utils.distributed import ONE_PROCESS, DistributedContext
from coeffdiff.utils.grids import fitted, labelled_grid
from coeffdiff.utils.png import free_name, save_png

GRID_FILE = "grid.png"


def write_pictures(
    pipe: Any,
    requests: Iterable[Request],
    options: Options,
    folder: Path,
    *,
    encoded: Mapping[str, Encoded] | None = None,
    images: ImageInputs | None = None,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    team: DistributedContext = ONE_PROCESS,
    ending: str = "",
    grid: bool = True,
) -> list[Path]:
    """Write each picture as soon as it is made, then all of them as one labelled grid, folder/GRID_FILE.

    Pictures of one scale are made one after the other, so that batches are full; names and grid keep the order of
    the requests.

    Args:
        images: what all pictures begin from or are steered by; pipe is then what pipeline_for made for it.
        details: added to the recipes: the model's name and whatever else it takes to repeat a picture.
        overwrite: replace files of the same name; otherwise new files take the next free names.
        team: processes that share the work, all called with equal arguments. Each batch is made by one of them and
            is the same as with one process, so the pictures are equal bit for bit.
        ending: of the pictures' names, before .png.  grid: False writes none.
    Returns: the pictures' files in the order of the requests, then the grid's.
    Raises: ConfigError if the folder cannot be written; and what generate raises.
    """
    requests = list(requests)
    batches = plan(requests, options.batch_size)
    shares = batches[team.rank :: team.size]
    rounds = math.ceil(len(batches) / team.size)
    cell = _cell(requests)
    written: dict[int, tuple[Path, Image.Image]] = {}  # request -> its file, its place in the grid

    def made(done: float) -> None:
        if on_progress and team.size == 1:
            on_progress(done)
        elif on_progress:  # assumes equal speed; all are done only after the last gather
            on_progress(min(len(requests) - 0.5, done * team.size))

    own = [i for share in shares for i in share]
    with closing(
        generate(pipe, [requests[i] for i in own], options, encoded=encoded, images=images, on_progress=made)
    ) as pictures:
        for number in range(rounds):
            share = shares[number] if number < len(shares) else []
            for i, (request, image) in zip(share, pictures, strict=False):
                file = folder / _file_name(i + 1, request, ending)
                file = file if overwrite else free_name(file)
                told = {**(images.details if images else {}), **(details or {})}
                save_png(image, file, recipe(pipe, request, options, told))
                written[i] = file, fitted(image, cell)
            team.gather(None)  # after each round, so that an error of one ends all before the next
    for others in team.gather(written):
        written |= others
    files = [written[i][0] for i in range(len(requests))]
    if on_progress and team.size > 1:
        on_progress(len(requests))

    def write_grid() -> Path:
        sheet = folder / GRID_FILE
        sheet = sheet if overwrite else free_name(sheet)
        thumbnails = {requests[i]: thumbnail for i, (_, thumbnail) in written.items()}
        save_png(_grid(pipe, requests, thumbnails, cell), sheet)
        return sheet

    return [*files, team.on_main(write_grid)] if files and grid else files


def plan(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """The requests' indices in batches, one scale after the other: the units that processes share."""
    order = {scale: n for n, scale in enumerate(dict.fromkeys(request.scale for request in requests))}
    by_scale = sorted(
        range(len(requests)), key=lambda i: order[requests[i].scale]
    )  # equal ones keep their order
    batches = batches_of([requests[i] for i in by_scale], batch_size)
    return [[by_scale[i] for i in batch] for batch in batches]


def _file_name(number: int, request: Request, ending: str = "") -> str:
    slug = re.sub(r"\W+", "-", request.prompt)[:40].strip("-") or "picture"
    scale = "" if request.scale is None else f"-scale{request.scale:g}"
    return f"{number:03d}-{slug}-seed{request.seed}{scale}{ending}.png"


def _cell(requests: Sequence[Request]) -> int:
    """Side of a picture in the grid in pixels; keeps the grid below about 2000 x 16000 where that is legible."""
    columns, rows = _axes(requests)
    return max(96, min(256, 2048 // max(1, len(columns)), 16384 // max(1, len(rows))))


def _axes(requests: Sequence[Request]) -> tuple[list[Any], list[Any]]:
    """The grid's columns and rows: seeds by prompts, or scales by prompts and seeds."""
    if any(request.scale is not None for request in requests):
        rows: list[Any] = [(request.prompt, request.seed) for request in requests]
        columns: list[Any] = [request.scale for request in requests]
    else:
        rows, columns = [request.prompt for request in requests], [request.seed for request in requests]
    return list(dict.fromkeys(columns)), list(dict.fromkeys(rows))


def _grid(
    pipe: Any, requests: Sequence[Request], thumbnails: Mapping[Request, Image.Image], cell: int
) -> Image.Image:
    columns, rows = _axes(requests)
    if all(request.scale is None for request in requests):
        pictures = [(prompt, [thumbnails.get(Request(prompt, seed)) for seed in columns]) for prompt in rows]
        return labelled_grid(pictures, [f"seed {seed}" for seed in columns], cell=cell)
    seeds = {seed for _, seed in rows}
    labelled = [
        (
            f"{prompt}\nseed {seed}" if len(seeds) > 1 else prompt,
            [thumbnails.get(Request(prompt, seed, scale)) for scale in columns],
        )
        for prompt, seed in rows
    ]
    first, *others = loaded_adapters(pipe)
    beside = "".join(f", with {' and '.join(other.header.tokens)} at {other.scale:g}" for other in others)
    heads = ["as loaded" if scale is None else f"scale {scale:g}" for scale in columns]
    title = f"{' and '.join(first.header.tokens)} at several scales{beside}"
    return labelled_grid(labelled, heads, title=title, cell=cell)


def recipe(
    pipe: Any, request: Request, options: Options, details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything needed to make this picture again, as plain values."""
    width, height = picture_size(pipe, options)
    return {
        "prompt": request.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": request.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "scheduler": type(pipe.scheduler).__name__,
        **settings_of_scheduler(pipe.scheduler),
        "prediction_type": pipe.scheduler.config.get("prediction_type"),
        "width": width,
        "height": height,
        "batch_size": options.batch_size,
        "model": str(pipe.config.get("_name_or_path") or "unknown"),
        "precision": dtype_name(pipe.unet),
        "vae_precision": "float32" if needs_upcast(pipe.vae) else dtype_name(pipe.vae),
        "device": pipe._execution_device.type,
        "adapters": [
            {
                "path": origin_of(adapter.path),
                "scale": adapter.scale if number or request.scale is None else request.scale,
                "kind": adapter.header.kind,
                "token": " and ".join(adapter.header.tokens),
                "trained_steps": adapter.header.trained_steps,
            }
            for number, adapter in enumerate(loaded_adapters(pipe))
        ],
        "versions": {
            "coeffdiff": __version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        **(details or {}),
    }
