"""Many tasks in one place on standard error: how many are done, and where each of those that run is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from coeffdiff.utils.console import (
    QUIET_SECONDS,
    duration,
    error_console,
    error_stream,
    print_error,
    visible,
)


class Board(Protocol):
    def at(self, name: str, title: str, done: float, total: float, status: str) -> None:
        """A task that runs is there."""

    def ended(self, name: str, failed: bool) -> None: ...

    def note(self, text: str) -> None:
        """Something about all of them, until another note."""


@contextmanager
def board(title: str, total: int) -> Iterator[Board]:
    """Bars on a terminal, an occasional line elsewhere. total: of the tasks."""
    if not error_stream().isatty():
        yield _Lines(title, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=error_console()) as bars:
        yield _Bars(bars, title, total)


class _Counted:
    """What both kinds know."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._done = self._failed = 0
        self._note = ""
        self._begun = time.monotonic()

    def _count(self, failed: bool) -> None:
        self._done += 1
        self._failed += failed

    def _says(self) -> str:
        """How many failed, how long it will be, and the note."""
        seconds = (time.monotonic() - self._begun) / max(1, self._done) * (self._total - self._done)
        left = f"{duration(seconds)} left" if self._done and seconds else ""
        failed = f"{self._failed} failed" if self._failed else ""
        return "  ".join(filter(None, (failed, left, self._note)))


class _Lines(_Counted):
    def __init__(self, title: str, total: int) -> None:
        super().__init__(title, total)
        self._running: dict[str, str] = {}
        self._last = time.monotonic()
        self._terminal = error_stream()  # which a task in this process replaces by its log

    def at(self, name: str, title: str, done: float, total: float, status: str) -> None:
        self._running[name] = f"{name} {title} {round(done, 1):g}/{total:g}" if title else name
        self._say(QUIET_SECONDS)

    def ended(self, name: str, failed: bool) -> None:
        self._running.pop(name, None)
        self._count(failed)
        self._say(0 if self._done == self._total else 1)

    def note(self, text: str) -> None:
        self._note = text

    def _say(self, quiet: float) -> None:
        now = time.monotonic()
        if now - self._last < quiet:
            return
        self._last = now
        running = ", ".join(self._running.values())
        print_error(
            f"{self._title} {self._done}/{self._total}  {self._says()}  {running}".rstrip(),
            file=self._terminal,
        )


class _Bars(_Counted):
    def __init__(self, bars: Any, title: str, total: int) -> None:
        super().__init__(title, total)
        self._bars = bars
        self._all = bars.add_task(title, total=total, status="")
        self._each: dict[str, Any] = {}

    def at(self, name: str, title: str, done: float, total: float, status: str) -> None:
        if name not in self._each:
            self._each[name] = self._bars.add_task(f"  {visible(name)}", total=None, status="")
        says = visible(f"{title}  {status}".strip())
        self._bars.update(self._each[name], completed=done, total=total or None, status=says)

    def ended(self, name: str, failed: bool) -> None:
        if name in self._each:
            self._bars.remove_task(self._each.pop(name))
        self._count(failed)
        self._bars.update(self._all, completed=self._done, status=self._says())

    def note(self, text: str) -> None:
        self._note = text
        self._bars.update(self._all, status=self._says())
