"""Between gradio and the functions: mistakes become a notice of one sentence, progress and hints are shown."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from coeffdiff.utils.console import listening
from coeffdiff.utils.sentences import sentence_of

_DEFECT = "Defect: This is a fault of coeffdiff ({kind}); what happened stands in the terminal."


def speaking(work: Callable[..., Any]) -> Callable[..., Any]:
    """An event whose errors appear on the page as one sentence; a defect's traceback goes to the terminal alone."""

    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return work(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                traceback.print_exc()
                sentence = _DEFECT.format(kind=type(error).__name__)
            kind, _, text = sentence.partition(": ")
            title = kind if text else "Error"
            raise gr.Error(_plain(text or kind), duration=None, title=title, print_exception=False) from None

    return run


def _plain(text: str) -> str:
    """Text that the page shows as it stands: notices are read as HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class _Shown:
    """Bars as gradio's, hints and warnings as notices."""

    def __init__(self, bar: gr.Progress) -> None:
        self._bar = bar

    def line(self, text: str) -> None:
        kind, _, sentence = text.partition(" ")
        if kind in ("hint", "warning"):
            gr.Warning(_plain(sentence.strip()), title=kind.capitalize(), duration=20)
        elif kind == "expect":
            gr.Info(_plain(f"This takes {sentence.strip()}."))

    def progress(self, title: str, done: float, total: float, status: str) -> None:
        share = min(1.0, done / total) if total else 0.0
        self._bar(share, desc=f"{title} {done:.1f} of {total:g} {status}".strip())


@contextmanager
def shown(bar: gr.Progress) -> Iterator[None]:
    """Show on the page what is said inside."""
    with listening(_Shown(bar)):
        yield
