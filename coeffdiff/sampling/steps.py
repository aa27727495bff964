"""The steps of one run side by side: each drawn from equal noise, all in one grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from coeffdiff.hosts.diffusers import load_adapter
from coeffdiff.sampling.image_inputs import ImageInputs
from coeffdiff.sampling.options import OnProgress, Options, Request
from coeffdiff.sampling.output import GRID_FILE, write_pictures
from coeffdiff.utils.distributed import ONE_PROCESS, DistributedContext
from coeffdiff.utils.grids import fitted, labelled_grid
from coeffdiff.utils.png import free_name, save_png


def write_steps(
    pipe: Any,
    kept: Mapping[int, Path],
    scale: float | None,
    requests: Sequence[Request],
    options: Options,
    folder: Path,
    *,
    images: ImageInputs | None = None,
    prepare: Callable[[], None],
    details: Mapping[str, Any],
    on_progress: OnProgress,
    team: DistributedContext = ONE_PROCESS,
) -> list[Path]:
    """Every request with the adapter of every step, loaded and removed one after the other on one model.

    A request has the same noise at each step. Rows of the grid are prompts and seeds, columns are steps.

    Args:
        kept: adapter folders by step.
        prepare: moves the pipeline to its device, after an adapter has been loaded.
    Returns: the pictures' files, step by step, then the grid's.
    """
    files: dict[int, list[Path]] = {}
    token = ""
    for number, (step, path) in enumerate(kept.items()):
        adapter = load_adapter(pipe, path, scale)
        token = " and ".join(adapter.header.tokens)
        prepare()

        def report(done: float, before: int = number * len(requests)) -> None:
            on_progress(before + done)

        files[step] = write_pictures(
            pipe,
            requests,
            options,
            folder,
            images=images,
            details={**details, "step": step},
            on_progress=report,
            team=team,
            ending=f"-step{step:06d}",
            grid=False,
        )
        adapter.remove()
        pipe.remove_all_hooks()  # or the next adapter would find an offloaded UNet without weights
    grid = team.on_main(lambda: _write_grid(files, requests, folder, token))
    return [*(file for step in kept for file in files[step]), grid]


def _write_grid(
    files: Mapping[int, Sequence[Path]], requests: Sequence[Request], folder: Path, token: str
) -> Path:
    cell = max(96, min(256, 2048 // len(files)))  # pixels a side
    seeds = {request.seed for request in requests}
    rows = []
    for number, request in enumerate(requests):
        label = f"{request.prompt}\nseed {request.seed}" if len(seeds) > 1 else request.prompt
        row = []
        for of_step in files.values():
            with Image.open(of_step[number]) as picture:
                row.append(fitted(picture, cell))
        rows.append((label, row))
    grid = free_name(folder / GRID_FILE)
    heads = [f"step {step}" for step in files]
    save_png(labelled_grid(rows, heads, title=f"{token} by step", cell=cell), grid)
    return grid
