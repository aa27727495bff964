"""alpha of one attention layer, and how it becomes a recombination of heads: form, dropout, scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coeffdiff.utils.seeding import generator_for
from coeffdiff.utils.torch_setup import copied

Form = Literal["residual", "identity", "random"]
Mixes = Literal["maps", "values"]


class Coefficients(nn.Module):
    """The trained [H, H] matrix of one layer. Row = head that receives, column = map that is used.

    What mixes "values" is the control that Coeff-Tuning is compared with (see mixed_values): the same numbers
    recombine the heads' values before ordinary attention, and a column is the head whose values are used.

    With m the dropout mask (all ones unless drawn) and s the scale, the recombination is
        residual    I + s * (m * alpha)         alpha starts at zero
        identity    I + s * (m * alpha - I)     alpha starts at I, without residual
        random      I + s * (m * alpha - I)     alpha starts as noise of standard deviation 1 / sqrt(H)
    so that s = 1 is what was trained and s = 0 is ordinary attention in every form. Two kinds of dropout fill m:
    draw_dropout once a step, from a seed, and `dropout`, a probability, at every forward in train() mode, from torch's
    own generator. The paper trains the residual form and ablates the others; it names no spread for the random one, so
    1 / sqrt(H) is ours.

    Source: Miao, Chen and Qiu 2025, arXiv 2503.18337, section 4.
    """

    alpha: Tensor
    mask: Tensor
    scale: Tensor
    identity: Tensor

    def __init__(
        self,
        heads: int,
        form: Form = "residual",
        generator: torch.Generator | None = None,
        mixes: Mixes = "maps",
    ) -> None:
        super().__init__()
        self.heads, self.form, self.mixes = heads, form, mixes
        self.dropout = 0.0
        starts = {
            "residual": lambda: torch.zeros(heads, heads),
            "identity": lambda: torch.eye(heads),
            "random": lambda: torch.randn(heads, heads, generator=generator) / heads**0.5,
        }
        self.alpha = nn.Parameter(starts[form]())
        self.register_buffer("mask", torch.ones(heads, heads), persistent=False)
        # A tensor, not a number: a compiled model would be compiled again for every new number.
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("identity", torch.eye(heads), persistent=False)

    def deviation(self) -> Tensor:
        """What this adapter adds to the identity, [H, H]; several adapters on a layer add up."""
        kept = self.mask * self.alpha
        if self.dropout and self.training:
            kept = F.dropout(kept, self.dropout)
        return self.scale * (kept if self.form == "residual" else kept - self.identity)

    def forward(self) -> Tensor:
        """deviation(). Hooks run on a call alone, and under sequential offloading one of them brings alpha."""
        return self.deviation()

    @torch.no_grad()
    def displacement(self) -> Tensor:
        """How far each entry is from ordinary attention at scale 1, [H, H]: |alpha| in the residual form."""
        return (self.alpha if self.form == "residual" else self.alpha - self.identity).abs()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # unet.half() and pipe.to(torch.bfloat16) move alpha but never narrow it: 1 + 0.0039 is 1 in bfloat16.
        def at_least_float32(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            narrowed = changed.is_floating_point() and changed.element_size() < 4
            return tensor.to(changed.device) if narrowed else changed

        return super()._apply(at_least_float32, recurse)


def deviation_of(alpha: Tensor, form: Form) -> Tensor:
    """What an alpha out of a file adds to the identity at scale 1, [H, H]."""
    return alpha if form == "residual" else alpha - torch.eye(len(alpha), dtype=alpha.dtype)


def draw_dropout(layers: Mapping[str, Coefficients], p: float, *, seed: int, step: int) -> None:
    """Fill every mask with 0 (probability p) or 1 / (1 - p), drawn from (seed, step, layer name) alone.

    Called once per optimizer step, so that all processes, micro-batches and recomputed activations of a step
    share the mask. One copy to the device for all layers together.
    """
    drawn = [
        (torch.rand(c.heads, c.heads, generator=generator_for("dropout", seed, step, name)) >= p) / (1 - p)
        for name, c in layers.items()
    ]
    _fill_masks(layers, drawn)


def clear_dropout(layers: Mapping[str, Coefficients]) -> None:
    """All masks back to ones, for pictures and for the end of training."""
    for coefficients in layers.values():
        coefficients.mask.fill_(1)


def _fill_masks(layers: Mapping[str, Coefficients], masks: list[Tensor]) -> None:
    if not layers:
        return
    targets = [c.mask for c in layers.values()]
    flat = copied(torch.cat([mask.flatten() for mask in masks]), targets[0].device)
    parts = flat.split([mask.numel() for mask in masks])
    for target, part in zip(targets, parts, strict=True):
        target.copy_(part.view_as(target))
