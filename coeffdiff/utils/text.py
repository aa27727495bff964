"""Small questions about text."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, without a full stop; the name of its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def has_surrogates(text: str) -> bool:
    """Whether it holds halves of surrogate pairs, which bytes that are no UTF-8 become in file names."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)
