"""The steps of one run side by side: which are kept, and each of them drawn from equal noise in one grid."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from coeffdiff.errors import AdapterError
from coeffdiff.method.adapter_paths import kept_steps


def steps_of(path: str) -> tuple[Path, dict[int, Path]]:
    """The run that a run folder or its adapter means, and the adapters that it keeps, by step. Raises: AdapterError."""
    given = Path(path)
    run = next((place for place in (given, given.parent) if (place / "config.yaml").is_file()), None)
    if run is None:
        step = re.fullmatch(r"(.+)@(\w+)", path)
        hint = f"; {step[1]} has all its steps" if step and Path(step[1]).is_dir() else ""
        raise AdapterError(f"--checkpoints needs a run folder, and {path} is none{hint}.")
    kept = kept_steps(run)
    if not kept:
        raise AdapterError(
            f"{run} keeps no adapter yet. It will have one at its first checkpoint (training.checkpoint_every), and "
            "those of every N-th step with training.keep_adapters_every=N."
        )
    return run, kept


def every_step(runs: Iterable[tuple[str, float | None]]) -> list[tuple[str, float | None]]:
    """RUN and its scale -> RUN@100, RUN@200, ... at that scale."""
    found = [(*steps_of(path), scale) for path, scale in runs]
    return [(f"{run}@{step}", scale) for run, kept, scale in found for step in kept]


def write_steps(
    pipe: Any,
    kept: Mapping[int, Path],
    scale: float | None,
    requests: Sequence[Any],
    options: Any,
    folder: Path,
    *,
    prepare: Callable[[], None],
    details: Mapping[str, Any],
    on_progress: Callable[[float], None],
    team: Any,
) -> list[Path]:
    """Every request with the adapter of every step, loaded and taken off one after the other on one model.

    A request has the same noise at each step. Rows of the grid are prompts and seeds, columns are steps.

    Args:
        prepare: brings the pipeline to its device, after an adapter has come.
    Returns: the pictures' files, step by step, then the grid's.
    """
    from coeffdiff.hosts.diffusers import load_adapter
    from coeffdiff.sampling.output import GRID_FILE, write_pictures
    from coeffdiff.utils.grids import fitted, labelled_grid
    from coeffdiff.utils.png import free_name, save_png

    cell = max(96, min(256, 2048 // len(kept)))
    files: dict[int, list[Path]] = {}
    token = ""
    for number, (step, path) in enumerate(kept.items()):
        adapter = load_adapter(pipe, path, scale)
        token = adapter.header.token
        prepare()
        before = number * len(requests)
        files[step] = write_pictures(
            pipe,
            requests,
            options,
            folder,
            details={**details, "step": step},
            on_progress=lambda done, before=before: on_progress(before + done),  # type: ignore[misc]
            team=team,
            ending=f"-step{step:06d}",
            grid=False,
        )
        adapter.remove()
        pipe.remove_all_hooks()  # or the next adapter would find an offloaded UNet without weights

    def write_grid() -> Path:
        seeds = {request.seed for request in requests}
        rows = []
        for number, request in enumerate(requests):
            label = f"{request.prompt}\nseed {request.seed}" if len(seeds) > 1 else request.prompt
            row = []
            for step in kept:
                with Image.open(files[step][number]) as picture:
                    row.append(fitted(picture, cell))
            rows.append((label, row))
        grid = free_name(folder / GRID_FILE)
        save_png(
            labelled_grid(rows, [f"step {step}" for step in kept], title=f"{token} by step", cell=cell), grid
        )
        return grid

    return [*(file for step in kept for file in files[step]), team.from_main(write_grid)]
