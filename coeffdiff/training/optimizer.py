"""AdamW, and AdamW with moments in 8 bits where bitsandbytes runs."""

from __future__ import annotations

from typing import Any

import torch

from coeffdiff.errors import ConfigError
from coeffdiff.utils.text import first_line

_INSTEAD = "Use training.optimizer=adamw: adapters are small, and its moments with them"


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that training.optimizer names, over AdamW's parameter groups."""
    if name == "adamw":
        return torch.optim.AdamW(groups)
    import bitsandbytes

    # Tensors below 4,096 numbers keep float32 moments: every alpha, and LoRA's smallest matrices
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups)
    return optimizer


def check_optimizer(name: str, device: torch.device) -> None:
    """Raises: ConfigError if the optimizer is not installed or cannot take a step on this device."""
    if name == "adamw":
        return
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(
            f"training.optimizer {name} needs bitsandbytes: pip install 'coeffdiff[bnb]'. {_INSTEAD}."
        ) from None
    # What it imports says little: without a library for this device it fails at the first step
    trial = torch.nn.Parameter(torch.ones(4096, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        make_optimizer(name, [{"params": [trial], "lr": 0.5}]).step()
        moved = bool((trial < 1).all())
    except Exception as error:  # a missing library, kernel or operator: each raises its own kind
        raise ConfigError(
            f"bitsandbytes {bitsandbytes.__version__} cannot take a step on {device.type}: {first_line(error)}. "
            f"{_INSTEAD}."
        ) from None
    if not moved:
        raise ConfigError(
            f"bitsandbytes {bitsandbytes.__version__} takes a step on {device.type} that changes nothing. {_INSTEAD}."
        )
