"""Results of the toy's trials: verdicts, a table, a picture."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.func import vmap

from coeffdiff.evaluation.toy.bounds import lower_bounds, place_on_line, reachable_polygon
from coeffdiff.evaluation.toy.problem import Problem, layer, values_instead_of_alpha
from coeffdiff.evaluation.toy.settings import ARMS, NODES, REACHED, SETTINGS, TARGETS, TRAINED
from coeffdiff.evaluation.toy.tuning import Trial
from coeffdiff.utils.plotting import new_figure


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
    """Median errors and verdicts as Markdown, a table for each setting, and how they were measured."""
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
                row.append(f"{cell['median_error']:.3f} {_verdicts_as_text(cell, seeds)}")
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


def _verdicts_as_text(cell: Mapping[str, Any], seeds: int) -> str:
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
    columns = list(itertools.product(SETTINGS, ARMS))
    picture = new_figure(figsize=(2.35 * len(columns) + 1.0, 2.5 * len(TARGETS) + 1.2), layout="constrained")
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
        closed = [*range(NODES), 0] if place_on_line(problem.x) is None else [*range(NODES)]
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
