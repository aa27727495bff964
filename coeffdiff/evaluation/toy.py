"""The paper's toy experiment: one attention layer, three ways to tune it, targets that some of them cannot reach.

A graph is n nodes in the plane, X [n, 2]. A layer of H = 2 heads carries it to

    sum_h (sum_g coeff[h, g] F^g) X W_v^h W_o^h,      F^g = softmax(X W_q^g W_k^g^T X^T)

and is tuned towards a target O [n, 2] in one of three ways: W_q and W_k; these and W_v; these and alpha. W_o stays.
Two settings: in the caption's own formula every head has a full 2 x 2 W_v and W_o^h = I. Then
sum_h (sum_g c[h, g] F^g) X W_v^h = sum_g F^g X (sum_h c[h, g] W_v^h), so tuning W_v can do whatever alpha can: see
`values_instead_of_alpha`. With real heads, of width 1 and with an orthogonal W_o, neither contains the other, and both
have four numbers.

What cannot be reached is proved, not concluded from a failure (`lower_bounds`):

    W_q, W_k          a node's output lies in the sum of the hulls of the heads' projected values (Proposition 4.2);
                      and what either of the others cannot reach, these alone cannot
    W_q, W_k, W_v     real heads, nodes on a line: head h alone writes coordinate h, and it is monotone along the line
    W_q, W_k, alpha   real heads: where a head reads the same value from every node, its coordinate is the same for all

Where a target was made by an instance of an arm, the arm can reach it, and not to get there is a failure of the
optimisation. The rest is undecided and said to be.

Source: figure 3 of Miao, Chen and Qiu 2025, arXiv 2503.18337; sizes, targets and rates are ours, the paper names none.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from coeffdiff import __version__
from coeffdiff.console import Bar
from coeffdiff.errors import ConfigError
from coeffdiff.files import appearing, refuse_unwritable
from coeffdiff.method.attention import mixed_attention
from coeffdiff.seeding import generator_for

HEADS, PLANE, NODES = 2, 2, 9
SETTINGS = {
    "caption": "the caption's formula: a full W_v per head, which contains alpha",
    "real heads": "heads of width 1, output projection fixed: neither contains the other",
}
ARMS = {"qk": "W_q, W_k", "qkv": "W_q, W_k, W_v", "alpha": "W_q, W_k, alpha"}
TRAINED = {"qk": ("q", "k"), "qkv": ("q", "k", "v"), "alpha": ("q", "k", "alpha")}
TARGETS = {
    "inside": "made by other W_q and W_k",
    "outside": "the same kind, five times as large",
    "negative": "made by an alpha with negative weights",
    "fold": "nodes on a line, folded by an alpha",
    "values": "made by another W_v",
    "unread": "nodes on a line across what a head reads, made by another W_v",
    "permutation": "every node where another one was",
}
REACHED = 0.02  # an error below this is an arrival: 2 % of the target's size
RATES = (0.003, 0.01, 0.03, 0.1)
POLISHING = 100  # Levenberg-Marquardt steps after Adam's

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A graph, a target, the layer's weights, and what is known of it before anybody tries.

    weights: v [H, 2, D], o [H, D, 2] and an alpha [H, H] of zeros; starts: q and k [H, 2, D] to begin from.
    makers: arm -> weights of an instance of it that makes the target; these arms can reach it.
    """

    setting: str
    target: str
    seed: int
    x: Tensor
    o: Tensor
    weights: Weights
    starts: Sequence[Weights]
    makers: Mapping[str, Weights] = field(default_factory=dict)


@dataclass(frozen=True)
class Toy:
    """What toy() leaves: its files, its results as plain data, and how long it took in seconds."""

    folder: Path
    picture: Path
    numbers: Path
    results: dict[str, Any]
    seconds: float


