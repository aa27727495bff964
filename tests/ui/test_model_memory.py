"""What a model held is free again once the page has used it."""

from __future__ import annotations

import traceback
import weakref

import pytest

from coeffdiff.errors import ModelError
from coeffdiff.ui import model_memory
from coeffdiff.ui.model_memory import memory_given_back


class Weights:
    """In the place of a model."""


@pytest.fixture
def freed(monkeypatch):
    """How many models lived each time memory was given back."""
    held, counts = weakref.WeakSet(), []
    monkeypatch.setattr(model_memory, "free_memory", lambda _: counts.append(len(held)))
    return held, counts


def test_memory_is_given_back_after_an_error_too(freed):
    """An error keeps the variables of the functions that it left, and so does one that it came from."""
    held, counts = freed

    def use():
        model = Weights()
        held.add(model)
        try:
            raise RuntimeError(f"{len(held)} model")
        except RuntimeError:
            raise ModelError("It failed.") from None

    with pytest.raises(ModelError) as caught, memory_given_back():
        use()
    assert counts == [0]
    assert "in use" in "".join(traceback.format_exception(caught.value))
    with memory_given_back():
        pass
    assert counts == [0, 0]
