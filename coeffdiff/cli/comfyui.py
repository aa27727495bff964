"""coeffdiff comfyui install"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.options import PATH
from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import print_info, print_result

comfyui = typer.Typer(
    no_args_is_help=True,
    help="The node that loads coeffdiff's adapters in ComfyUI.",
    pretty_exceptions_enable=False,
)
app.add_typer(comfyui, name="comfyui")


@comfyui.command()
@answering
def install(
    folder: Annotated[Path, typer.Argument(help="ComfyUI's folder, which holds custom_nodes.", **PATH)],
) -> None:
    """Copy the node "Load coeffdiff adapter" into ComfyUI's custom_nodes; run again to update it."""
    from coeffdiff.hosts.comfyui.install import install as install_node

    written, there = install_node(folder)
    print_info(f"{'updated' if there else 'installed'}  restart ComfyUI; the node is under loaders.")
    print_info(f"adapters   put runs or adapter folders into {written.parents[1] / 'models' / 'coeffdiff'}")
    print_result(str(written))