def toy(
    folder: Path,
    *,
    seeds: int = 5,
    steps: int = 1000,
    restarts: int = 3,
    rates: Sequence[float] = RATES,
    polishing: int = POLISHING,
    on_progress: Bar = lambda done, status="": None,
) -> Toy:
    """Tune every arm towards every target from the same starts at the same rates; write toy.json and toy.png.

    Raises: ConfigError before anything is computed for numbers that cannot be, or if the folder is not free.
    """
    begun = time.monotonic()
    for name, value in (("seeds", seeds), ("steps", steps), ("restarts", restarts), ("rates", len(rates))):
        if value < 1:
            raise ConfigError(f"The toy experiment needs at least 1 of {name}, not {value}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; name another --output. Nothing was changed.")
    refuse_unwritable(folder)
    problems = [
        make_problem(setting, target, seed, restarts)
        for setting, target, seed in itertools.product(SETTINGS, TARGETS, range(seeds))
    ]
    trials: dict[tuple[str, str], Trial] = {}
    for done, (setting, arm) in enumerate(itertools.product(SETTINGS, ARMS)):

        def told(part: float, done: int = done, what: str = f"{setting}: {ARMS[arm]}") -> None:
            on_progress(done + part, what)

        mine = [problem for problem in problems if problem.setting == setting]
        trials[setting, arm] = tune(
            mine, arm, steps=steps, rates=rates, polishing=polishing, on_progress=told
        )
    results = judge(problems, trials, rates) | {
        "device": f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}",
        "versions": {"coeffdiff": __version__, "torch": str(torch.__version__)},
        "seeds": seeds,
        "steps": steps,
        "restarts": restarts,
        "rates": list(rates),
        "polishing": polishing,
    }
    results["seconds"] = round(time.monotonic() - begun, 1)
    try:
        with appearing(folder) as unfinished:
            unfinished.mkdir()
            (unfinished / "toy.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            draw(problems, trials, results, unfinished / "toy.png")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}.") from None
    return Toy(folder, folder / "toy.png", folder / "toy.json", results, time.monotonic() - begun)


# --- the layer and its problems --------------------------------------------------------------------------------


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
    """One of the problems that TARGETS describes. Everything comes from its arguments by lot."""
    lot = generator_for("toy", setting, target, seed)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*shape, generator=lot, dtype=torch.float64)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=lot))

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
        coeff = signs * (1 + torch.rand(HEADS, HEADS, generator=lot, dtype=torch.float64))
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
        o = x[torch.randperm(NODES, generator=lot)]
    else:
        o = layer(x, makers.get("qkv") or makers["alpha"])
    return Problem(setting, target, seed, x, o, weights, starts, makers)


def _start(setting: str, target: str, seed: int, restart: int, width: int) -> Weights:
    """W_q and W_k before tuning: lots of their own, so that a problem does not depend on how often it is tried."""
    lot = generator_for("toy", setting, target, seed, "start", restart)
    return {name: torch.randn(HEADS, PLANE, width, generator=lot, dtype=torch.float64) for name in "qk"}


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


# --- what cannot be reached ------------------------------------------------------------------------------------


def error_of(out: Tensor, o: Tensor) -> Tensor:
    """Root mean square distance of nodes [..., n, 2] to the target's, in units of the target's own size."""
    size = (o - o.mean(0)).square().sum(-1).mean().sqrt()
    return (out - o).square().sum(-1).mean(-1).sqrt() / size


def lower_bounds(problem: Problem) -> dict[str, float]:
    """What error each arm cannot get below, whatever its weights; 0 where nothing is known."""
    x, o, weights = problem.x, problem.o, problem.weights
    polygon = reachable_polygon(x, weights)
    nearest = torch.stack([_nearest_in_polygon(node, polygon) for node in o])
    bounds = {"qk": float(error_of(nearest, o)), "qkv": 0.0, "alpha": 0.0}
    if problem.setting == "caption":
        return bounds
    basis = weights["o"][
        :, 0
    ]  # rows orthonormal: head h writes coordinate h, and errors of coordinates add up
    coordinates = o @ basis.T
    along = _place_on_line(x)
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


def _place_on_line(x: Tensor) -> Tensor | None:
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


