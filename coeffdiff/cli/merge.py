"""coeffdiff merge"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.adapters import folder_and_scale
from coeffdiff.cli.options import NAME, PATH, expanded_text
from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import print_info, print_json, print_result
from coeffdiff.utils.output_folder import check_output


@app.command()
@answering
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            parser=expanded_text,
            metavar="DIR[:SCALE]...",
            help="Run or adapter folders, RUN@STEP, or user/repo on the Hub.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the merged adapter.", **PATH)],
    model: Annotated[
        str | None, typer.Option(help="Base model, where the adapters name different ones.", **NAME)
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="VAE, where the adapters name different ones; none: the model's own.", **NAME),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print its header as JSON on stdout.")] = False,
) -> None:
    """One adapter that does what several do together: coeff = I + the sum of scale x alpha, LoRAs added up."""
    check_output(output)
    from coeffdiff.hosts.merging import merge_adapters
    from coeffdiff.utils.launch_environment import forget_launch

    forget_launch()
    vae = os.path.abspath(vae) if vae and Path(vae).is_dir() else vae  # noqa: PTH100
    header = merge_adapters([*map(folder_and_scale, adapters)], output, model, vae)
    if as_json:
        print_json({"adapter": str(output), "header": header.model_dump(mode="json")})
        return
    for part in header.merged:
        print_info(f"part     {part.token} x {part.scale:g} ({part.kind}, {part.trained_steps} steps)")
    print_result(str(output))
