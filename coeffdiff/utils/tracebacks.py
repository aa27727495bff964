"""What exceptions keep alive: by their tracebacks every local variable of the functions that they came through."""

from __future__ import annotations

import traceback
from collections.abc import Iterator


def forget_locals(error: BaseException) -> None:
    """Free the local variables of all functions that an exception has left; its traceback can still be printed."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def strip(error: BaseException) -> None:
    """Leave nothing of an exception but its type and message."""
    error.__traceback__ = error.__context__ = error.__cause__ = None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that led to it."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            waiting += [one.__cause__, one.__context__]
            yield one
