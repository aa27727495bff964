"""The page's HTML: what comes out of files is text in it."""

from __future__ import annotations

from pathlib import Path

from coeffdiff.data.photos import PhotoSet, Skipped
from coeffdiff.preflight.report import Finding, PhotoCheck, Report
from coeffdiff.ui import markup
from coeffdiff.ui.run_state import RunState

EVIL = "<img src=x onerror=alert(1)>.jpg"


def photo(name):
    return PhotoCheck(name, 64, 48, 3.25, "", (), (32, 24), 0.125, 0.5, ("a caption",), False, True, None)


def test_names_of_files_are_no_markup():
    report = Report((photo(EVIL),), None, None, (), (Finding("hint", EVIL, "is <b>small</b>"),))
    shown = markup.findings(report, PhotoSet((), (Skipped(Path(EVIL), "<i>empty</i>"),), ("<u>note</u>",)))
    for tag in ("<img", "<b>small", "<i>", "<u>"):
        assert tag not in shown
    assert "&lt;img" in shown and "64 x 48" in shown and "12.5%" in shown


def test_problems_come_first_and_are_counted():
    found = [
        Finding("note", "time", "one"),
        Finding("hint", "token", "two"),
        Finding("problem", "memory", "three"),
    ]
    shown = markup.findings(Report((), None, None, (), tuple(found)), PhotoSet((), ()))
    assert "0 photos: 1 problem and 1 hint" in shown
    assert shown.index("three") < shown.index("two") < shown.index("one")


def test_a_status_is_a_sentence_and_a_bar():
    state = RunState(Path("runs/a"), True, 15, 60, {}, False, False, None)
    assert "width:25.0%" in markup.status(state) and "Training: step 15 of 60." in markup.status(state)
    failed = RunState(Path("runs/a"), False, 0, None, {}, False, False, "PhotoError: <x>")
    assert "cd-status error" in markup.status(failed) and "&lt;x&gt;" in markup.status(failed)
    assert "There is no run yet" in markup.status(None)
