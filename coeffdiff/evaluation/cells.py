"""The cells of comparisons on disk: a folder of JSON files, and of JSON Lines files that they are packed into.

    cells/sloth-lora-s0-100x1-73f3adeaa525c27c.json    a cell by itself, as it is written
    cells/core.jsonl                                   packed cells, a line each, sorted by key

The key at the end of a file's name, or at the beginning of a line, is a hash of all that decides a cell. Cells are
found by it alone; the words before it, and the name of a packed file, are for the reader. So a cell that several plans
have in common is stored once, in the file of the plan that was packed first. Several processes may read, write and pack
one folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coeffdiff.errors import ConfigError
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.locks import try_lock

Cell = dict[str, Any]


class CellFolder:
    """The cells of one folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: tuple[tuple[str, int, int], ...] = ()  # the packed files that _lines was read from
        self._lines: dict[str, Cell] = {}

    def read(self, key: str) -> Cell | None:
        """A cell, or None if it is missing or incomplete. Raises: ConfigError for a packed file that is damaged."""
        # Another process may pack the single file meanwhile, so the packed ones are read again.
        return self._packed().get(key) or _whole(self._single(key)) or self._packed().get(key)

    def write(self, key: str, words: str, cell: Mapping[str, Any]) -> None:
        """Write a cell into a file of its own. words: of the file's name, before the key."""
        file = self._single(key) or self.folder / f"{slug(words)}-{key}.json"
        with atomic_write(file, durable=True) as unfinished:
            unfinished.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")

    def all(self) -> dict[str, Cell]:
        """Every complete cell by its key, sorted by key."""
        singles = {_key_of(file): cell for file in self.folder.glob("*-*.json") if (cell := _whole(file))}
        return dict(sorted((singles | self._packed()).items()))

    def pack(self, name: str, keys: Iterable[str]) -> int:
        """Move the cells of these keys that have files of their own into `name`.jsonl; returns how many there were.

        A cell that is packed already stays as it was packed. An incomplete one stays where it is, and so do all while
        another process packs this folder.
        """
        if not self.folder.is_dir():
            return 0
        with try_lock(self.folder) as mine:
            singles = (
                {key: file for key in set(keys) if (file := self._single(key))} if mine is not False else {}
            )
            packed = self._packed()
            new = {key: cell for key, file in singles.items() if key not in packed and (cell := _whole(file))}
            if new:
                target = self.folder / f"{slug(name)}.jsonl"
                lines = sorted(((_lines_of(target) if target.is_file() else {}) | new).items())
                with atomic_write(target, durable=True) as unfinished:
                    content = "".join(json.dumps({"key": key} | cell) + "\n" for key, cell in lines)
                    unfinished.write_text(content, encoding="utf-8")
            done = [file for key, file in singles.items() if key in packed or key in new]
            for file in done:
                file.unlink(missing_ok=True)
        return len(done)

    def _single(self, key: str) -> Path | None:
        return next(self.folder.glob(f"*-{key}.json"), None)

    def _packed(self) -> dict[str, Cell]:
        """All packed cells, read again when a file has changed. Where two files have a key, the first one counts."""
        files = sorted(self.folder.glob("*.jsonl"))
        seen = tuple((file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
        if seen != self._seen:
            lines: dict[str, Cell] = {}
            for file in files:
                lines = _lines_of(file) | lines
            self._seen, self._lines = seen, lines
        return self._lines


def slug(text: str) -> str:
    """The text as a part of a file's name."""
    return re.sub(r"[^\w.+=-]+", "_", text).strip("._")[:100]


def _key_of(file: Path) -> str:
    return file.stem.rpartition("-")[2]


def _whole(file: Path | None) -> Cell | None:
    try:
        cell = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError, RecursionError):
        return None
    return cell if isinstance(cell, dict) else None


def _lines_of(file: Path) -> dict[str, Cell]:
    """The cells of a packed file by their keys. Raises: ConfigError for one that is damaged or cannot be read."""
    cells = {}
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        try:
            cell = json.loads(line.decode("utf-8"))
            cells[str(cell.pop("key"))] = cell
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"Line {number} of {file} is no cell: expected a JSON object with a key. Copy the file from its origin "
                "again, or delete the line; its cell is computed again."
            ) from None
    return cells
