"""Coeff-Tuning for SDXL: teach the model a subject by recombining its attention maps across heads.

    adapter = coeffdiff.load_adapter(pipe, "runs/sks", scale=1.0)

Public names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_adapter": "coeffdiff.hosts.diffusers",
    "Adapter": "coeffdiff.hosts.diffusers",
    "mixed_attention": "coeffdiff.method.attention",
    "CoeffDiffError": "coeffdiff.errors",
}

__all__ = ["Adapter", "CoeffDiffError", "__version__", "load_adapter", "mixed_attention"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
