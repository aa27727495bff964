"""Linear layers whose weights are quantized: how they multiply under an adapter, and which layers are such ones.

torchao and bitsandbytes quantize, and hold the numbers. What they leave open is a product that passes gradients on
under autocast without keeping a wide copy of every weight for the backward: torchao's keeps one, and returns another
type than its neighbours under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is other numbers than it computes with: packed, or a tensor of torchao's."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    packed = not weight.is_floating_point() and not weight.is_complex()
    return packed or type(weight.data) is not Tensor or type(weight).__name__ == "Params4bit"


def quantized_layers(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear) and is_quantized(module)]


class EightBitLinear(nn.Linear):
    """A linear layer over a torchao weight with one scale for each row: qdata [N, K] in int8 or fp8, scale [N, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        x = as_autocast(x)
        with torch.autocast(x.device.type, enabled=False):
            return frozen_product(x, weight.qdata, weight.scale, self.bias)


def as_autocast(x: Tensor) -> Tensor:
    """x in the type that a linear layer computes in here."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def frozen_product(x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (numbers * scale)^T + bias in x's type, where only x learns; the backward widens the numbers again.

    x: [..., K].  numbers: [N, K], int8 or fp8.  scale: [N, 1] float32.  bias: [N].  Returns: [..., N].
    """
    product: Tensor = _FrozenProduct.apply(x, numbers, scale, bias)
    return product


def widened(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in dtype; multiplied in float32 and rounded once."""
    # The product with unscaled numbers would be cheaper, and overflows float16
    return numbers.to(dtype).mul_(scale)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        return F.linear(x, widened(numbers, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        numbers, scale = ctx.saved_tensors
        return grads[0] @ widened(numbers, scale, grads[0].dtype), None, None, None
