"""Adapters, scales and steps, as options name them."""

from __future__ import annotations

import math
import re
from pathlib import Path

from coeffdiff.errors import AdapterError, ConfigError
from coeffdiff.utils.console import print_info


def parse_scales(text: str | None, adapters: list[str] | None) -> list[float | None]:
    """The scales that everything is drawn at; [None] for each adapter at its own."""
    if text is None:
        return [None]
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
    return list(dict.fromkeys(found))


def steps_by_number(
    given: list[str] | None, scales: str | None, compiled: bool
) -> tuple[dict[int, Path], float | None]:
    """The adapters of one run by step, and the scale for all of them."""
    from coeffdiff.sampling.runs import find_newest_run
    from coeffdiff.sampling.steps import steps_of

    if scales is not None or compiled:
        other = "--scales" if scales is not None else "--compile"
        why = (
            "draws each step at one scale"
            if scales is not None
            else "changes what would be compiled at each step"
        )
        raise ConfigError(f"--checkpoints {why}; leave {other} out.")
    if given == ["none"] or len(given or ()) > 1:
        raise ConfigError("--checkpoints draws the steps of one run: name it, alone, with --adapter RUN.")
    path, scale = folder_and_scale(given[0]) if given else (str(find_newest_run(Path("runs"))), None)
    return steps_of(path)[1], scale


def adapters_and_scales(given: list[str] | None, with_scales: bool = True) -> list[tuple[Path, float | None]]:
    """Folders and scales; without any, the newest finished run."""
    from coeffdiff.sampling.runs import find_newest_run

    if given == ["none"] and with_scales:
        return []
    if not given:
        run = find_newest_run(Path("runs"))
        print_info(f"run      {run} (the newest finished one)")
        return [(run / "adapter", None)]
    from coeffdiff.method.adapter_paths import find_adapter

    pairs = map(folder_and_scale, given) if with_scales else [(folder, None) for folder in given]
    return [(find_adapter(folder), scale) for folder, scale in pairs]


def folder_and_scale(text: str) -> tuple[str, float | None]:
    folder, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, None
    try:
        return folder, float(scale)
    except ValueError:
        if Path(folder).exists() or Path(re.sub(r"@\w+$", "", folder)).is_dir():
            raise AdapterError(f"--adapter {text}: the scale {scale!r} is not a number.") from None
        return text, None
