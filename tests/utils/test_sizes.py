"""Numbers of bytes and lines of errors as text."""

from __future__ import annotations

import pytest

from coeffdiff.utils.sizes import GIB, MIB, in_gib, in_mib_or_gib, readable_size
from coeffdiff.utils.text import first_line, has_surrogates


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "under 1 MiB"),
        (MIB - 1, "under 1 MiB"),
        (300 * MIB, "300 MiB"),
        (GIB, "1.0 GiB"),
        (1.5 * GIB, "1.5 GiB"),
    ],
)
def test_a_size_is_readable(size, text):
    assert readable_size(size) == text


def test_gibibytes_lose_a_digit_from_ten_on():
    assert (in_gib(GIB // 2), in_gib(9.996 * GIB), in_gib(10 * GIB)) == ("0.50 GiB", "10.00 GiB", "10.0 GiB")


def test_mebibytes_with_as_many_digits_as_asked():
    assert (in_mib_or_gib(1.25 * MIB), in_mib_or_gib(1.25 * MIB, 1), in_mib_or_gib(2 * GIB, 1)) == (
        "1 MiB",
        "1.2 MiB",
        "2.0 GiB",
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a mistake.\nand details"), "a mistake"),
        (OSError(2, "No such file"), "[Errno 2] No such file"),
        (KeyError(), "KeyError"),
        (RuntimeError("\n  \n"), "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error(error, line):
    """Without its full stop; an error without words is its type."""
    assert first_line(error) == line


def test_halves_of_surrogate_pairs_are_no_text():
    """A byte that is no UTF-8, as Python decodes it in file names; letters beyond ASCII are text."""
    assert has_surrogates(b"\xff".decode("utf-8", "surrogateescape"))
    assert not has_surrogates("naïve 猫 \U0001f408")