# --- tuning ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """How an arm did in a setting, by problem, rate and restart; P problems, L rates, R restarts.

    after_adam: errors [P, L, R]; rates: which rate was chosen for each problem, an index; weights: at that rate,
    polished, [P, R, ...]; errors: [P, R] of these.
    """

    after_adam: Tensor
    rates: list[int]
    weights: Weights
    errors: Tensor


def tune(
    problems: Sequence[Problem],
    arm: str,
    *,
    steps: int,
    rates: Sequence[float],
    polishing: int = POLISHING,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Trial:
    """Adam with a cosine to zero on the squared error at every rate, then `polish` at each target's best.

    All problems, rates and restarts at once;     The replicas share no number, so one call is as many single ones.
    """
    restarts = len(problems[0].starts)
    starts = [problem.weights | start for problem in problems for start in problem.starts]
    begin = {name: torch.stack([weights[name] for weights in starts]) for name in starts[0]}  # [P * R, ...]
    x = torch.stack([problem.x for problem in problems for _ in range(restarts)])
    o = torch.stack([problem.o for problem in problems for _ in range(restarts)])
    x, o = (t.repeat(len(rates), 1, 1) for t in (x, o))  # [L * P * R, n, 2]
    # A tensor for each rate, so that each is a group of the optimizer
    trained = {name: [begin[name].clone().requires_grad_() for _ in rates] for name in TRAINED[arm]}
    groups = [{"params": [trained[name][i] for name in trained], "lr": rate} for i, rate in enumerate(rates)]
    adam = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)

    def weights() -> Weights:
        return {name: torch.cat(trained.get(name, [begin[name]] * len(rates))) for name in begin}

    for step in range(steps):
        loss = vmap(error_of)(vmap(layer)(x, weights()), o).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 50 == 0:
            on_progress(step / steps)
    on_progress(1.0)
    found = {name: tensor.detach() for name, tensor in weights().items()}

    def sorted_out(t: Tensor) -> Tensor:
        return t.unflatten(0, (len(rates), len(problems), restarts)).transpose(0, 1)  # [P, L, R, ...]

    after_adam = sorted_out(vmap(error_of)(vmap(layer)(x, found), o))
    chosen = _best_rates([problem.target for problem in problems], after_adam)
    every = range(len(problems))
    found = {name: sorted_out(t)[every, chosen].flatten(0, 1) for name, t in found.items()}
    x, o = (sorted_out(t)[:, 0].flatten(0, 1) for t in (x, o))
    polished = polish(x, o, found, arm, polishing)
    errors = vmap(error_of)(vmap(layer)(x, polished), o)

    def by_problem(t: Tensor) -> Tensor:
        return t.unflatten(0, (len(problems), restarts))

    weights_found = {name: by_problem(t) for name, t in polished.items()}
    return Trial(after_adam, chosen, weights_found, by_problem(errors))


def _best_rates(targets: Sequence[str], errors: Tensor) -> list[int]:
    """For each problem its target's rate: the smallest mean logarithm, over seeds, of the best restart's error."""
    best = {}
    for target in dict.fromkeys(targets):
        mine = [i for i, other in enumerate(targets) if other == target]
        best[target] = int(errors[mine].amin(-1).log().mean(0).argmin())
    return [best[target] for target in targets]


def polish(x: Tensor, o: Tensor, weights: Weights, arm: str, iterations: int) -> Weights:
    """The weights after Levenberg-Marquardt steps in what the arm trains; all tensors [N, ...].

    Near a target that can be reached it converges in a few steps where Adam needs thousands, so that what is left
    over tells more of the arm and less of the optimizer. A step that would not lower the error is not taken.
    """
    names = TRAINED[arm]
    shapes = [weights[name].shape[1:] for name in names]
    sizes = [shape.numel() for shape in shapes]
    fixed = {name: t for name, t in weights.items() if name not in names}

    def unpacked(flat: Tensor) -> Weights:
        return {
            name: part.reshape(shape)
            for name, part, shape in zip(names, flat.split(sizes), shapes, strict=True)
        }

    def residual(flat: Tensor, x: Tensor, o: Tensor, fixed: Weights) -> Tensor:
        return (layer(x, fixed | unpacked(flat)) - o).flatten()

    found = torch.cat([weights[name].flatten(1) for name in names], 1)
    left = vmap(residual)(found, x, o, fixed)
    damping = torch.full((len(x), 1, 1), 1e-2, dtype=x.dtype)
    for _ in range(iterations):
        slopes = vmap(jacfwd(residual))(found, x, o, fixed)
        square = slopes.mT @ slopes + damping * torch.eye(found.shape[1], dtype=x.dtype)
        tried = found - torch.linalg.solve(square, slopes.mT @ left[..., None]).squeeze(-1)
        then = vmap(residual)(tried, x, o, fixed)
        better = then.square().sum(1) < left.square().sum(1)
        found = torch.where(better[:, None], tried, found)
        left = torch.where(better[:, None], then, left)
        damping = torch.where(better[:, None, None], damping / 3, damping * 4).clamp(1e-12, 1e12)
    return fixed | vmap(unpacked)(found)


# --- what came out ---------------------------------------------------------------------------------------------


def judge(
    problems: Sequence[Problem], trials: Mapping[tuple[str, str], Trial], rates: Sequence[float]
) -> dict[str, Any]:
    """All numbers as plain data: a cell for each setting, target and arm, and how well W_v stood in for alpha.

    A cell's errors are those of the best restart, polished; after_adam has them all, [seeds][restarts] for each rate.
    verdicts counts seeds: reached; out of reach (proved); not found (the arm can reach it, and the optimisation did
    not); undecided.
    """
    cells = []
    for setting, target, arm in itertools.product(SETTINGS, TARGETS, ARMS):
        mine = [problem for problem in problems if problem.setting == setting]
        which = [i for i, problem in enumerate(mine) if problem.target == target]
        trial = trials[setting, arm]
        errors, before = trial.errors[which].amin(-1), trial.after_adam[which]
        bounds = [lower_bounds(mine[i])[arm] for i in which]
        known = [arm in mine[i].makers for i in which]
        verdicts = [
            _verdict(float(error), bound, maker)
            for error, bound, maker in zip(errors, bounds, known, strict=True)
        ]
        cells.append(
            {
                "setting": setting,
                "target": target,
                "arm": arm,
                "trained_numbers": sum(
                    (mine[0].weights | mine[0].starts[0])[name].numel() for name in TRAINED[arm]
                ),
                "rate": rates[trial.rates[which[0]]],
                "median_error": float(errors.median()),
                "errors": errors.tolist(),
                "lower_bounds": bounds,
                "reachable": known,
                "verdicts": {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)},
                "after_adam": {str(rate): before[:, i].tolist() for i, rate in enumerate(rates)},
            }
        )
    return {
        "settings": SETTINGS,
        "arms": ARMS,
        "targets": TARGETS,
        "reached_below": REACHED,
        "cells": cells,
        "alpha_as_values": _largest_difference(problems, trials["caption", "alpha"]),
    }


def _verdict(error: float, bound: float, maker: bool) -> str:
    if error < REACHED:
        return "reached"
    if bound > REACHED:
        return "out of reach"
    return "not found" if maker else "undecided"


def _largest_difference(problems: Sequence[Problem], trial: Trial) -> float:
    """How far all trained alphas of the caption's setting are, in their outputs, from the W_v that contain them."""
    x = torch.stack([problem.x for problem in problems if problem.setting == "caption"])
    flat = {name: t.flatten(0, 1) for name, t in trial.weights.items()}
    each = len(flat["q"]) // len(x)
    x = x.repeat_interleave(each, 0)
    return float((vmap(layer)(x, flat) - vmap(layer)(x, values_instead_of_alpha(flat))).abs().max())


