"""The run that is meant where none is named."""

from __future__ import annotations

from pathlib import Path

from coeffdiff.errors import AdapterError
from coeffdiff.method.adapter_paths import COEFF_FILE


def find_newest_run(runs: Path) -> Path:
    """The run under `runs` whose adapter is the newest. Raises: AdapterError, with what to do, if none has one."""
    finished = [file for file in runs.glob(f"*/adapter/{COEFF_FILE}") if file.is_file()]
    if finished:
        return max(finished, key=lambda file: (file.stat().st_mtime_ns, str(file))).parents[1]
    begun = sorted(config.parent for config in runs.glob("*/config.yaml"))
    if begun:
        raise AdapterError(
            f"No run under {runs} has finished yet ({', '.join(str(run) for run in begun[:3])}): continue one with "
            "coeffdiff train --resume, or name an adapter with --adapter."
        )
    raise AdapterError(
        f"There is no finished run under {runs}: train one with coeffdiff train --images photos/ --token sks, or "
        "name an adapter with --adapter (none for the bare model)."
    )
