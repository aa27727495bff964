"""Arms trained on the toy's targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from coeffdiff.evaluation.toy.bounds import error_of
from coeffdiff.evaluation.toy.problem import Problem, Weights, layer
from coeffdiff.evaluation.toy.settings import POLISHING, TRAINED


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

    All problems, rates and restarts run at once; they share no number, so the result is that of single calls.
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
    trained_weights = {name: tensor.detach() for name, tensor in weights().items()}

    def sorted_out(t: Tensor) -> Tensor:
        return t.unflatten(0, (len(rates), len(problems), restarts)).transpose(0, 1)  # [P, L, R, ...]

    after_adam = sorted_out(vmap(error_of)(vmap(layer)(x, trained_weights), o))
    chosen = _best_rates([problem.target for problem in problems], after_adam)
    every = range(len(problems))
    trained_weights = {
        name: sorted_out(t)[every, chosen].flatten(0, 1) for name, t in trained_weights.items()
    }
    x, o = (sorted_out(t)[:, 0].flatten(0, 1) for t in (x, o))
    polished = polish(x, o, trained_weights, arm, polishing)
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
