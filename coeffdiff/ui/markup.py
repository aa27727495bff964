"""Small pieces of HTML for the page; whatever comes out of files and settings is escaped."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable
from html import escape
from pathlib import Path

from coeffdiff.data.photos import PhotoSet
from coeffdiff.preflight.report import Finding, Report
from coeffdiff.training.curves import draw_curves
from coeffdiff.ui.run_state import RunState
from coeffdiff.utils.console import visible

HEADER = """<div class="cd-head"><h1>coeffdiff</h1>
<p>Teach an image model your subject from three to six photos. Everything stays on this machine.</p></div>"""
_ORDER = ("problem", "hint", "note")

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.cd-head { padding: 6px 2px 0; }
.cd-head h1 { margin: 0; font-size: 1.5rem; font-weight: 600; letter-spacing: -0.01em; }
.cd-head p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
.cd-list { list-style: none; margin: 0; padding: 0; }
.cd-list li { display: flex; gap: 10px; padding: 7px 0; border-top: 1px solid var(--border-color-primary); }
.cd-list li:first-child { border-top: none; }
.cd-tag { flex: none; width: 64px; height: 20px; border-radius: 10px; font-size: 12px; line-height: 20px;
  text-align: center; background: #e8eaee; color: #3c424d; }
.cd-tag.problem { background: #fbdcd9; color: #8c1d14; }
.cd-tag.hint { background: #fdecc8; color: #704900; }
.cd-table { width: 100%; margin-top: 12px; font-size: 13px; border-collapse: collapse; }
.cd-table th, .cd-table td { text-align: left; padding: 3px 8px 3px 0; }
.cd-table th { color: var(--body-text-color-subdued); font-weight: 400; }
.cd-verdict { font-weight: 600; margin: 0 0 8px; font-size: 1.05rem; }
.cd-status { font-size: 1.05rem; font-weight: 600; margin: 0 0 8px; }
.cd-status.error { color: var(--error-text-color, #8c1d14); }
.cd-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.cd-bar div { height: 100%; background: var(--color-accent); }
.cd-curve img { width: 100%; max-width: 800px; border-radius: 6px; }
.cd-quiet { color: var(--body-text-color-subdued); margin: 0; }
button.lg { font-weight: 600 !important; }
pre.inspection { font-size: 12px; line-height: 1.35; overflow-x: auto; padding: 12px; margin: 0; }
"""


def quiet(text: str) -> str:
    return f'<p class="cd-quiet">{escape(visible(text))}</p>'


def findings(report: Report, photos: PhotoSet) -> str:
    """What a check found: problems, hints, then facts."""
    left_out = [Finding("hint", one.path.name, f"is left out: {one.reason}") for one in photos.skipped]
    notes = [Finding("note", "photos", note) for note in photos.notes]
    found = sorted([*left_out, *report.findings, *notes], key=lambda one: _ORDER.index(one.severity))
    counts = [sum(one.severity == kind for one in found) for kind in _ORDER[:2]]
    return f'<p class="cd-verdict">{_verdict(len(photos.photos), *counts)}</p>{_list(found)}{_table(report)}'


def _table(report: Report) -> str:
    """A row for each photo, with what the training makes of it."""
    rows = [
        (
            one.name,
            f"{one.width} x {one.height}",
            f"{one.sharpness:.1f}",
            f"{one.bucket[0]} x {one.bucket[1]}",
            f"{one.cut:.1%}",
        )
        for one in report.photos
    ]
    cells = ["".join(f"<td>{escape(visible(cell))}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{name}</th>" for name in ("photo", "pixels", "sharp", "trained at", "cut off"))
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<table class="cd-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _verdict(photos: int, problems: int, hints: int) -> str:
    said = [_counted(problems, "problem")] * bool(problems) + [_counted(hints, "hint")] * bool(hints)
    return f"{_counted(photos, 'photo')}: {' and '.join(said) or 'nothing to complain of'}"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _list(found: Iterable[Finding]) -> str:
    rows = (
        f'<li><span class="cd-tag {one.severity}">{one.severity}</span>'
        f"<span><b>{escape(visible(one.subject))}</b> {escape(visible(one.sentence))}</span></li>"
        for one in found
    )
    return f'<ul class="cd-list">{"".join(rows)}</ul>'


def sentences(lines: Iterable[str]) -> str:
    return "".join(quiet(line) for line in lines)


def status(state: RunState | None) -> str:
    """The state of a run in a sentence, with a bar."""
    if state is None:
        return quiet("There is no run yet. Drop photos, choose a token, then press Start.")
    share = 100 * state.step / state.steps if state.steps else 0
    kind = " error" if (state.error or state.killed) and not state.saved else ""
    return (
        f'<p class="cd-status{kind}">{escape(visible(state.sentence))}</p>'
        f'<div class="cd-bar"><div style="width:{min(100.0, share):.1f}%"></div></div>'
    )


def curve(log: Path) -> str:
    """The curves of a run's log as a picture inside of the page; empty before the first step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "curves.png")
        draw_curves(log, file)
        if not file.is_file():
            return quiet("The curve of the loss appears with the first step.")
        content = base64.b64encode(file.read_bytes()).decode()
    return f'<div class="cd-curve"><img alt="Loss over steps" src="data:image/png;base64,{content}"></div>'
