"""The page lives on after it has used a model, so it gives the GPU's memory back, to a training above all."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from coeffdiff.training.launch import start_processes
from coeffdiff.training.resolve import free_memory


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Afterwards no memory of a model that was used inside is held, after an error neither."""
    try:
        yield
    except Exception as error:
        _let_go(error)
        raise
    finally:
        free_memory(start_processes())


def _let_go(error: BaseException | None) -> None:
    """Empty the functions that the error, and those that it came from, have left: their variables hold the model."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
