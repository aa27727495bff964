"""The adapters that the node offers: those below ComfyUI's folders of the kind "coeffdiff" (models/coeffdiff)."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from coeffdiff.errors import AdapterError
from coeffdiff.method.adapter_paths import COEFF_FILE, EMBEDS_FILE, LORA_FILE, find_adapter

KIND = "coeffdiff"
NONE = "none"  # what a list without adapters offers
_OF_A_RUN = ("checkpoints", "adapters", "samples")  # its steps are named RUN@STEP, not listed


def register_folder() -> None:
    """Make models/coeffdiff a folder of models, which extra_model_paths.yaml may add others to."""
    folder = Path(folder_paths.models_dir, KIND)
    folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(KIND, str(folder))


def names() -> list[str]:
    """Runs and adapter folders by their path below the kind's folders, sorted; [NONE] if there are none."""
    found = {name for root in map(Path, folder_paths.get_folder_paths(KIND)) for name in _below(root)}
    return sorted(found) or [NONE]


def chosen(adapter: str, path: str) -> Path:
    """The adapter folder that the node's two inputs name: `path`, where it is not empty, before `adapter`.

    Raises: AdapterError if there is none, which says what is there instead.
    """
    if path.strip():
        return find_adapter(path.strip().strip('"'))
    roots = [Path(root) for root in folder_paths.get_folder_paths(KIND)]
    if adapter == NONE:
        raise AdapterError(
            f"No adapter is chosen. Put a run or an adapter folder into {roots[0]} and press R, or type the path of "
            "one into the node."
        )
    for root in roots:
        if (root / adapter).exists():
            return find_adapter(root / adapter)
    return find_adapter(roots[0] / adapter)  # for RUN@STEP, and for the sentence


def fingerprint(folder: Path) -> str:
    """Changes when a file of the adapter does, so that ComfyUI loads a newly trained one."""
    files = [folder / name for name in (COEFF_FILE, LORA_FILE, EMBEDS_FILE)]
    states = [file.stat() for file in files if file.is_file()]
    return f"{folder} {[(state.st_mtime_ns, state.st_size) for state in states]}"


def _below(root: Path) -> list[str]:
    """A run by the run folder's name, though the adapter lies one folder below it."""
    found = []
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place)
        if COEFF_FILE in files and folder != root:
            found.append(folder.relative_to(root).as_posix())
            folders.clear()
        elif (folder / "adapter" / COEFF_FILE).is_file() and "config.yaml" in files:
            found.append(folder.relative_to(root).as_posix())
            folders[:] = [name for name in folders if name not in (*_OF_A_RUN, "adapter")]
    return found
