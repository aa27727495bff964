"""The results of an image-text comparison as a table in Markdown, for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_markdown(results: Mapping[str, Any]) -> str:
    """An arm a row: trained numbers, accuracy of each task and their mean, the difference to the reference, rates."""
    reference, tasks = results["reference"], results["tasks"]
    scored = [task for task in tasks if any(task in arm["accuracy"] for arm in results["arms"].values())]
    head = ["arm", "numbers", *scored, "mean", f"less {reference}'s", "rates", "mean abs alpha", "seconds"]
    rows = [head, ["---"] * len(head)]
    for name, arm in results["arms"].items():
        shares = [f"{100 * arm['accuracy'][task]:.1f}" for task in scored]
        chosen = arm["chosen"]["rates"] if arm["chosen"] else {}
        rates = ", ".join(f"{part} {rate:.1e}" for part, rate in chosen.items())
        alpha = "" if arm["mean_abs_alpha"] is None else f"{arm['mean_abs_alpha']:.3f}"
        less = _difference(results["paired"].get(name, {}).get("mean"))
        mean, seconds = f"{100 * arm['mean_accuracy']:.1f}", f"{arm['seconds']:.0f}"
        rows.append([name, _numbers(arm["numbers"]), *shares, mean, less, rates, alpha, seconds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(results: Mapping[str, Any]) -> str:
    """For each arm and task the difference to the reference with its interval and verdict, a line each."""
    lines = []
    for arm, scores in results["paired"].items():
        for task, found in scores.items():
            lines.append(
                f"{arm} - {results['reference']}, {task}: {_difference(found)}, better with {found['better_on']} of "
                f"{found['of']} seeds: {found['says']}"
            )
    return "\n".join(lines)


def _numbers(trained: Mapping[str, int]) -> str:
    """What is trained beside the projection, which is in every arm."""
    return f"{sum(count for part, count in trained.items() if part != 'head'):,}"


def _difference(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    between = "" if found["low"] is None else f" [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"{100 * found['difference']:+.1f}{between}"
