"""The product with a frozen quantized weight: by hand, under autocast, in float16, and what it keeps for the backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from coeffdiff.hosts.quantized import frozen_product, is_quantized

NUMBERS = torch.tensor([[1, -2, 0], [3, 4, -8]], dtype=torch.int8)
SCALE = torch.tensor([[0.5], [0.25]])  # the weight is [[0.5, -1, 0], [0.75, 1, -2]]
BIAS = torch.tensor([10.0, 20.0])


def test_value_and_gradient_by_hand():
    """x = [2, 1, 1]: [1 - 1 + 0, 1.5 + 1 - 2] + bias; of y0 + 2 y1 the gradient is row 0 + 2 row 1."""
    x = torch.tensor([[2.0, 1.0, 1.0]], requires_grad=True)
    y = frozen_product(x, NUMBERS, SCALE, BIAS)
    assert y.tolist() == [[10.0, 20.5]]
    (y * torch.tensor([1.0, 2.0])).sum().backward()
    assert x.grad.tolist() == [[2.0, 1.0, -4.0]]


def test_fp8_numbers_and_any_shape_in_front():
    x = torch.ones(2, 1, 3, requires_grad=True)
    y = frozen_product(x, NUMBERS.to(torch.float8_e4m3fn), SCALE, None)
    assert y.flatten().tolist() == [-0.5, -0.25, -0.5, -0.25]


def test_the_backward_keeps_no_wide_weight():
    """torchao's own product does: for all of SDXL that would be the weights again, in the type that is computed in."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_product(torch.ones(1, 3, requires_grad=True), NUMBERS, SCALE, BIAS)
    assert [t.dtype for t in kept if t.numel() == NUMBERS.numel()] == [torch.int8]
    assert sum(t.numel() for t in kept) == NUMBERS.numel() + SCALE.numel()


def test_float16_does_not_overflow():
    """127 x 512 times 10 would be 650,240 before the scale, and float16 ends at 65,504."""
    x = torch.full((1, 512), 10.0, dtype=torch.float16)
    y = frozen_product(x, torch.full((1, 512), 127, dtype=torch.int8), torch.tensor([[1e-3]]), None)
    assert y.item() == pytest.approx(650.24, rel=2e-3)


def test_plain_layers_are_not_taken_for_quantized_ones():
    class Packed(nn.Module):
        weight = torch.zeros(3, dtype=torch.uint8)

    assert is_quantized(Packed())
    assert not is_quantized(nn.Linear(2, 2)) and not is_quantized(nn.Linear(2, 2).bfloat16())
    assert not is_quantized(nn.SiLU())
