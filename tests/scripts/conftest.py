"""How the tests of this folder run a script: as the user does, or in a fork, which need not load torch again."""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

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
def forked() -> Callable[..., subprocess.CompletedProcess[str]]:
    """forked(script, *arguments, cwd=...): its end, as subprocess.run tells it. "coeffdiff" is the command line."""
    return _forked


def _forked(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _become(script, arguments, cwd, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess([script, *arguments], code, *texts)


def _become(script: str, arguments: tuple[str, ...], cwd: Path, out: int, err: int) -> None:
    code = 1
    gc.freeze()  # a collection would walk, and so copy, all that was inherited
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        os.chdir(cwd)
        sys.argv = [script, *arguments]
        if script == "coeffdiff":
            runpy.run_module("coeffdiff", run_name="__main__")
        else:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
