"""The report of a check: findings, photos, prediction, remedies; as lines and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from coeffdiff.data.photos import PhotoSet
from coeffdiff.preflight.prediction import Prediction
from coeffdiff.utils.console import visible

Severity = Literal["note", "hint", "problem"]
# What findings are about, other than a single photo
_GENERAL = (
    *("memory", "time", "disk", "photos", "token", "class word", "captions"),
    *("schedule", "model", "method", "rate"),
)
MOST_LISTED = 12  # findings of one kind that are listed one by one


@dataclass(frozen=True)
class Finding:
    """One sentence on a run. subject: what it is about, a file's name or one of _GENERAL."""

    severity: Severity
    subject: str
    sentence: str


@dataclass(frozen=True)
class PhotoCheck:
    """One photo as a run uses it.

    sharpness: photos.detail at half the resolution; duplicates: earlier photos of nearly the same hash.
    bucket: (width, height) at which it is trained; cut: share of it that the bucket has no room for;
    enlarged: factor by which its pixels are stretched, 1 or less where it is large enough.
    """

    name: str
    width: int
    height: int
    sharpness: float
    hash: str
    duplicates: tuple[str, ...]
    bucket: tuple[int, int]
    cut: float
    enlarged: float
    captions: tuple[str, ...]
    own_caption: bool
    token_in_captions: bool
    mask: str | None
    of_subject: int = 0  # which of the run's subjects it shows, from 0


@dataclass(frozen=True)
class Remedy:
    """A memory option by name, and the peak that the run would have with it alone; bytes."""

    switch: str
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Free:
    """Bytes that a run may take here; memory: of the device, including what this process holds already."""

    memory: int
    ram: int
    output: int
    cache: int


@dataclass(frozen=True)
class Report:
    photos: tuple[PhotoCheck, ...]
    prediction: Prediction
    free: Free
    remedies: tuple[Remedy, ...]
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        tree = asdict(self)
        tree["prediction"] |= {
            "peak_bytes": self.prediction.peak_bytes,
            "peak_phase": self.prediction.peak_phase,
        }
        return tree


def lines(findings: Sequence[Finding]) -> list[str]:
    """Findings as lines of text. Of those on single photos the first MOST_LISTED are listed and the rest counted."""
    texts, counts = [], dict.fromkeys(("note", "hint", "problem"), 0)
    for finding in findings:
        if finding.subject not in _GENERAL:
            counts[finding.severity] += 1
            if counts[finding.severity] > MOST_LISTED:
                continue
            texts.append(f"{finding.severity:8s} {finding.subject} {finding.sentence}")
        elif finding.severity == "note":
            texts.append(f"{finding.subject:8s} {finding.sentence}")
        else:
            texts.append(f"{finding.severity:8s} {finding.subject}: {finding.sentence}")
    left = sum(max(0, count - MOST_LISTED) for count in counts.values())
    return texts + (
        [f"         and {left} more findings on photos: coeffdiff check lists them all"] if left else []
    )


def table(report: Report, photos: PhotoSet) -> list[str]:
    """The whole report as printable lines: one for each photo, then one for each finding."""
    rows = [("photo", "pixels", "sharp", "trained at", "cut off", "caption")]
    for photo in report.photos:
        caption = _quoted(photo.captions[0]) + (
            f" and {len(photo.captions) - 1} more" if photo.captions[1:] else ""
        )
        rows.append(
            (
                visible(photo.name),
                f"{photo.width} x {photo.height}",
                f"{photo.sharpness:.1f}",
                f"{photo.bucket[0]} x {photo.bucket[1]}",
                f"{photo.cut:.1%}",
                caption + (f", mask {photo.mask}" if photo.mask else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    printed = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
        for row in rows
    ]
    left_out = [f"left out {skipped.path.name}: {skipped.reason}" for skipped in photos.skipped]
    findings = [
        f"{finding.severity if finding.severity != 'note' else '':8s} {finding.subject}: {finding.sentence}"
        for finding in report.findings
    ]
    return [visible(line) for line in (*printed, *left_out, *photos.notes, *findings)]


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'
