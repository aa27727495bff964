"""Stand-ins for quantized linear layers: as many bytes and the same products, without torchao or bitsandbytes.

They run on the meta device, where those packages do not, and answer for packages that are not installed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coeffdiff.hosts.quantized import frozen_product
from coeffdiff.method.number_formats import Quantized

_BLOCK = 64  # numbers that share a scale in nf4 (bitsandbytes' default)


class NarrowLinear(nn.Linear):
    """A frozen linear layer [N, K]: in 8 bits with a float32 for each row, or in 4 with one for every 64 numbers."""

    def __init__(self, wide: nn.Linear, kind: Quantized) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = wide.in_features, wide.out_features
        self.computes_in = wide.weight.dtype
        device, rows, columns = wide.weight.device, wide.out_features, wide.in_features
        four = kind == "nf4"
        # PEFT would make its matrices fp8 beside weights in fp8, whatever they are made in afterwards
        numbers = torch.empty(rows, -(-columns // 2) if four else columns, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        scales = (-(-rows * columns // _BLOCK), 1) if four else (rows, 1)
        self.register_buffer("scale", torch.empty(scales, dtype=torch.float32, device=device))
        self.bias = wide.bias

    def forward(self, x: Tensor) -> Tensor:
        x, scale = x.to(self.computes_in), self.get_buffer("scale")
        if self.weight.shape[1] == self.in_features:
            return frozen_product(x, self.weight, scale, self.bias)
        product: Tensor = _FourBitProduct.apply(x, self.weight, self.bias)
        return product


class _FourBitProduct(torch.autograd.Function):
    """As bitsandbytes does it: the weight is made wide for each product, and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(numbers)
        return F.linear(x, _wide(numbers, x.dtype, x.shape[-1]), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (numbers,) = ctx.saved_tensors
        return grads[0] @ _wide(numbers, grads[0].dtype, 2 * numbers.shape[1]), None, None


def _wide(numbers: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    return numbers.to(dtype).repeat(1, 2)[:, :columns]


def narrow_layers(network: nn.Module, kind: Quantized | None) -> None:
    """Put stand-ins in place of a network's linear layers; None leaves them."""
    if kind is None:
        return
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, NarrowLinear(child, kind))
