"""Options that reduce the memory of a training run."""

from __future__ import annotations

from coeffdiff.config.schema import Settings
from coeffdiff.sampling.memory_options import half_precision_name
from coeffdiff.utils.oom import smaller_side


def training_switches(settings: Settings, device_type: str, *, resumed: bool = False) -> list[str]:
    """What makes a training run smaller and is not already so; settings are resolved. The mildest first.

    A smaller micro-batch that is accumulated, recomputed activations and chunked attention cost time alone;
    precision costs a little, resolution and rank what the adapter can learn.
    """
    training, method = settings.training, settings.method
    batch_size, accumulate, resolution = (
        int(training.batch_size),
        int(training.accumulate),
        int(training.resolution),
    )
    found = []
    if not training.gradient_checkpointing:
        found.append("--set training.gradient_checkpointing=true")
    if batch_size > 1:
        found.append(
            f"--set training.batch_size=1 --set training.accumulate={batch_size * accumulate} (the same result)"
        )
    if "coeff" in method.kind and method.coeff.backend != "auto":
        found.append("--set method.coeff.backend=auto")
    if training.precision == "no":
        found.append(f"--set training.precision={half_precision_name(device_type)}")
    if (smaller := smaller_side(resolution)) < resolution:
        found.append(f"--resolution {smaller}")
    if "lora" in method.kind and method.lora.rank > 4:
        found.append("--set method.lora.rank=4")
    if found and resumed:
        found[-1] += " (these begin a new run: a resumed one keeps its settings)"
    return found
