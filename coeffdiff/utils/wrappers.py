"""Modules inside of wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(module: nn.Module) -> Any:
    """The module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner
