"""log.jsonl: one line a step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from coeffdiff.training.run_folder import disk_errors
from coeffdiff.utils.atomic import atomic_write


class StepLog:
    """log.jsonl: one line a step, on the disk as soon as it is written; lines beyond a resumed step are dropped.

    Only the main process writes; elsewhere `writes` is False and nothing happens.
    """

    def __init__(self, file: Path, begun_at: int, writes: bool = True) -> None:
        self._file = None
        if not writes:
            return
        with disk_errors(f"The log {file}"):
            kept = [json.dumps(line) + "\n" for line in read_log(file) if line["step"] <= begun_at]
            with atomic_write(file) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
            self._file = file.open("a", encoding="utf-8")

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            with suppress(OSError):  # on a full disk the line that could not be written has been told already
                self._file.close()

    def amend(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the line of a step that has been written, of the log as a whole or not at all.

        Raises: TrainingError if the disk is full.
        """
        if not self._file:
            return
        file, closed = Path(self._file.name), self._file.closed
        with disk_errors(f"The log {file}"):
            self._file.close()
            lines = [line | _finite(values) if line["step"] == step else line for line in read_log(file)]
            with atomic_write(file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            if not closed:
                self._file = file.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Numbers that are not finite become null, as JSON has none. Raises: TrainingError if the disk is full."""
        if self._file:
            with disk_errors(f"The log {self._file.name}"):
                self._file.write(json.dumps(_finite(line)) + "\n")
                self._file.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log.jsonl, one a step; what cannot be read is left out."""
    if not file.is_file():
        return
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the line that a kill cut short
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line
