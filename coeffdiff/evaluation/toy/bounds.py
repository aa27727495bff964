"""Lower bounds of an arm's error, whatever its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coeffdiff.evaluation.toy.problem import Problem, Weights
from coeffdiff.evaluation.toy.settings import HEADS, PLANE


def error_of(out: Tensor, o: Tensor) -> Tensor:
    """Root mean square distance of nodes [..., n, 2] to the target's, in units of the target's own size."""
    size = (o - o.mean(0)).square().sum(-1).mean().sqrt()
    return (out - o).square().sum(-1).mean(-1).sqrt() / size


def lower_bounds(problem: Problem) -> dict[str, float]:
    """The error that no weights of an arm can get below; 0 where nothing is known."""
    x, o, weights = problem.x, problem.o, problem.weights
    polygon = reachable_polygon(x, weights)
    nearest = torch.stack([_nearest_in_polygon(node, polygon) for node in o])
    bounds = {"qk": float(error_of(nearest, o)), "qkv": 0.0, "alpha": 0.0}
    if problem.setting == "caption":
        return bounds
    # Orthonormal rows: head h writes coordinate h, and errors of coordinates add up
    basis = weights["o"][:, 0]
    coordinates = o @ basis.T
    along = place_on_line(x)
    if along is not None:
        order = along.argsort()
        fitted = torch.stack([_nearest_monotone(coordinates[order, h]) for h in range(HEADS)], 1)
        bounds["qkv"] = float(error_of(fitted @ basis, o[order]))
    fitted = coordinates.clone()
    for head in range(HEADS):
        read = (x @ weights["v"][head]).squeeze(-1)
        if float(read.abs().max()) < 1e-12:
            fitted[:, head] = 0.0
        elif float((read - read.mean()).abs().max()) < 1e-12:
            fitted[:, head] = coordinates[:, head].mean()
    bounds["alpha"] = float(error_of(fitted @ basis, o))
    bounds["qk"] = max(bounds.values())  # either of the others can do all that W_q and W_k alone can
    return bounds


def reachable_polygon(x: Tensor, weights: Weights) -> Tensor:
    """Corners [m, 2], counter-clockwise, of the sum of the hulls of the heads' projected values: all that ordinary
    attention can give a node, whatever W_q and W_k."""
    sums = torch.zeros(1, PLANE, dtype=x.dtype)
    for head in range(HEADS):
        points = x @ weights["v"][head] @ weights["o"][head]
        sums = _hull((sums[:, None] + points[None]).reshape(-1, PLANE))
    return sums


def _hull(points: Tensor) -> Tensor:
    """Corners of the convex hull, counter-clockwise (Andrew's monotone chain)."""
    ordered = sorted({(float(a), float(b)) for a, b in points})

    def chain(sequence: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        kept: list[tuple[float, float]] = []
        for p in sequence:
            while len(kept) > 1:
                (ax, ay), (bx, by) = kept[-2], kept[-1]
                if (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax) > 0:
                    break
                kept.pop()
            kept.append(p)
        return kept[:-1]

    corners = chain(ordered) + chain(ordered[::-1]) if len(ordered) > 1 else ordered
    return torch.tensor(corners, dtype=points.dtype)


def _nearest_in_polygon(point: Tensor, corners: Tensor) -> Tensor:
    """The nearest point of a convex polygon (counter-clockwise; a segment or one point are polygons too)."""
    begin, end = corners, corners.roll(-1, 0)
    sides, to = end - begin, point - begin
    outside = sides[:, 0] * to[:, 1] - sides[:, 1] * to[:, 0] < 0
    if len(corners) > 2 and not outside.any():
        return point
    part = ((to * sides).sum(1) / sides.square().sum(1).clamp(min=1e-300)).clamp(0, 1)
    candidates = begin + part[:, None] * sides
    return candidates[(candidates - point).square().sum(1).argmin()]


def place_on_line(x: Tensor) -> Tensor | None:
    """Each node's place [n] on the line through the origin that holds them all, or None if none does.

    Through the origin: then scores are b s_i s_j, and a head's output, the mean of s under weights exp(b s_i s_j),
    rises with b s_i everywhere, as its derivative is a variance.
    """
    _, sizes, directions = torch.linalg.svd(x)
    return x @ directions[0] if float(sizes[1] / sizes[0]) < 1e-12 else None


def _nearest_monotone(values: Tensor) -> Tensor:
    """The nearest rising or falling sequence to values [n], by pooling adjacent violators."""

    def rising(sequence: Sequence[float]) -> list[float]:
        blocks: list[tuple[float, int]] = []
        for value in sequence:
            blocks.append((value, 1))
            while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
                (b, m), (a, n) = blocks.pop(), blocks.pop()
                blocks.append(((a * n + b * m) / (n + m), n + m))
        return [mean for mean, count in blocks for _ in range(count)]

    up = torch.tensor(rising(values.tolist()), dtype=values.dtype)
    down = -torch.tensor(rising((-values).tolist()), dtype=values.dtype)
    return min((up, down), key=lambda fitted: float((fitted - values).square().sum()))
