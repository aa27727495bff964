"""An adapter as something to look at and to take away: its table, a zip, a file for other tools."""

from __future__ import annotations

import shutil
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.inspection import inspect_adapter
from coeffdiff.evaluation.inspection_tables import tables
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.hosts.kohya import export_kohya
from coeffdiff.method.adapter_paths import run_of
from coeffdiff.training.kohya_facts import kohya_facts
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import recording_console

_HTML = '<pre class="inspection">{code}</pre>'
_WIDTH = 110
_MADE = "made-"
_HOUR = 3600  # seconds


@dataclass(frozen=True)
class Files:
    """files: to download. notes: sentences on what they cannot carry, and how they are used."""

    files: list[Path]
    notes: list[str]


def table_of(adapter: str) -> str:
    """What `coeffdiff inspect` prints, as HTML."""
    console = recording_console(_WIDTH)
    console.print(tables(inspect_adapter(_folder(adapter))))
    return console.export_html(code_format=_HTML, inline_styles=True)


def zip_adapter(adapter: str, place: Path) -> Files:
    """The adapter folder as place/NAME.zip, in which it is called NAME."""
    folder = _folder(adapter)
    name = _name_of(folder)
    file = place / f"{name}.zip"
    with atomic_write(file) as temporary, _archive(temporary) as archive:
        for inside in sorted(folder.rglob("*")):
            archive.write(inside, Path(name) / inside.relative_to(folder))
    return Files([file], [f"Unpacked, the folder {name} works wherever an adapter does."])


def new_folder(place: Path) -> Path:
    """A folder in place for files that a browser takes; those that it had an hour to take are deleted."""
    for folder in place.glob(f"{_MADE}*"):
        if time.time() - folder.stat().st_mtime > _HOUR:
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=_MADE, dir=place))


def _archive(file: Path) -> zipfile.ZipFile:
    """Zip knows no dates before 1980, which files of containers may have."""
    return zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False)


def export_adapter(adapter: str, place: Path) -> Files:
    """The LoRA as place/NAME.safetensors, and learned tokens. Raises: AdapterError for what they cannot carry."""
    folder = _folder(adapter)
    done = export_kohya(folder, place / f"{_name_of(folder)}.safetensors", kohya_facts(folder))
    notes = list(done.left_out)
    notes += [f"Put {file.name} into the tool's embeddings folder." for file in done.embeddings]
    if done.header.recommended_scale != 1:
        notes.append(f"The adapter recommends the strength {done.header.recommended_scale:g}.")
    return Files([done.lora, *done.embeddings], notes)


def _folder(adapter: str) -> Path:
    if not adapter:
        raise ConfigError("Choose an adapter; there is one as soon as a training has finished.")
    return resolve_adapter(adapter)


def _name_of(folder: Path) -> str:
    """The run's name, with the step for one that the run keeps beside its result."""
    run = run_of(folder)
    if run is None:
        return folder.name
    place = (folder.parent if folder.name == "adapter" else folder).resolve()
    return run.name if place == run else f"{run.name}-{place.name}"
