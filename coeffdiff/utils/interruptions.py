"""Ctrl-C and SIGTERM: work that can be continued later ends at a good moment, and is saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from coeffdiff.errors import Interrupted
from coeffdiff.utils.console import error_stream, is_main_process, print_error


class Stop:
    """Whether the work of this process has been asked to stop: by a signal, or by a call of `ask`."""

    def __init__(self) -> None:
        self.asked = False
        self._patient = 0

    def ask(self) -> None:
        self.asked = True

    @contextmanager
    def saved_first(self) -> Iterator[None]:
        """Inside, work looks at `asked` by itself, and saves before it stops."""
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1

    def obey(self) -> None:
        """Raises: Interrupted if it was asked for, unless there is something to save first."""
        if self.asked and not self._patient:
            raise Interrupted("Stopped; what had been saved before is untouched.")


_outermost: Stop | None = None


@contextmanager
def stoppable(how: str) -> Iterator[Stop]:
    """Signals only raise a flag, which is what is yielded; a second Ctrl-C ends at once. Inner blocks share the flag.

    A launcher passes a signal on that the terminal has already sent, so two within two seconds are one. In another
    thread than the main one no signal arrives, and only `ask` raises the flag.
    how: said at the first signal, on what is standard error now, even where info messages are muted.
    """
    global _outermost
    if _outermost:
        yield _outermost
        return
    stop, terminal = Stop(), error_stream()
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            stop.ask()
            if is_main_process():
                print_error(how, file=terminal)
        elif number == signal.SIGINT and now - first > 2:
            raise KeyboardInterrupt

    listens = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if listens else ()
    before = {number: signal.signal(number, handle) for number in signals}
    _outermost = stop
    try:
        yield stop
    finally:
        _outermost = None
        for number, handler in before.items():
            signal.signal(number, handler)
