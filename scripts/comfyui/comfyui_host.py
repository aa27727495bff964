"""ComfyUI in this process, on a CPU, for tests and pictures: found by the environment variable COMFYUI.

torchvision and torchaudio are not installed for it: where they do not exist, stand-ins take their place. Nothing that
SDXL computes calls them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

_STANDINS = ("torchvision", "torchvision.transforms", "torchaudio", "torchaudio.transforms")


def comfyui_folder() -> Path | None:
    """The folder of ComfyUI that COMFYUI names, None where it names none."""
    folder = os.environ.get("COMFYUI")
    return Path(folder) if folder and Path(folder, "comfy", "sd.py").is_file() else None


def version(folder: Path) -> str:
    scope: dict[str, str] = {}
    exec((folder / "comfyui_version.py").read_text(encoding="utf-8"), scope)
    return scope["__version__"]


def put_on_path(folder: Path) -> None:
    """Let this process import ComfyUI, as on a machine without a GPU."""
    add_standins()
    sys.path.insert(0, str(folder))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def add_standins() -> None:
    """transformers is imported first: it would take the stand-ins for the real libraries."""
    from transformers import CLIPTokenizer

    assert CLIPTokenizer
    for name in _STANDINS:
        library = name.partition(".")[0]
        if library in sys.modules or importlib.util.find_spec(library) is None:
            sys.modules.setdefault(name, _standin(name))


def _standin(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    module.__getattr__ = _any_class  # type: ignore[method-assign]
    return module


def _any_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
