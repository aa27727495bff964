"""Findings on memory, time and disk, and the options that would help."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coeffdiff.errors import ConfigError
from coeffdiff.preflight.memory_options import MemoryOption
from coeffdiff.preflight.prediction import Prediction
from coeffdiff.preflight.report import Finding, Free, Remedy
from coeffdiff.utils.console import duration
from coeffdiff.utils.sizes import UNDER_ONE_MIB, in_gib, readable_size


def find_remedies(
    options: Sequence[MemoryOption], peak_with: Callable[[Mapping[str, Any]], int], free_bytes: int
) -> list[Remedy]:
    """What each option lowers the peak to, alone and then all together but for the one without pictures.

    peak_with: predicts the peak in bytes with other values of settings, by dotted name. Raises: ConfigError for
        values that cannot be, such as a resolution below the model's smallest; such an option is left out.
    """
    remedies = []
    together: dict[str, Any] = {}
    candidates = [(option.named(), option.values) for option in options if option.predicted]
    for name, values in (*candidates, ("all of these", together)):
        try:
            peak = peak_with(values)
        except ConfigError:
            continue
        if name != "all of these" and "validation.prompts" not in values:
            together |= values
        remedies.append(Remedy(name, peak, peak <= free_bytes))
    return remedies


def run_findings(
    prediction: Prediction, free: Free, remedies: Sequence[Remedy] = (), *, cache: Path
) -> list[Finding]:
    """Memory, time and disk, each in a sentence. cache: the folder of encoded photos."""
    return [
        *_memory_findings(prediction, free, remedies),
        *_time_findings(prediction),
        *_disk_findings(prediction, free, cache),
    ]


def _memory_findings(prediction: Prediction, free: Free, remedies: Sequence[Remedy]) -> list[Finding]:
    peak, device = prediction.peak_bytes, "GPU" if prediction.device == "cuda" else prediction.device
    phases = ", ".join(f"{name} {in_gib(size)}" for name, size in prediction.phases.items())
    needed = f"about {in_gib(peak)} at most ({phases}), {in_gib(free.memory)} are free"
    findings = []
    if peak <= 0.85 * free.memory:
        findings.append(Finding("note", "memory", needed))
    else:
        # The prediction may be a fifth too high or too low
        too_large = peak > 1.2 * free.memory
        verdict = f"will not fit on this {device}" if too_large else f"may not fit on this {device}"
        options = ", ".join(
            f"{remedy.switch}: {in_gib(remedy.peak_bytes)}{'' if remedy.fits else ' (not enough)'}"
            for remedy in remedies
        )
        sentence = f"{needed}: it {verdict}" + (f". With {options}" if options else "")
        findings.append(Finding("problem" if too_large else "hint", "memory", sentence))
    if prediction.device != "cpu" and prediction.ram_bytes > free.ram:
        sentence = (
            f"reading the model takes {in_gib(prediction.ram_bytes)} of RAM, {in_gib(free.ram)} are free"
        )
        findings.append(Finding("hint", "memory", sentence))
    return findings


def _time_findings(prediction: Prediction) -> list[Finding]:
    if not prediction.seconds:
        return []
    parts = ", ".join(f"{name} {duration(taken)}" for name, taken in prediction.seconds.items())
    total = duration(sum(prediction.seconds.values()))
    sentence = f"about {total} ({parts}; {prediction.seconds_a_step:.2g} s a step)"
    if prediction.device == "cpu" and _is_busy():
        sentence += "; other programs are busy here, so it may take several times as long"
    return [Finding("note", "time", sentence)]


def _disk_findings(prediction: Prediction, free: Free, cache: Path) -> list[Finding]:
    needed = {name: size for name, size in prediction.disk.items() if size}
    run = sum(needed.get(name, 0) for name in ("checkpoints", "adapter", "pictures"))
    parts = ", ".join(f"{name} {readable_size(size)}" for name, size in needed.items())
    total = readable_size(sum(needed.values()))
    about = total if total == UNDER_ONE_MIB else f"about {total}"
    findings = [Finding("note", "disk", f"{about} ({parts}), {readable_size(free.output)} are free")]
    if run > free.output:
        left = readable_size(free.output)
        sentence = f"the run needs {readable_size(run)} and its disk has {left} left; give another --output"
        findings = [Finding("problem", "disk", sentence)]
    if needed.get("cache", 0) > free.cache:
        sentence = (
            f"encoded photos need {readable_size(needed['cache'])} and {cache} has {readable_size(free.cache)} left: "
            "they will be encoded again in every run, unless photos.cache names another folder"
        )
        findings.append(Finding("hint", "disk", sentence))
    return findings


def _is_busy() -> bool:
    """Whether more wants to run than there are processors, this process apart."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] - 1 > (os.cpu_count() or 1) / 2
