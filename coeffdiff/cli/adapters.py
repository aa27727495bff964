"""Adapters, scales and steps, as options name them."""

from __future__ import annotations

import math
import re
from pathlib import Path

from coeffdiff.errors import AdapterError, ConfigError
from coeffdiff.hosts.hub.address import hub_address
from coeffdiff.sampling.selection import Selection
from coeffdiff.utils.console import print_info

RUNS = Path("runs")


def select_adapters(
    given: list[str] | None, scales: tuple[float | None, ...], *, checkpoints: bool, compiled: bool
) -> Selection:
    """What --adapter, --scales and --checkpoints select. scales: from parse_scales.

    Raises: AdapterError for an adapter or run that is not there; ConfigError for options that exclude each other.
    """
    if not checkpoints:
        return Selection(tuple(adapters_and_scales(given)), scales)
    if scales != (None,):
        raise ConfigError("--checkpoints draws each step at one scale; leave --scales out.")
    if compiled:
        raise ConfigError("--checkpoints changes what would be compiled at each step; leave --compile out.")
    return _every_step(given)


def _every_step(given: list[str] | None) -> Selection:
    """All steps that one run keeps, at one scale."""
    from coeffdiff.sampling.runs import find_newest_run, steps_of

    if given == ["none"] or len(given or ()) > 1:
        raise ConfigError("--checkpoints draws the steps of one run: name it, alone, with --adapter RUN.")
    path, scale = folder_and_scale(given[0]) if given else (str(find_newest_run(RUNS)), None)
    _, kept = steps_of(path)
    return Selection(tuple((folder, scale) for folder in kept.values()), steps=tuple(kept))


def parse_scales(text: str | None, adapters: list[str] | None) -> tuple[float | None, ...]:
    """--scales: those that everything is drawn at; (None,) without, for each adapter at its own."""
    if text is None:
        return (None,)
    if adapters == ["none"]:
        raise ConfigError(
            "--scales needs an adapter, and --adapter none is the bare model; leave one of them out."
        )
    if adapters and folder_and_scale(adapters[0])[1] is not None:
        raise ConfigError(
            f"--scales takes the place of the first adapter's own scale, and --adapter {adapters[0]} has one; "
            "leave one of them out."
        )
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"--scales takes numbers with commas between them, such as 0,0.5,1; not {text!r}.")
    return tuple(dict.fromkeys(found))


def adapters_and_scales(given: list[str] | None, with_scales: bool = True) -> list[tuple[Path, float | None]]:
    """Adapter folders, those of the Hub fetched, and scales; the newest finished run's where none is given."""
    from coeffdiff.sampling.runs import find_newest_run

    if given == ["none"] and with_scales:
        return []
    if not given:
        run = find_newest_run(RUNS)
        print_info(f"run      {run} (the newest finished one)")
        return [(run / "adapter", None)]
    from coeffdiff.hosts.hub.lookup import resolve_adapter

    pairs = map(folder_and_scale, given) if with_scales else [(folder, None) for folder in given]
    return [(resolve_adapter(folder), scale) for folder, scale in pairs]


def folder_and_scale(text: str) -> tuple[str, float | None]:
    """ "runs/sks:0.6" -> ("runs/sks", 0.6); no scale where a path of this very name exists."""
    folder, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists() or scale.startswith("//"):  # hf://user/repo
        return text, None
    try:
        return folder, float(scale)
    except ValueError:
        here = Path(folder).exists() or Path(re.sub(r"@\w+$", "", folder)).is_dir()
        if here or hub_address(folder):
            raise AdapterError(f"{text}: the scale {scale!r} is not a number.") from None
        return text, None
