"""The processes of accelerate launch, for commands that share their work."""

from __future__ import annotations

from typing import Any


def start_launched() -> Any:
    from coeffdiff.training.launch import start_processes

    return start_processes()
