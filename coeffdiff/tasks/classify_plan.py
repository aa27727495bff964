"""What a few-shot comparison is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coeffdiff.errors import ConfigError
from coeffdiff.tasks.arms import ARMS
from coeffdiff.tasks.few_shot import Recipe


@dataclass(frozen=True)
class Plan:
    """What to compare. shots: of each class; tries: rates tried by each arm, 1 takes the defaults without tuning;
    test, validation: examples of each class, at most."""

    data: Path
    model: str
    arms: tuple[str, ...] = ARMS
    shots: tuple[int, ...] = (4, 16)
    seeds: int = 6
    tries: int = 5
    test: int = 40
    validation: int = 20
    recipe: Recipe = field(default_factory=Recipe)
    text_column: str = "text"
    label_column: str = "label"


def check_plan(plan: Plan) -> None:
    """Raises: ConfigError for what cannot be compared."""
    if unknown := [arm for arm in plan.arms if arm not in ARMS]:
        raise ConfigError(f"There is no arm {unknown[0]!r}; there are {', '.join(ARMS)}.")
    for name, values in (("--arm", plan.arms), ("--shots", plan.shots)):
        if len(set(values)) != len(values) or not values:
            raise ConfigError(f"{name} needs at least one value, and each once.")
    if min(plan.shots) < 1:
        raise ConfigError(f"--shots are at least 1 of each class, not {min(plan.shots)}.")
