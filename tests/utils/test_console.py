"""What reaches the terminal is harmless, and what goes into a pipe is exact."""

from __future__ import annotations

import io
import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coeffdiff.utils import console
from coeffdiff.utils.console import muted, print_error, print_info, print_result, progress, visible

ANY_TEXT = st.text(st.characters(codec=None))  # lone surrogates too, as in names that are no UTF-8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),  # clears the screen
        ("\x1b]0;mine\x07", "\\x1b]0;mine\\x07"),  # renames the window
        ("\x9b31m", "\\x9b31m"),  # the same in one byte
        ("a\nError: b\r", "a\\nError: b\\r"),  # lines of its own
        ("photo\u202egnp.exe", "photo\\u202egnp.exe"),  # written backwards
        ("\udcff", "\\udcff"),  # a byte that is no UTF-8
        ("Grüße, 猫 𝕏 नमस्ते 👩‍🚀", "Grüße, 猫 𝕏 नमस्ते 👩‍🚀"),
        ("a\N{NO-BREAK SPACE}b\N{IDEOGRAPHIC SPACE}c", "a\N{NO-BREAK SPACE}b\N{IDEOGRAPHIC SPACE}c"),
        ("[bold]{token}[/bold] C:\\photos", "[bold]{token}[/bold] C:\\photos"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, shown):
    """Letters of every script, blanks, markup and braces stay."""
    assert visible(text) == shown


@settings(deadline=None)
@given(ANY_TEXT)
def test_no_text_moves_the_terminal(text):
    """One line, encodable, without control or direction characters; and what needs no change has none."""
    shown = visible(text)
    shown.encode()
    assert not any(c < " " or "\x7f" <= c < "\xa0" or "\u202a" <= c <= "\u202e" for c in shown)
    assert len(shown.splitlines()) <= 1
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text


def test_every_line_is_said_on_its_own(capsys):
    print_info("photos   3 in a\nPhotoError: there are none", "next")
    assert capsys.readouterr().err == "photos   3 in a\\nPhotoError: there are none\nnext\n"


def test_progress_shows_names_as_they_are(capsys, monkeypatch):
    """Without a terminal as lines, on one through rich, which would take [red] for markup: neither obeys."""
    with progress("up\x1b[2J", 1) as bar:
        bar(1, "[red]\x1b[31m")
    assert "up\\x1b[2J 1/1  [red]\\x1b[31m" in capsys.readouterr().err

    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("training", 1) as bar:
        bar(1, "[red]\x1b[31mx")
    assert "[red]\\x1b[31mx" in terminal.getvalue()
    assert "\x1b[31mx" not in terminal.getvalue()


def test_a_begun_picture_is_counted_in_tenths(capsys, monkeypatch):
    """3 and one of 15 steps of 4 pictures: 3.1, not 3.06667; whole numbers stay whole, large ones too."""
    monkeypatch.setattr("coeffdiff.utils.console.QUIET_SECONDS", 0)
    with progress("pictures", 4) as bar:
        bar(3 + 1 / 15)
    with progress("training", 20000) as bar:
        bar(12345)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["pictures 3.1/4", "training 12345/20000"]


class Pipe(io.TextIOWrapper):
    terminal = False

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("name", [b"runs/\xff", b"runs/\x1b[2J", "runs/猫".encode()])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_program_reads_the_exact_bytes_of_a_name(name, encoding, monkeypatch):
    """`for f in $(coeffdiff sample ...)` finds the file; on a terminal the same name is harmless."""
    raw = io.BytesIO()
    monkeypatch.setattr(console.sys, "stdout", pipe := Pipe(raw, encoding=encoding))
    print_result(os.fsdecode(name))
    assert raw.getvalue() == name + b"\n"
    monkeypatch.setattr(Pipe, "terminal", True)
    print_result(os.fsdecode(name))
    assert b"\x1b" not in raw.getvalue()[len(name) + 1 :]
    pipe.detach()


def test_what_is_hushed_is_not_said_and_complaints_are(capsys):
    with muted():
        print_info("a detail")
        with muted():
            pass
        print_info("another")
        print_error("a fault")
    print_info("afterwards")
    assert capsys.readouterr().err == "a fault\nafterwards\n"
