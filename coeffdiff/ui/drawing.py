"""Pictures with an adapter, as `coeffdiff sample` makes them; and which adapters there are to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from coeffdiff.errors import ConfigError
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.method.adapter_paths import COEFF_FILE, kept_steps
from coeffdiff.models.opening import Asked
from coeffdiff.preflight.sampling_time import expected_seconds
from coeffdiff.sampling.drawing import Drawn, draw
from coeffdiff.sampling.memory_options import Offload, Precision
from coeffdiff.sampling.options import Options
from coeffdiff.sampling.prompt_file import refuse_options
from coeffdiff.sampling.selection import Selection
from coeffdiff.ui.model_memory import memory_given_back
from coeffdiff.ui.run_state import find_runs

_N = TypeVar("_N", int, float)


@dataclass(frozen=True)
class Wanted:
    """adapter: run or adapter folder, RUN@STEP, or user/repo. prompts: one a line.

    scale: of the adapter; compared: scales that everything is drawn at in its place, where there are any.
    width, height: pixels; 0: the model's own. None: a field that was emptied, or never opened.
    """

    adapter: str | None
    prompts: str | None
    scale: float | None
    compared: Sequence[float] = ()
    count: int | None = 1
    seed: int | None = 0
    steps: int | None = 30
    guidance: float | None = 5.0
    negative_prompt: str | None = ""
    width: int | None = 0
    height: int | None = 0
    scheduler: str | None = ""
    precision: Precision | None = "auto"
    offload: Offload | None = "none"


def draw_wanted(wanted: Wanted) -> Drawn:
    """Raises: ConfigError for no prompt or no adapter; and what draw raises."""
    prompts = [line.strip() for line in (wanted.prompts or "").splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("There is nothing to draw: write a prompt, such as: a photo of <V> in the snow.")
    for prompt in prompts:
        refuse_options(prompt, f"The prompt {prompt!r}")
    if not wanted.adapter:
        raise ConfigError("Choose an adapter; there is one as soon as a training has finished.")
    count, first = _number(wanted.count, "Pictures a prompt"), _number(wanted.seed, "First seed")
    options = Options(
        _number(wanted.steps, "Steps"),
        float(_number(wanted.guidance, "Guidance")),
        wanted.negative_prompt or "",
        wanted.width or None,
        wanted.height or None,
    )
    scale = 1.0 if wanted.compared else float(_number(wanted.scale, "Scale"))
    folder = resolve_adapter(wanted.adapter)
    # A browser's 5.0 is 5, and a recipe would say so
    if wanted.compared:
        selection = Selection(((folder, None),), tuple(sorted(map(float, wanted.compared))))
    else:
        selection = Selection(((folder, scale),))
    with memory_given_back():
        return draw(
            prompts,
            selection,
            options,
            seeds=range(first, first + count),
            asked=Asked(),
            scheduler=wanted.scheduler or None,
            precision=wanted.precision or "auto",
            offload=wanted.offload or "none",
            estimate=expected_seconds,
        )


def _number(value: _N | None, field: str) -> _N:
    """Raises: ConfigError for a field that was emptied."""
    if value is None:
        raise ConfigError(f"{field} is empty; write a number.")
    return value


def find_adapters() -> dict[str, str]:
    """Names and paths of the adapters of all runs, the newest run first; steps that a run keeps after its result."""
    found = {}
    for run in find_runs():
        kept = kept_steps(run)
        result = run / "adapter"
        if (result / COEFF_FILE).is_file():
            found[run.name] = str(run)
        for step in sorted((step for step, folder in kept.items() if folder != result), reverse=True):
            found[f"{run.name}, step {step}"] = f"{run}@{step}"
    return found
