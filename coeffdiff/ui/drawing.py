"""Pictures with an adapter, as `coeffdiff sample` makes them; and which adapters there are to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from coeffdiff.ui.run_state import find_runs


@dataclass(frozen=True)
class Wanted:
    """adapter: run or adapter folder, RUN@STEP, or user/repo. prompts: one a line.

    scale: of the adapter; compared: scales that everything is drawn at in its place, where there are any.
    width, height: pixels; 0: the model's own.
    """

    adapter: str
    prompts: str
    scale: float
    compared: Sequence[float] = ()
    count: int = 1
    seed: int = 0
    steps: int = 30
    guidance: float = 5.0
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    scheduler: str = ""
    precision: Precision = "auto"
    offload: Offload = "none"


def draw_wanted(wanted: Wanted) -> Drawn:
    """Raises: ConfigError for no prompt or no adapter; and what draw raises."""
    prompts = [line.strip() for line in wanted.prompts.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("There is nothing to draw: write a prompt, such as: a photo of <V> in the snow.")
    for prompt in prompts:
        refuse_options(prompt, f"The prompt {prompt!r}")
    if not wanted.adapter:
        raise ConfigError("Choose an adapter; there is one as soon as a training has finished.")
    folder = resolve_adapter(wanted.adapter)
    # A browser's 5.0 is 5, and a recipe would say so
    if wanted.compared:
        selection = Selection(((folder, None),), tuple(sorted(map(float, wanted.compared))))
    else:
        selection = Selection(((folder, float(wanted.scale)),))
    return draw(
        prompts,
        selection,
        Options(
            wanted.steps,
            float(wanted.guidance),
            wanted.negative_prompt,
            wanted.width or None,
            wanted.height or None,
        ),
        seeds=range(wanted.seed, wanted.seed + wanted.count),
        asked=Asked(),
        scheduler=wanted.scheduler or None,
        precision=wanted.precision,
        offload=wanted.offload,
        estimate=expected_seconds,
    )


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
