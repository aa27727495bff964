"""The report of a check: findings, photos, prediction, remedies; as lines and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from coeffdiff.data.photos import PhotoSet
from coeffdiff.preflight.prediction import Prediction
from coeffdiff.utils.console import visible

Severity = Literal["note", "hint", "problem"]


GIB = 2**30


# Of 15 photographs (three sets of DreamBooth's, 512 px) and 20 renders (64 px), all sharp, the softest had 6.3; none
# blurred by 1.5 pixels or more had above 1.8, and of those blurred by one pixel all but fur and a patterned teapot
# were below 3. Plain variance cannot tell them apart: a sharp smooth render had 5, a blurred plush animal 224.
SOFT = 3.0


# Bits of 64 in which hashes differ. Of the same sets: recompressed, halved, brightened or trimmed by 2 % at most 12
# and mostly below 7; two different photos of a subject at least 15.
NEARLY_EQUAL = 10


FEW_VIEWS = 5  # times that each photo is seen in a run


MOST_LISTED = 12  # findings of one kind that are said one by one


@dataclass(frozen=True)
class Finding:
    """subject: what it is about: a file name, memory, time, disk, captions, photos."""

    severity: Severity
    subject: str
    sentence: str


@dataclass(frozen=True)
class PhotoCheck:
    """What one photo is to this run.

    sharpness: detail(...) at half the resolution; duplicates: earlier photos of nearly the same hash.
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


@dataclass(frozen=True)
class Remedy:
    """A switch and the peak that the run would have with it, all else unchanged; bytes."""

    switch: str
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Free:
    """What a run may take here, in bytes; memory: of the device, what this process holds already included."""

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


def in_gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 10 * GIB else f"{size / GIB:.2f} GiB"


NEXT_TO_NOTHING = "under 1 MiB"


def readable_size(size: float) -> str:
    return (
        f"{size / GIB:.1f} GiB"
        if size >= GIB
        else f"{size / 2**20:.0f} MiB"
        if size >= 2**20
        else NEXT_TO_NOTHING
    )


def lines(findings: Sequence[Finding]) -> list[str]:
    """Findings as a person reads them; of many alike the first are named and the rest counted."""
    said, counts = [], dict.fromkeys(("note", "hint", "problem"), 0)
    general = (
        *("memory", "time", "disk", "photos", "token", "class word", "captions"),
        *("schedule", "model", "rate"),
    )
    for finding in findings:
        if finding.subject not in general:
            counts[finding.severity] += 1
            if counts[finding.severity] > MOST_LISTED:
                continue
            said.append(f"{finding.severity:8s} {finding.subject} {finding.sentence}")
        elif finding.severity == "note":
            said.append(f"{finding.subject:8s} {finding.sentence}")
        else:
            said.append(f"{finding.severity:8s} {finding.subject}: {finding.sentence}")
    left = sum(max(0, count - MOST_LISTED) for count in counts.values())
    return said + (
        [f"         and {left} more findings on photos: coeffdiff check lists them all"] if left else []
    )


def table(report: Report, photos: PhotoSet) -> list[str]:
    """The whole report for a terminal, whatever files are called: a line a photo, then every finding."""
    rows = [("photo", "pixels", "sharp", "trained at", "cut off", "caption")]
    for photo in report.photos:
        caption = quoted_list(photo.captions[0]) + (
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


def quoted_list(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'
