"""The toy's attention layer, and targets for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.toy.settings import ARMS, HEADS, NODES, PLANE, TARGETS
from coeffdiff.method.attention import mixed_attention
from coeffdiff.utils.seeding import generator_for

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A graph, a target, the layer's weights, and what is known before any training.

    weights: v [H, 2, D], o [H, D, 2] and an alpha [H, H] of zeros; starts: q and k [H, 2, D] to begin from.
    makers: arm -> weights with which it makes the target; these arms can reach it.
    """

    setting: str
    target: str
    seed: int
    x: Tensor
    o: Tensor
    weights: Weights
    starts: Sequence[Weights]
    makers: Mapping[str, Weights] = field(default_factory=dict)


def layer(x: Tensor, weights: Weights) -> Tensor:
    """The graph [n, 2] after the layer, [n, 2]."""
    q, k, v = (x @ weights[name] for name in "qkv")  # [H, n, D]
    coeff = torch.eye(HEADS, dtype=x.dtype) + weights["alpha"]
    out = mixed_attention(q[None], k[None], v[None], coeff, scale=1.0, backend="reference")[0]
    return (out @ weights["o"]).sum(0)


def values_instead_of_alpha(weights: Weights) -> Weights:
    """Weights without alpha that do the same, where every head's W_v is full: W_v'^g = sum_h coeff[h, g] W_v^h."""
    coeff = torch.eye(HEADS, dtype=weights["v"].dtype) + weights["alpha"]
    values = torch.einsum("...hg,...hde->...gde", coeff, weights["v"])
    return weights | {"v": values, "alpha": torch.zeros_like(weights["alpha"])}


def make_problem(setting: str, target: str, seed: int, restarts: int = 1) -> Problem:
    """One of the problems that TARGETS describes, random, and decided by its arguments."""
    rng = generator_for("toy", setting, target, seed)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    width = PLANE if setting == "caption" else 1
    turn = uniform(0, 2 * math.pi)
    turned = torch.tensor(
        [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], dtype=torch.float64
    )
    weights = {
        "v": _well_conditioned(normal, width),
        "o": torch.eye(PLANE, dtype=torch.float64).repeat(HEADS, 1, 1) if width > 1 else turned[:, None, :],
        "alpha": torch.zeros(HEADS, HEADS, dtype=torch.float64),
    }
    starts = [_start(setting, target, seed, restart, width) for restart in range(restarts)]
    maps = {"q": normal(HEADS, PLANE, width, spread=1.5), "k": normal(HEADS, PLANE, width, spread=1.5)}
    x = _ring(normal)
    makers: dict[str, Weights] = {}
    if target == "inside":
        makers = dict.fromkeys(ARMS, weights | maps)
    elif target == "outside":
        makers = {
            "alpha": weights | maps | {"alpha": 4 * torch.eye(HEADS, dtype=torch.float64)},
            "qkv": weights | maps | {"v": 5 * weights["v"]},
        }
    elif target == "negative":
        signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        coeff = signs * (1 + torch.rand(HEADS, HEADS, generator=rng, dtype=torch.float64))
        makers = {"alpha": weights | maps | {"alpha": coeff - torch.eye(HEADS, dtype=torch.float64)}}
    elif target == "fold":
        line = normal(PLANE)
        line = line / line.norm()
        x = _positions(normal)[:, None] * line
        # One map that follows the line slowly and one that jumps in its middle; their differences turn around
        slopes = (uniform(0.4, 0.7), uniform(4.0, 6.0))
        coeff = torch.tensor([[-2.4, 1.4], [1.0, -1.6]], dtype=torch.float64) * uniform(0.8, 1.2)
        maps = {"q": _along(line, slopes, width), "k": _along(line, (1.0, 1.0), width)}
        makers = {"alpha": weights | maps | {"alpha": coeff - torch.eye(HEADS, dtype=torch.float64)}}
    elif target == "values":
        makers = {"qkv": weights | maps | {"v": _well_conditioned(normal, width)}}
    elif target == "unread":
        read = weights["v"][1, :, 0] / weights["v"][1, :, 0].norm()
        line = torch.stack([-read[1], read[0]])
        x = _positions(normal)[:, None] * line
        other = _well_conditioned(normal, width)
        if width == 1:  # heads that both see the line
            other = other + 1.5 * line[:, None] * torch.sign(line @ other)[:, None, :]
        maps = {
            "q": _along(line, (uniform(0.8, 1.2), uniform(1.5, 3.0)), width),
            "k": _along(line, (1.0, 1.0), width),
        }
        makers = {"qkv": weights | maps | {"v": other}}
        if width > 1:
            makers["alpha"] = weights | maps | {"alpha": _same_on_line(line, weights["v"], other)}
    elif target != "permutation":
        raise ConfigError(f"The toy experiment has no target {target!r}; it has {', '.join(TARGETS)}.")
    if setting == "caption" and "alpha" in makers and "qkv" not in makers:
        makers["qkv"] = values_instead_of_alpha(makers["alpha"])
    if target == "permutation":
        o = x[torch.randperm(NODES, generator=rng)]
    else:
        o = layer(x, makers.get("qkv") or makers["alpha"])
    return Problem(setting, target, seed, x, o, weights, starts, makers)


def _start(setting: str, target: str, seed: int, restart: int, width: int) -> Weights:
    """W_q and W_k before tuning, from a generator of their own: a problem does not depend on the number of restarts."""
    rng = generator_for("toy", setting, target, seed, "start", restart)
    return {name: torch.randn(HEADS, PLANE, width, generator=rng, dtype=torch.float64) for name in "qk"}


def _well_conditioned(normal: Callable[..., Tensor], width: int) -> Tensor:
    """Values [H, 2, D] of heads that see different things: a rotation and a stretch, or two directions."""
    basis = torch.linalg.qr(normal(PLANE, PLANE)).Q
    if width == 1:
        return (basis + normal(PLANE, PLANE, spread=0.15)).T[:, :, None].contiguous()
    return torch.stack([basis, torch.linalg.qr(normal(PLANE, PLANE)).Q]) + normal(
        HEADS, PLANE, PLANE, spread=0.15
    )


def _ring(normal: Callable[..., Tensor]) -> Tensor:
    """NODES nodes around the origin, [n, 2], no two alike and none of a symmetry."""
    angles = 2 * math.pi * (torch.arange(NODES, dtype=torch.float64) + 0.15 * normal(NODES)) / NODES
    radii = 1 + 0.12 * normal(NODES)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1)


def _positions(normal: Callable[..., Tensor]) -> Tensor:
    """NODES sorted places on a line, [n], between -1.6 and 1.6 or little beyond."""
    return (torch.linspace(-1.5, 1.5, NODES, dtype=torch.float64) + 0.06 * normal(NODES)).sort().values


def _along(line: Tensor, factors: Sequence[float], width: int) -> Tensor:
    """[H, 2, D] that reads the place on the line, times each head's factor, into the first column."""
    read = torch.zeros(HEADS, PLANE, width, dtype=line.dtype)
    for head, factor in enumerate(factors):
        read[head, :, 0] = factor * line
    return read


def _same_on_line(line: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """alpha [H, H] with sum_h coeff[h, g] line W_v^h = line W_v'^g for every g: two equations, two unknowns each."""
    coeff = torch.linalg.solve((line @ values).T, (line @ wanted).T)
    return coeff - torch.eye(HEADS, dtype=line.dtype)
