"""Options that reduce the memory of a training run, as its out-of-memory error names them."""

from __future__ import annotations

from coeffdiff.config.schema import Settings
from coeffdiff.preflight.memory_options import memory_options
from coeffdiff.training.resuming import may_change


def training_switches(settings: Settings, device_type: str, *, resumed: bool = False) -> list[str]:
    """The options that the run does not use yet, the mildest first; settings are resolved."""
    options = memory_options(
        settings.training,
        settings.method,
        settings.validation.prompts,
        device_type,
        quantize=settings.model.quantize,
    )
    suggested = [option for option in options if option.suggested]
    return [
        option.named("--set ") + (" (begins a new run)" if resumed and not may_change(option.values) else "")
        for option in suggested
    ]
