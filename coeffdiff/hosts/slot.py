"""What every attention module that holds alpha carries: its alpha as a child, and a slot with what is known of it."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coeffdiff.errors import AlphaFrozen
from coeffdiff.method.coefficients import Coefficients

CHILD = "coeffdiff"  # the attention module's submodule that holds alpha
SLOT = "_coeffdiff_slot"  # the attention module's attribute with its slot
USED = "_coeffdiff_used"  # and that with whether alpha was used since its forward began; each replica has its own


@dataclass
class Slot(ABC):
    """trains: whether its alpha was attached for training."""

    name: str
    trains: bool = False

    @abstractmethod
    def problem(self, module: Any) -> str:
        """Before a forward: the sentence for a person if alpha would be left out; otherwise empty."""

    @abstractmethod
    def went_round(self, module: Any) -> str:
        """After a forward without alpha: how it can have come to that, and what to do."""


def coefficients_for(module: nn.Module, heads: int) -> Coefficients:
    """An alpha of zeros where the module is, in float64 for one of float64, otherwise in float32."""
    layer = Coefficients(heads)
    layer.to(next((p.device for p in module.parameters()), torch.device("cpu")), alpha_dtype(module))
    layer.train(module.training)
    return layer


def alpha_dtype(module: nn.Module) -> torch.dtype:
    """Whatever the weights are: half precision, quantized, or float8 for storage."""
    wide = any(p.dtype == torch.float64 for p in module.parameters())
    return torch.float64 if wide else torch.float32


def warn_if_frozen(slot: Slot, module: nn.Module) -> None:
    """Warns: AlphaFrozen, in a forward of training whose alpha gets no gradient."""
    layer = module._modules[CHILD]
    assert isinstance(layer, Coefficients)
    if slot.trains and module.training and torch.is_grad_enabled() and not layer.alpha.requires_grad:
        warnings.warn(
            f"alpha of {slot.name} is frozen, so training does not move it: call coeffdiff.attach after "
            "get_peft_model, or set requires_grad on the alphas again.",
            AlphaFrozen,
            stacklevel=3,
        )
