"""The custom node for ComfyUI, and the file that ComfyUI loads when this folder lies in its custom_nodes.

Two ways to have it there: a copy that `coeffdiff comfyui install` made, which holds the parts of the package that the
node needs in a folder `coeffdiff` beside this file; or a link to this folder, with coeffdiff installed by pip.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the node. The node's own imports wait until here: ComfyUI is there then."""
    _find_package(Path(__file__).resolve().parent)
    return import_module("coeffdiff.hosts.comfyui.node").CoeffdiffExtension()


def _find_package(here: Path) -> None:
    """Let `import coeffdiff` find the copy beside this file, where there is one. An imported coeffdiff stays."""
    if "coeffdiff" in sys.modules or not (here / "coeffdiff" / "__init__.py").is_file():
        return
    sys.path.insert(0, str(here))
    try:
        import_module("coeffdiff")
    finally:
        sys.path.remove(str(here))
