"""What is worth knowing before a run: findings on the photos and on memory, time and disk. Nothing is refused here.

    look_at(photos, ...) -> a PhotoCheck each
    check(settings, ...) -> Report: photos, the prediction, what is free, and findings as data

A finding is one sentence with a severity. Those on the run's texts are gathered in text_findings.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageFilter

from coeffdiff import backbone, estimate, sampling
from coeffdiff.config import PLACEHOLDER, Settings, with_values
from coeffdiff.console import duration, visible
from coeffdiff.data.class_captions import class_captions
from coeffdiff.data.latents import cache_folder
from coeffdiff.data.photos import Photo, PhotoSet, captions_for, fill, orientation_of, turned, view_of
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.method.token import announce_tokens
from coeffdiff.noise import schedule_findings
from coeffdiff.speed import half_precision
from coeffdiff.tokens import caption_findings, holds, token_findings

Severity = Literal["note", "hint", "problem"]
GIB = 2**30

# Of 15 photographs (three sets of DreamBooth's, 512 px) and 20 renders (64 px), all sharp, the softest had 6.3; none
# blurred by 1.5 pixels or more had above 1.8, and of those blurred by one pixel all but fur and a patterned teapot
# were below 3. Plain variance cannot tell them apart: a sharp smooth render had 5, a blurred plush animal 224.
SOFT = 3.0
# Bits of 64 in which hashes differ. Of the same sets: recompressed, halved, brightened or trimmed by 2 % at most 12
# and mostly below 7; two different photos of a subject at least 15.
NEARLY_EQUAL = 10
_FEW_VIEWS = 5  # times that each photo is seen in a run
_LISTED = 12  # findings of one kind that are said one by one


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
    prediction: estimate.Prediction
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


def check(
    settings: Settings,
    photos: PhotoSet,
    base: Any,
    device: torch.device,
    *,
    budget_seconds: float,
    free: Free | None = None,
    on_photo: Callable[[int], None] = lambda done: None,
    class_pictures: PhotoSet | None = None,
) -> Report:
    """Everything at once.

    Args:
        settings: without "auto"; subject.token may be missing. base: from find_backbone.
        budget_seconds: how long operations may be timed; 0: no time is predicted.
        free: what is free; None: measured here.
        on_photo: told how many photos have been looked at.
        class_pictures: of prior.images, whose captions are read too.
    """
    looked = look_at(settings, photos.photos, base, on_photo)
    arguments: dict[str, Any] = {"process_bytes": process_bytes()}
    free = free or what_is_free(settings, device)  # before trials, whose memory the process keeps
    prediction = estimate.predict(
        settings, base, photos.photos, device, budget_seconds=budget_seconds, **arguments
    )
    tight = prediction.peak_bytes > free.memory
    remedies = (
        tuple(find_remedies(settings, base, photos.photos, device, free.memory, **arguments)) if tight else ()
    )
    findings = (
        *photo_findings(looked, settings),
        *text_findings(settings, looked, base, class_pictures),
        *warmup_findings(settings),
        *model_findings(settings, base),
        *run_findings(settings, prediction, free, remedies),
    )
    return Report(tuple(looked), prediction, free, remedies, findings)


# --- photos ----------------------------------------------------------------------------------------------------


def look_at(
    settings: Settings,
    photos: Sequence[Photo],
    base: Any,
    on_photo: Callable[[int], None] = lambda done: None,
) -> list[PhotoCheck]:
    """Every photo as the run will use it. Raises: ConfigError for an unknown placeholder in a caption."""
    subject, resolution = settings.subject, int(settings.training.resolution)
    step = backbone.bucket_step(base, resolution)
    token = subject.token or PLACEHOLDER
    seen: list[tuple[str, int]] = []
    result = []
    for number, photo in enumerate(photos, 1):
        view = view_of(
            photo,
            resolution=resolution,
            step=step,
            crop=settings.photos.crop,
            flip=False,
            seed=settings.training.seed,
            augmentation=0,
        )
        grey = small_grey(photo, max(resolution // 2, 32))
        bits = difference_hash(grey)
        name = photo.path.name
        captions = captions_for(photo, subject.templates, token, subject.class_word)
        own_mask = photo.mask is not None and photo.mask.path == photo.path
        result.append(
            PhotoCheck(
                name=name,
                width=photo.width,
                height=photo.height,
                sharpness=round(detail(grey), 2),
                hash=f"{bits:016x}",
                duplicates=tuple(
                    other for other, hashed in seen if (hashed ^ bits).bit_count() <= NEARLY_EQUAL
                ),
                bucket=view.size,
                cut=round(1 - math.prod(view.size) / math.prod(view.resized), 4),
                enlarged=round(max(view.resized[0] / photo.width, view.resized[1] / photo.height), 3),
                captions=captions,
                own_caption=photo.caption is not None,
                token_in_captions=all(holds(caption, token) for caption in captions),
                mask="alpha channel" if own_mask else photo.mask.path.name if photo.mask else None,
            )
        )
        seen.append((name, bits))
        on_photo(number)
    return result


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


def photo_findings(looked: Sequence[PhotoCheck], settings: Settings) -> list[Finding]:
    """What may spoil a subject: few, soft, small, equal or cut photos."""
    resolution = int(settings.training.resolution)
    findings = []
    if len(looked) == 1:
        sentence = "one photo alone: its background and pose will be learned with the subject; three to six are usual"
        findings.append(Finding("hint", "photos", sentence))
    training = settings.training
    samples = int(training.steps) * int(training.batch_size) * int(training.accumulate)
    if samples < _FEW_VIEWS * len(looked):
        times = f"{samples / len(looked):.1f} times"
        sentence = f"{len(looked)} photos and {samples} samples a process: each is seen {times}"
        advice = "more steps, or fewer photos, teach more"
        if len(looked) == 1:
            sentence, advice = f"it is seen {times} in this run", "more steps teach more"
        findings.append(Finding("hint", "photos", f"{sentence}; {advice}"))
    for photo in looked:
        if photo.enlarged > 1:
            severity: Severity = "problem" if photo.enlarged > 2 else "hint"
            size = f"{photo.width} x {photo.height}"
            sentence = f"{size} pixels are enlarged {photo.enlarged:.1f} times for {resolution} px"
            findings.append(
                Finding(severity, photo.name, f"{sentence}: detail that it lacks is learned as blur")
            )
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
            findings.append(
                Finding("hint", photo.name, f"{sentence}; what they share is learned as the subject")
            )
    return findings


def text_findings(
    settings: Settings, looked: Sequence[PhotoCheck], base: Any, class_pictures: PhotoSet | None = None
) -> list[Finding]:
    """What is odd about token, class word and captions. The one place where such findings are added."""
    subject = settings.subject
    findings = []
    if not subject.token:
        sentence = "there is no --token yet, so captions are shown with <V> in its place"
        findings.append(Finding("note", "token", sentence))
    if not subject.class_word:
        sentence = (
            "without --class-word the model is not told what kind of thing this is. DreamBooth's authors "
            "measured a subject fidelity (DINO) of 0.744 with the right class noun, 0.303 without"
        )
        findings.append(Finding("hint", "class word", sentence))
    outline = backbone.load_pipeline(base, dtype=torch.float32, parts=())  # tokenizers and scheduler alone
    if subject.token:
        token = subject.token
        for sentence in token_findings(outline, token, subject.class_word, learned=settings.learns_token):
            findings.append(Finding("note", "token", sentence))
        named = {photo.name: photo.captions for photo in looked}
        for sentence in caption_findings(named, token):
            findings.append(Finding("hint", "captions", sentence))
        if settings.learns_token and not any(
            holds(text, token) for texts in named.values() for text in texts
        ):
            sentence = (
                f"none holds the token {token}, so there is nothing to learn it from; training refuses this"
            )
            findings.append(Finding("problem", "captions", sentence))
    findings += _length_findings(settings, looked, outline, class_pictures)
    return findings


def _length_findings(
    settings: Settings, looked: Sequence[PhotoCheck], outline: Any, class_pictures: PhotoSet | None
) -> list[Finding]:
    """A hint for each text of the run that the model does not read to its end: captions and validation prompts."""
    token = settings.subject.token or PLACEHOLDER
    if settings.learns_token and settings.subject.token:
        announce_tokens(outline, {token: settings.method.token.vectors})
    captions = [photo.captions for photo in looked]
    of_class: dict[str, str] = {}
    of_pictures: list[tuple[str, ...]] = []
    if settings.prior.weight and settings.subject.token:
        of_class, of_pictures = class_captions(settings, captions, class_pictures)
    word = settings.subject.class_word
    prompts = [fill(prompt, token, word) for prompt in settings.validation.prompts]
    texts = [text for some in (*captions, of_class.values(), *of_pictures, prompts) for text in some]
    warned = [line for text in dict.fromkeys(texts) for line in sampling.length_warnings(text, outline)]
    findings = [Finding("hint", "captions", line.removesuffix(".")) for line in warned[:_LISTED]]
    if len(warned) > _LISTED:
        findings.append(Finding("hint", "captions", f"and {len(warned) - _LISTED} more texts are too long"))
    return findings


def warmup_findings(settings: Settings) -> list[Finding]:
    """A warm-up that takes the whole run, so that the learning rate that was asked for is never used."""
    training = settings.training
    warmup, steps = training.warmup_steps, int(training.steps)
    if warmup < steps:
        return []
    share = steps / warmup if warmup else 0
    sentence = (
        f"the warm-up takes {warmup} steps and the run has {steps}: the learning rate reaches {share:.0%} of what was "
        "asked for, and only at its end; lower training.warmup_steps, or train longer"
    )
    return [Finding("hint", "schedule", sentence)]


_USUAL_RATES = 0.5  # above it nothing was ever seen to learn; ours and others' lie between 1e-5 and 3e-2


def model_findings(settings: Settings, base: Any) -> list[Finding]:
    """What will keep this model from learning: its noise schedule, and rates far beyond any that are usual."""
    scheduler = backbone.load_pipeline(base, dtype=torch.float32, parts=()).scheduler
    loss_scheduler = DDPMScheduler.from_config(scheduler.config)
    findings = [Finding("hint", "model", sentence) for sentence in schedule_findings(loss_scheduler)]
    method = settings.method
    sections = (("coeff", method.coeff), ("lora", method.lora), ("token", method.token))
    # "auto", where nothing was resolved, is never too high
    rates = {name: section.learning_rate for name, section in sections if section.learning_rate != "auto"}
    for name, rate in ((name, float(rate)) for name, rate in rates.items()):
        trained = settings.learns_token if name == "token" else name in method.kind
        if trained and rate > _USUAL_RATES:
            sentence = (
                f"method.{name}.learning_rate {rate:g} is far above the usual 1e-5 to 3e-2: the loss "
                "will hardly stay finite"
            )
            findings.append(Finding("problem", "rate", sentence))
    return findings


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'


# --- the run ---------------------------------------------------------------------------------------------------


def find_remedies(
    settings: Settings,
    base: Any,
    photos: Sequence[Photo],
    device: torch.device,
    free_bytes: int,
    *,
    process_bytes: int,
) -> list[Remedy]:
    """Switches that lower the peak, each alone and then together, with the peak that each predicts."""
    candidates = _candidates(settings, base, device)
    remedies = []
    together: dict[str, Any] = {}
    for switch, values in (*candidates.items(), ("all of these", together)):
        try:
            changed = with_values(settings, values)
            peak = estimate.predict(changed, base, photos, device, process_bytes=process_bytes).peak_bytes
        except ConfigError:  # a resolution below the model's smallest
            continue
        together |= values if switch not in ("all of these", _NO_PICTURES) else {}
        remedies.append(Remedy(switch, peak, peak <= free_bytes))
    return remedies


_NO_PICTURES = "validation.prompts=[] (no validation pictures)"


def _candidates(settings: Settings, base: Any, device: torch.device) -> dict[str, dict[str, Any]]:
    training = settings.training
    batch, accumulate = int(training.batch_size), int(training.accumulate)
    resolution, precision = int(training.resolution), training.precision
    found: dict[str, dict[str, Any]] = {}
    if not training.gradient_checkpointing:
        found["training.gradient_checkpointing=true"] = {"training.gradient_checkpointing": True}
    if batch > 1:
        values = {"training.batch_size": 1, "training.accumulate": batch * accumulate}
        found[" ".join(f"{name}={value}" for name, value in values.items())] = values
    if precision == "no":
        half = half_precision(device.type)
        found[f"training.precision={half}"] = {"training.precision": half}
    if settings.validation.prompts:
        found[_NO_PICTURES] = {"validation.prompts": []}
    lower = max(
        64 if resolution > 256 else 8, resolution * 3 // 4 // 64 * 64 if resolution > 256 else resolution // 2
    )
    if lower >= 32 and lower % 8 == 0:
        found[f"--resolution {lower}"] = {"training.resolution": lower}
    return found


def run_findings(
    settings: Settings, prediction: estimate.Prediction, free: Free, remedies: Iterable[Remedy] = ()
) -> list[Finding]:
    """Memory, time and disk, each in a sentence."""
    peak, device = prediction.peak_bytes, "GPU" if prediction.device == "cuda" else prediction.device
    phases = ", ".join(f"{name} {_gib(size)}" for name, size in prediction.phases.items())
    said = f"about {_gib(peak)} at most ({phases}), {_gib(free.memory)} are free"
    findings = []
    if peak <= 0.85 * free.memory:
        findings.append(Finding("note", "memory", said))
    else:
        # The prediction may be a fifth too high or too low
        surely = peak > 1.2 * free.memory
        verdict = (
            f"this surely does not fit on this {device}" if surely else f"it may not fit on this {device}"
        )
        switches = ", ".join(
            f"{remedy.switch}: {_gib(remedy.peak_bytes)}{'' if remedy.fits else ' (not enough)'}"
            for remedy in remedies
        )
        sentence = f"{said}: {verdict}" + (f". With {switches}" if switches else "")
        findings.append(Finding("problem" if surely else "hint", "memory", sentence))
    if prediction.device != "cpu" and prediction.ram_bytes > free.ram:
        sentence = f"reading the model takes {_gib(prediction.ram_bytes)} of RAM, {_gib(free.ram)} are free"
        findings.append(Finding("hint", "memory", sentence))
    if prediction.seconds:
        parts = ", ".join(f"{name} {duration(taken)}" for name, taken in prediction.seconds.items())
        total = duration(sum(prediction.seconds.values()))
        sentence = f"about {total} ({parts}; {prediction.seconds_a_step:.2g} s a step)"
        if prediction.device == "cpu" and _is_busy():
            sentence += "; other programs are busy here, so it may take several times as long"
        findings.append(Finding("note", "time", sentence))
    findings += _disk_findings(settings, prediction, free)
    return findings


def _disk_findings(settings: Settings, prediction: estimate.Prediction, free: Free) -> list[Finding]:
    needed = {name: size for name, size in prediction.disk.items() if size}
    run = sum(needed.get(name, 0) for name in ("checkpoints", "adapter", "pictures"))
    parts = ", ".join(f"{name} {_size(size)}" for name, size in needed.items())
    total = _size(sum(needed.values()))
    about = total if total == _NEXT_TO_NOTHING else f"about {total}"
    findings = [Finding("note", "disk", f"{about} ({parts}), {_size(free.output)} are free")]
    if run > free.output:
        sentence = (
            f"the run needs {_size(run)} and its disk has {_size(free.output)} left; give another --output"
        )
        findings = [Finding("problem", "disk", sentence)]
    if needed.get("cache", 0) > free.cache:
        sentence = (
            f"encoded photos need {_size(needed['cache'])} and {cache_folder(settings.photos)} has "
            f"{_size(free.cache)} left: they will be encoded anew in every run, unless photos.cache is moved"
        )
        findings.append(Finding("hint", "disk", sentence))
    return findings


def what_is_free(settings: Settings, device: torch.device) -> Free:
    """Memory and disk that this run may take here."""
    ram = free_ram()
    memory = ram + process_bytes()
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    output = Path("runs") if settings.output == "auto" else Path(settings.output)
    return Free(memory, ram, _free_disk(output), _free_disk(cache_folder(settings.photos)))


def _is_busy() -> bool:
    """Whether more wants to run than there are processors, this process apart."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] - 1 > (os.cpu_count() or 1) / 2