def table(results: Mapping[str, Any]) -> str:
    """Median errors and verdicts as Markdown, a table for each setting, and on what they were measured."""
    seeds, lines = results["seeds"], []
    cells = {(cell["setting"], cell["target"], cell["arm"]): cell for cell in results["cells"]}
    for setting, what in SETTINGS.items():
        numbers = {arm: cells[setting, "inside", arm]["trained_numbers"] for arm in ARMS}
        lines += [
            f"{setting} ({what})",
            "",
            "| target | " + " | ".join(f"{ARMS[arm]} ({numbers[arm]})" for arm in ARMS) + " |",
            "|---|" + "---|" * len(ARMS),
        ]
        for target in TARGETS:
            row = [target]
            for arm in ARMS:
                cell = cells[setting, target, arm]
                row.append(f"{cell['median_error']:.3f} {_told(cell, seeds)}")
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    lines += [
        f"Median over {seeds} seeds of the error, 1 = the target's own size; reached: below {REACHED}. Best of "
        f"{len(results['rates'])} learning rates and {results['restarts']} restarts, {results['steps']} steps of Adam, "
        f"{results['polishing']} of Levenberg-Marquardt.",
        f"A W_v in alpha's place (the caption's formula): outputs differ by at most {results['alpha_as_values']:.0e}.",
        f"{results['device']}, torch {results['versions']['torch']}, {results['seconds']:.0f} s",
    ]
    return "\n".join(lines)


