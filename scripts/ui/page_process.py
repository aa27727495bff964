"""The page as a person starts it: `coeffdiff ui` in a working folder, in a process that may be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

_PATIENCE = 240  # seconds, on a busy machine


class PageProcess:
    """coeffdiff ui with some options; address: what it has printed."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._log = folder / "page.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "coeffdiff", "ui", *options], cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.address = self._printed_address()

    def kill(self) -> None:
        """As a crash does: nothing is tidied up."""
        self._process.kill()
        self._process.wait()

    def _printed_address(self) -> str:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            found = [line for line in self._log.read_text().splitlines() if line.startswith("http://")]
            if found:
                return found[0]
            time.sleep(0.2)
        self.kill()
        raise AssertionError(f"no page: {self._log.read_text()}")