def process_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_ram() -> int:
    """What the system can still give to a process: the machine's, or less where a control group allows less."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_group_limits()])


def _group_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """What the control groups (of version 1 or 2) above this process have left, in bytes; containers limit so."""
    found = []
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top, limit, used = root, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            folder = top / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group == top.parent:
                    break
                with suppress(OSError, ValueError):  # "max": no limit
                    found.append(max(0, int((group / limit).read_text()) - _in_use(group, used)))
    return found


def _in_use(group: Path, used: str) -> int:
    """Without the pages of files that the system would give back."""
    statistics = dict(
        line.split() for line in (group / "memory.stat").read_text().splitlines() if " " in line
    )
    files = statistics.get("total_inactive_file") or statistics.get("inactive_file") or 0
    return int((group / used).read_text()) - int(files)


def _free_disk(path: Path) -> int:
    """Of the disk where a path is or will be; without limit if that cannot be told."""
    path = path.expanduser().absolute()
    for existing in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(existing).free
    return 2**63


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 10 * GIB else f"{size / GIB:.2f} GiB"


_NEXT_TO_NOTHING = "under 1 MiB"


def _size(size: float) -> str:
    return (
        f"{size / GIB:.1f} GiB"
        if size >= GIB
        else f"{size / 2**20:.0f} MiB"
        if size >= 2**20
        else _NEXT_TO_NOTHING
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
            if counts[finding.severity] > _LISTED:
                continue
            said.append(f"{finding.severity:8s} {finding.subject} {finding.sentence}")
        elif finding.severity == "note":
            said.append(f"{finding.subject:8s} {finding.sentence}")
        else:
            said.append(f"{finding.severity:8s} {finding.subject}: {finding.sentence}")
    left = sum(max(0, count - _LISTED) for count in counts.values())
    return said + (
        [f"         and {left} more findings on photos: coeffdiff check lists them all"] if left else []
    )


def table(report: Report, photos: PhotoSet) -> list[str]:
    """The whole report for a terminal, whatever files are called: a line a photo, then every finding."""
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
