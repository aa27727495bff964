"""The page lives on after it has used a model, so it gives the GPU's memory back, to a training above all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from coeffdiff.training.launch import start_processes
from coeffdiff.training.resolve import free_memory
from coeffdiff.utils.tracebacks import forget_locals


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Afterwards no memory of a model that was used inside is held, after an error neither."""
    try:
        yield
    except Exception as error:
        forget_locals(error)
        raise
    finally:
        free_memory(start_processes())
