"""Coeff-Tuning for SDXL: teach the model a subject by recombining its attention maps across heads.

    adapter = coeffdiff.load_adapter(pipe, "runs/ohwx", scale=1.0)
    alphas = coeffdiff.attach(model)  # any model with attention

Public names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.hosts.any_model.attach import attach, attach_from, detach, save
    from coeffdiff.hosts.applied_adapter import Adapter
    from coeffdiff.hosts.diffusers import load_adapter
    from coeffdiff.method.attention import mixed_attention
    from coeffdiff.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "Adapter", "CoeffDiffError", "__version__", "attach", "attach_from", "detach", "load_adapter", "mixed_attention",
    "save", "train",
]  # fmt: skip

_PLACES = {
    "Adapter": "coeffdiff.hosts.applied_adapter",
    "CoeffDiffError": "coeffdiff.errors",
    "attach": "coeffdiff.hosts.any_model.attach",
    "attach_from": "coeffdiff.hosts.any_model.attach",
    "detach": "coeffdiff.hosts.any_model.attach",
    "load_adapter": "coeffdiff.hosts.diffusers",
    "mixed_attention": "coeffdiff.method.attention",
    "save": "coeffdiff.hosts.any_model.attach",
    "train": "coeffdiff.training.loop",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