def _told(cell: Mapping[str, Any], seeds: int) -> str:
    parts = []
    for verdict, count in cell["verdicts"].items():
        low = (
            min(bound for bound in cell["lower_bounds"] if bound > REACHED)
            if verdict == "out of reach"
            else 0
        )
        parts.append(
            verdict + (f" {count}/{seeds}" if count < seeds else "") + (f" (>= {low:.3f})" if low else "")
        )
    return ", ".join(parts)


def draw(
    problems: Sequence[Problem],
    trials: Mapping[tuple[str, str], Trial],
    results: Mapping[str, Any],
    file: Path,
) -> None:
    """A row for each target, a column for each setting and arm; the first seed's graphs at the cell's rate."""
    from matplotlib.figure import Figure

    columns = list(itertools.product(SETTINGS, ARMS))
    picture = Figure(figsize=(2.35 * len(columns) + 1.0, 2.5 * len(TARGETS) + 1.2), layout="constrained")
    axes = picture.subplots(len(TARGETS), len(columns), squeeze=False)
    cells = {(cell["setting"], cell["target"], cell["arm"]): cell for cell in results["cells"]}
    for (row, target), (column, (setting, arm)) in itertools.product(enumerate(TARGETS), enumerate(columns)):
        ax, cell = axes[row, column], cells[setting, target, arm]
        mine = [problem for problem in problems if problem.setting == setting]
        number = next(i for i, problem in enumerate(mine) if problem.target == target)
        problem, trial = mine[number], trials[setting, arm]
        restart = int(trial.errors[number].argmin())
        out = layer(problem.x, {name: t[number, restart] for name, t in trial.weights.items()})
        if arm == "qk":
            ax.fill(*reachable_polygon(problem.x, problem.weights).T.numpy(), color="#dfe9f3", zorder=0)
        closed = [*range(NODES), 0] if _place_on_line(problem.x) is None else [*range(NODES)]
        ax.plot(*problem.x[closed].T.numpy(), "-o", color="#b8b4ac", markersize=2.5, linewidth=0.8, zorder=1)
        ax.plot(*problem.o[closed].T.numpy(), "-o", color="#2b6cb0", markersize=6, linewidth=0.9,
                markerfacecolor="none", zorder=2)  # fmt: skip
        for a, b in zip(out, problem.o, strict=True):
            ax.plot(*torch.stack([a, b]).T.numpy(), color="#d9480f", linewidth=0.7, alpha=0.7, zorder=3)
        ax.plot(*out.T.numpy(), "o", color="#d9480f", markersize=3.2, zorder=4)
        error, bound = cell["errors"][0], cell["lower_bounds"][0]
        verdict = _verdict(error, bound, cell["reachable"][0])
        ax.set_title(f"{error:.3f}  {verdict}" + (f" (>= {bound:.2f})" if verdict == "out of reach" else ""),
                     fontsize=8, color="#2f855a" if verdict == "reached" else "#333333")  # fmt: skip
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_color("#d8d5cf")
        if row == 0:
            head = setting + ("\n(alpha is contained in W_v)" if setting == "caption" else "\n(it is not)")
            ax.annotate(f"{head}\n{ARMS[arm]}", (0.5, 1.22), xycoords="axes fraction", ha="center", va="bottom",
                        fontsize=9, weight="bold")  # fmt: skip
        if column == 0:
            ax.set_ylabel(f"$\\bf{{{target}}}$\n" + textwrap.fill(TARGETS[target], 30), fontsize=8)
    picture.suptitle(
        "One attention layer, tuned to carry a graph (grey) to a target (blue); what comes out (orange)\n"
        "Pale blue: all that W_q and W_k can give a node. Over each: error (1 = the target's size) and what it means",
        fontsize=11,
    )
    picture.supxlabel(
        f"coeffdiff toy: seed 0 of {results['seeds']}, best of rates {', '.join(map(str, results['rates']))} and "
        f"{results['restarts']} restarts, {results['steps']} steps of Adam and {results['polishing']} of "
        f"Levenberg-Marquardt; torch {results['versions']['torch']}",
        fontsize=8,
        color="#777777",
    )
    picture.savefig(file, dpi=110)
