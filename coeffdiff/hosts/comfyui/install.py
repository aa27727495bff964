"""The node's folder in a ComfyUI's custom_nodes: a copy of the node and of the parts of the package that it needs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import coeffdiff
from coeffdiff.errors import ConfigError
from coeffdiff.utils.atomic import atomic_write, sweep
from coeffdiff.utils.output_folder import write_errors

NAME = "coeffdiff"
_NODE = Path(__file__).resolve().parent
_PACKAGE = _NODE.parents[1]
_NODE_FILE = Path("coeffdiff", "hosts", "comfyui", "node.py")  # by which a copy of ours is known
_PARTS = ("__init__.py", "errors.py", "utils", "method", "hosts/__init__.py", "hosts/comfyui")
_BESIDE = ("__init__.py", "README.md", "icon.png", "workflow.png", "side_by_side.png", "example_workflows")
_NOT_COPIED = shutil.ignore_patterns(
    "__pycache__", "*.png", "*.md", "*.toml", "example_workflows", "install.py"
)


def install(comfyui: Path) -> tuple[Path, bool]:
    """Write custom_nodes/coeffdiff, atomically; what an earlier call wrote is replaced. Make models/coeffdiff.

    comfyui: ComfyUI's folder, or the base folder of ComfyUI Desktop.
    Returns: the folder, and whether it was there before.
    Raises: ConfigError for a folder that is no ComfyUI or an old one, or where something else has the name.
    """
    parent = custom_nodes_of(comfyui)
    final = parent / NAME
    if final.is_symlink():
        raise ConfigError(
            f"{final} is a link to {final.resolve()}. Remove the link, or keep it and install coeffdiff by pip there."
        )
    there = final.exists()
    if there and not (final / _NODE_FILE).is_file():
        raise ConfigError(
            f"{final} is not what this command writes, so it stays as it is. Move it away and run the command again."
        )
    with write_errors(f"The folder {final}"), atomic_write(final) as temporary:
        write_node(temporary)
        # For adapters, before ComfyUI starts with the node for the first time
        (parent.parent / "models" / NAME).mkdir(parents=True, exist_ok=True)
    sweep(parent, older_than=3600)
    return final, there


def write_node(folder: Path) -> None:
    """The node's folder as ComfyUI and its registry want it, into a new folder."""
    folder.mkdir()
    for name in _BESIDE:
        _copy(_NODE / name, folder / name)
    text = (_NODE / "pyproject.toml").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^version = .*$", f'version = "{coeffdiff.__version__}"', text)
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    for name in _PARTS:
        _copy(_PACKAGE / name, folder / NAME / name)


def custom_nodes_of(comfyui: Path) -> Path:
    """The custom_nodes of a ComfyUI. Raises: ConfigError if the folder is none, which says what it is."""
    if not comfyui.is_dir():
        what = "is a file" if comfyui.exists() else "does not exist"
        raise ConfigError(
            f"{comfyui} {what}; name ComfyUI's folder, the one that holds main.py and custom_nodes."
        )
    if (comfyui / "comfy" / "sd.py").is_file():
        _check_version(comfyui)
    elif not all((comfyui / name).is_dir() for name in ("custom_nodes", "models", "user")):
        near = next(
            (p for p in (comfyui / "ComfyUI", *comfyui.parents) if (p / "comfy" / "sd.py").is_file()), None
        )
        hint = f" Did you mean {near}?" if near else ""
        raise ConfigError(
            f"{comfyui} is no ComfyUI: it has no comfy/sd.py, and it is not the base folder of ComfyUI Desktop (with "
            f"custom_nodes, models and user).{hint}"
        )
    return comfyui / "custom_nodes"


def _check_version(comfyui: Path) -> None:
    if (comfyui / "comfy_api" / "v0_0_2").is_dir():
        return
    file = comfyui / "comfyui_version.py"
    found = re.search(r'"([\d.]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    raise ConfigError(
        f"{comfyui} is ComfyUI {found[1] if found else 'of an old version'}, which cannot load this node (it has no "
        "comfy_api/v0_0_2). Update ComfyUI to 0.3.64 or newer."
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=_NOT_COPIED if source.name != "example_workflows" else None)
    else:
        shutil.copyfile(source, target)
