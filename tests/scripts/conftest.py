"""How the tests of this folder run a script: as the user does, or in a fork, which need not load torch again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forking import fork_run

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPTS / script), *arguments]
        # The interpreter is for the kernels' own tests; the user does not have it switched on.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["OMP_NUM_THREADS"] = "1"
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)

    return run


@pytest.fixture(scope="session")
def forked(run) -> Callable[..., subprocess.CompletedProcess[str]]:
    """forked(script, *arguments, cwd=...): the same in a fork, but where there is a GPU, which forks cannot use."""
    if torch.cuda.is_available():
        return run
    return lambda script, *arguments, cwd: fork_run(str(SCRIPTS / script), *arguments, cwd=cwd)
