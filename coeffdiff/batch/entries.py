"""A subject's entry: the JSON file that says what became of its task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.output_folder import write_errors

Entry = dict[str, Any]


def read_entry(file: Path, name: str) -> Entry:
    """Its state is "missing" where there is no file that can be read."""
    try:
        entry: Entry = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"name": name, "state": "missing"}
    return entry


def write_entry(file: Path, entry: Entry) -> None:
    """Raises: ConfigError where the disk refuses."""
    write_text(file, json.dumps(entry, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Raises: ConfigError where the disk refuses."""
    with write_errors(str(file)), atomic_write(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
