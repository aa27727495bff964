"""Validation pictures: made by the code of `sample`, with the adapter as it is at that step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from coeffdiff.config.schema import Settings
from coeffdiff.errors import CoeffDiffError
from coeffdiff.method.families import family_of_unet
from coeffdiff.models.pipelines import make_pipeline
from coeffdiff.sampling.options import Options, Request
from coeffdiff.sampling.output import write_pictures
from coeffdiff.training.resolve import free_memory
from coeffdiff.utils.console import print_info
from coeffdiff.utils.oom import is_out_of_memory, oom_sentence


def write_previews(
    folder: Path,
    settings: Settings,
    previews: dict[str, Any],
    parts: dict[str, Any],
    details: dict[str, Any],
    state: PartialState,
    on_progress: Callable[[float], None],
) -> list[Path]:
    """Validation pictures with the adapter as it is now, and their grid; the network is left as it was found.

    Pictures that cannot be made are said and no reason to end a run.
    """
    unet, vae = parts["unet"], parts["vae"]
    validation, side = settings.validation, int(settings.training.resolution)
    pipe = make_pipeline(family_of_unet(unet.config), parts)
    requests = [Request(prompt, seed) for prompt in previews for seed in validation.seeds]
    vae.to(state.device)
    unet.eval()
    try:
        with _without_autocast(unet):
            options = Options(steps=validation.steps, guidance=validation.guidance, width=side, height=side)
            return write_pictures(
                pipe,
                requests,
                options,
                folder,
                encoded=previews,
                details=details,
                overwrite=True,
                on_progress=on_progress,
            )
    except (CoeffDiffError, MemoryError, RuntimeError) as error:
        if not isinstance(error, CoeffDiffError) and not is_out_of_memory(error):
            raise
        reason = str(error) if isinstance(error, CoeffDiffError) else oom_sentence(error, [])
        print_info(f"hint     there are no validation pictures in {folder}: {reason}")
        return []
    finally:
        unet.train()
        vae.to("cpu")
        free_memory(state)


@contextmanager
def _without_autocast(unet: nn.Module) -> Iterator[None]:
    """Accelerate replaces the forward of what it prepares by one under autocast; pictures are made without it."""
    wrapped = unet.__dict__.get("forward")
    if wrapped is None:
        yield
        return
    unet.__dict__["forward"] = unet.__dict__["_original_forward"]
    try:
        yield
    finally:
        unet.__dict__["forward"] = wrapped
