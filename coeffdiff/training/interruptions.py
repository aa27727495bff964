"""Ctrl-C and SIGTERM while training: the step ends and is saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from coeffdiff.utils.console import is_main_process, print_error


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Signals only raise a flag, which is what is yielded; a second Ctrl-C ends at once.

    A launcher passes a signal on that the terminal has already sent, so two within two seconds are one.
    """
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            if is_main_process():  # even where info messages are muted
                print_error("stopping after this step (press Ctrl-C again to stop at once, without saving)")
        elif number == signal.SIGINT and now - first > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
