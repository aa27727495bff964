"""Checks of photos: sharpness, size, near-duplicates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter

from coeffdiff.config.schema import SubjectSettings, TrainingSettings
from coeffdiff.data.decoding import orientation_of, turned
from coeffdiff.data.photos import Photo
from coeffdiff.data.subjects import captions_of, tokens_of
from coeffdiff.data.views import Crop, View, view_of
from coeffdiff.errors import PhotoError
from coeffdiff.models.subject_token import holds
from coeffdiff.preflight.report import Finding, PhotoCheck, Severity

# Of 15 photographs (three sets of DreamBooth's, 512 px) and 20 renders (64 px), all sharp, the softest had 6.3; none
# blurred by 1.5 pixels or more had above 1.8, and of those blurred by one pixel all but fur and a patterned teapot
# were below 3. Plain variance cannot tell them apart: a sharp smooth render had 5, a blurred plush animal 224.
SOFT = 3.0
# Bits of 64 in which hashes differ. Of the same sets: recompressed, halved, brightened or trimmed by 2 % at most 12
# and mostly below 7; two different photos of a subject at least 15.
NEARLY_EQUAL = 10
FEW_VIEWS = 5  # a photo that a run sees less often than this is hardly learned


def check_photos(
    photos: Sequence[Photo],
    subjects: Sequence[SubjectSettings],
    *,
    resolution: int,
    step: int,
    crop: Crop,
    seed: int,
    on_photo: Callable[[int], None] = lambda done: None,
) -> list[PhotoCheck]:
    """Every photo as the run will use it.

    Args:
        resolution, step, crop, seed: see view_of.
        on_photo: called with the number of photos that are done.
    Raises: ConfigError for an unknown placeholder in a caption.
    """
    hashes: list[tuple[str, int]] = []
    checks = []
    captions = captions_of(subjects, photos)
    for number, photo in enumerate(photos, 1):
        token = tokens_of(subjects)[photo.subject]
        name = photo.path.name if len(subjects) == 1 else f"{photo.path.parent.name}/{photo.path.name}"
        view = view_of(
            photo, resolution=resolution, step=step, crop=crop, flip=False, seed=seed, augmentation=0
        )
        grey = small_grey(photo, max(resolution // 2, 32))
        hashed = difference_hash(grey)
        alike = tuple(name for name, other in hashes if (other ^ hashed).bit_count() <= NEARLY_EQUAL)
        found = _check(
            name,
            photo,
            view,
            captions[number - 1],
            token,
            sharpness=detail(grey),
            hashed=hashed,
            duplicates=alike,
        )
        checks.append(found)
        hashes.append((name, hashed))
        on_photo(number)
    return checks


def _check(
    name: str,
    photo: Photo,
    view: View,
    captions: tuple[str, ...],
    token: str,
    *,
    sharpness: float,
    hashed: int,
    duplicates: tuple[str, ...],
) -> PhotoCheck:
    own_mask = photo.mask is not None and photo.mask.path == photo.path
    return PhotoCheck(
        name=name,
        width=photo.width,
        height=photo.height,
        sharpness=round(sharpness, 2),
        hash=f"{hashed:016x}",
        duplicates=duplicates,
        bucket=view.size,
        cut=round(1 - math.prod(view.size) / math.prod(view.resized), 4),
        enlarged=round(max(view.resized[0] / photo.width, view.resized[1] / photo.height), 3),
        captions=captions,
        own_caption=photo.caption is not None,
        token_in_captions=all(holds(caption, token) for caption in captions),
        mask="alpha channel" if own_mask else photo.mask.path.name if photo.mask else None,
        of_subject=photo.subject,
    )


def photo_findings(checks: Sequence[PhotoCheck], training: TrainingSettings) -> list[Finding]:
    """Findings on few, soft, small, equal or cut photos."""
    samples = int(training.steps) * int(training.batch_size) * int(training.accumulate)
    subjects = sorted({check.of_subject for check in checks})
    findings: list[Finding] = []
    for number in subjects:
        own = [check for check in checks if check.of_subject == number]
        name = f"{own[0].name.rpartition('/')[0]}: " if len(subjects) > 1 else ""
        findings += _count_findings(len(own), samples / len(subjects), name)
    for check in checks:
        findings += _findings_on(check, int(training.resolution))
    return findings


def _count_findings(photos: int, samples: float, name: str) -> list[Finding]:
    """A single photo, and photos that are seen too seldom.

    samples: of a subject in the whole run, in one process. name: of its folder, where there are several.
    """
    findings = []
    if photos == 1:
        sentence = "one photo alone: its background and pose will be learned with the subject; three to six are usual"
        findings.append(Finding("hint", "photos", name + sentence))
    if samples < FEW_VIEWS * photos:
        times = f"{samples / photos:.1f} times"
        sentence = f"{photos} photos and {samples:.0f} samples a process: each is seen {times}"
        advice = "more steps, or fewer photos, teach more"
        if photos == 1:
            sentence, advice = f"it is seen {times} in this run", "more steps teach more"
        findings.append(Finding("hint", "photos", f"{name}{sentence}; {advice}"))
    return findings


def _findings_on(photo: PhotoCheck, resolution: int) -> list[Finding]:
    findings = []
    if photo.enlarged > 1:
        severity: Severity = "problem" if photo.enlarged > 2 else "hint"
        size = f"{photo.width} x {photo.height}"
        sentence = f"{size} pixels are enlarged {photo.enlarged:.1f} times for {resolution} px"
        findings.append(Finding(severity, photo.name, f"{sentence}: detail that it lacks is learned as blur"))
    if photo.sharpness < SOFT:
        sentence = f"looks blurred (sharpness {photo.sharpness:.1f}; sharp photos have {SOFT:g} and more)"
        findings.append(Finding("hint", photo.name, sentence))
    if photo.cut > 0.1:
        width, height = photo.bucket
        sentence = f"loses {photo.cut:.0%} at its borders in {width} x {height}"
        findings.append(Finding("hint", photo.name, f"{sentence}; is the subject still whole?"))
    if photo.duplicates:
        sentence = f"is nearly the same picture as {', '.join(photo.duplicates[:3])}"
        more = len(photo.duplicates) - 3
        sentence += f" and {more} more" if more > 0 else ""
        findings.append(Finding("hint", photo.name, f"{sentence}; what they share is learned as the subject"))
    return findings


def small_grey(photo: Photo, side: int) -> Image.Image:
    """A photo in grey, its longer side at most `side` pixels, decoded no larger than that needs.

    A quarter of a second for 20 megapixels becomes a tenth of that in JPEG, whose decoder can leave out detail.
    Raises: PhotoError if the file is gone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(photo.path) as image:
                if image.format not in ("JPEG", "MPO"):
                    grey = photo.open().convert("L")
                else:
                    share = 2 * side / max(image.size)
                    width, height = (max(1, int(pixels * share)) for pixels in image.size)
                    image.draft("L", (width, height))
                    grey = turned(image.convert("L"), orientation_of(image))
    except OSError as error:
        reason = error.strerror or "it can no longer be decoded"
        raise PhotoError(f"{photo.path} was checked, but can no longer be read ({reason}).") from None
    grey.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return grey


def detail(grey: Image.Image) -> float:
    """How much of a picture's finest detail a blur of one pixel takes away: the variance of its Laplacian over that
    of the blurred picture. Near 1: there was none; sharp photos have 6 and more, whatever they show.

    Source: variance of the Laplacian, Pech-Pacheco et al. 2000; comparing a picture with its own blurred copy,
    Crete et al. 2007.
    """
    blurred = grey.filter(ImageFilter.GaussianBlur(1))
    # 1: a picture of one colour has no detail to lose, and rounding to 8 bits makes some of nothing
    return (_laplacian_variance(grey) + 1) / (_laplacian_variance(blurred) + 1)


def _laplacian_variance(grey: Image.Image) -> float:
    values = np.pad(np.asarray(grey, dtype=np.float32), 1, mode="edge")
    centre = values[1:-1, 1:-1]
    around = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return float((around - 4 * centre).var())


def difference_hash(grey: Image.Image) -> int:
    """dHash of 64 bits: whether each of 8 x 8 cells is brighter than its left neighbour."""
    values = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    return int.from_bytes(np.packbits(values[:, 1:] > values[:, :-1]).tobytes(), "big")
