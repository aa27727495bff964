"""Maths of painting and shading: linear light, blends and smooth steps."""

from __future__ import annotations

from torch import Tensor


def linear(value: float) -> float:
    """sRGB component in 0..1 -> linear light."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def mix(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """a at weight 0, b at weight 1."""
    return a + (b - a) * weight


def ramp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """0 below low, 1 above high, smooth between."""
    t = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)
