"""Executors by name."""

from __future__ import annotations

from typing import Literal

from coeffdiff.errors import ConfigError
from coeffdiff.execution.local import LocalExecutor
from coeffdiff.execution.tasks import Executor

ExecutorName = Literal["local", "ray"]


def choose_executor(name: ExecutorName, workers: int | None, address: str | None) -> Executor:
    """Raises: ConfigError for options of Ray's without Ray."""
    if name == "ray":
        from coeffdiff.execution.ray_executor import RayExecutor

        return RayExecutor(address, workers)
    for option, value in (("--workers", workers), ("--ray-address", address)):
        if value is not None:
            raise ConfigError(
                f"{option} is for --executor ray; without it one process does one task after the other."
            )
    return LocalExecutor()
