"""Whether memory, time and disk suffice, and which options would help."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values
from coeffdiff.data.latent_cache import cache_folder
from coeffdiff.data.photos import Photo
from coeffdiff.errors import ConfigError
from coeffdiff.preflight.prediction import Prediction, predict
from coeffdiff.preflight.report import NEXT_TO_NOTHING, Finding, Free, Remedy, in_gib, readable_size
from coeffdiff.utils.console import duration
from coeffdiff.utils.torch_setup import half_precision


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
            peak = predict(changed, base, photos, device, process_bytes=process_bytes).peak_bytes
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
    settings: Settings, prediction: Prediction, free: Free, remedies: Iterable[Remedy] = ()
) -> list[Finding]:
    """Memory, time and disk, each in a sentence."""
    peak, device = prediction.peak_bytes, "GPU" if prediction.device == "cuda" else prediction.device
    phases = ", ".join(f"{name} {in_gib(size)}" for name, size in prediction.phases.items())
    said = f"about {in_gib(peak)} at most ({phases}), {in_gib(free.memory)} are free"
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
            f"{remedy.switch}: {in_gib(remedy.peak_bytes)}{'' if remedy.fits else ' (not enough)'}"
            for remedy in remedies
        )
        sentence = f"{said}: {verdict}" + (f". With {switches}" if switches else "")
        findings.append(Finding("problem" if surely else "hint", "memory", sentence))
    if prediction.device != "cpu" and prediction.ram_bytes > free.ram:
        sentence = (
            f"reading the model takes {in_gib(prediction.ram_bytes)} of RAM, {in_gib(free.ram)} are free"
        )
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


def _disk_findings(settings: Settings, prediction: Prediction, free: Free) -> list[Finding]:
    needed = {name: size for name, size in prediction.disk.items() if size}
    run = sum(needed.get(name, 0) for name in ("checkpoints", "adapter", "pictures"))
    parts = ", ".join(f"{name} {readable_size(size)}" for name, size in needed.items())
    total = readable_size(sum(needed.values()))
    about = total if total == NEXT_TO_NOTHING else f"about {total}"
    findings = [Finding("note", "disk", f"{about} ({parts}), {readable_size(free.output)} are free")]
    if run > free.output:
        left = readable_size(free.output)
        sentence = f"the run needs {readable_size(run)} and its disk has {left} left; give another --output"
        findings = [Finding("problem", "disk", sentence)]
    if needed.get("cache", 0) > free.cache:
        sentence = (
            f"encoded photos need {readable_size(needed['cache'])} and {cache_folder(settings.photos)} has "
            f"{readable_size(free.cache)} left: they will be encoded anew in every run, unless photos.cache is moved"
        )
        findings.append(Finding("hint", "disk", sentence))
    return findings


def _is_busy() -> bool:
    """Whether more wants to run than there are processors, this process apart."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] - 1 > (os.cpu_count() or 1) / 2
