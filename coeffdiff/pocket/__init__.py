"""pocket: a model of SDXL's architecture, small enough to ship, and the world that it knows."""

from __future__ import annotations

from pathlib import Path

from coeffdiff.errors import ModelError

POCKET, POCKET_CLIP, POCKET_DINO = "pocket", "pocket-clip", "pocket-dino"
WEIGHTS = Path(__file__).parent / "weights"


def shipped(name: str) -> Path:
    """The folder of a model in this package, in the layout of its library.

    Raises: ModelError if this copy of the package lacks it.
    """
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise ModelError(
            f"This installation of coeffdiff lacks {folder}, the weights of {name}; install it again."
        )
    return folder
