"""Options that reduce the memory of a training run, as its out-of-memory error names them."""

from __future__ import annotations

from coeffdiff.config.schema import Settings
from coeffdiff.preflight.memory_options import memory_options


def training_switches(settings: Settings, device_type: str, *, resumed: bool = False) -> list[str]:
    """The options that the run does not use yet, the mildest first; settings are resolved."""
    options = memory_options(
        settings.training,
        settings.method,
        settings.validation.prompts,
        device_type,
        quantize=settings.model.quantize,
    )
    switches = [option.named("--set ") for option in options if option.suggested]
    if switches and resumed:
        switches[-1] += " (these begin a new run: a resumed one keeps its settings)"
    return switches
