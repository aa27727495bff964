"""coeffdiff inspect"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coeffdiff.cli.adapters import adapters_and_scales
from coeffdiff.cli.options import PATH, expanded_text
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import AdapterError
from coeffdiff.utils.console import print_json, print_result, print_table
from coeffdiff.utils.output_folder import check_output, refuse_unwritable

if TYPE_CHECKING:
    from coeffdiff.evaluation.inspection import Inspection


AdapterFolder = Annotated[
    str | None,
    typer.Argument(
        parser=expanded_text,
        metavar="ADAPTER",
        help="Run or adapter folder, RUN@STEP, or user/repo on the Hub. (default: newest finished run)",
    ),
]
Output = Annotated[Path | None, typer.Option(help="Folder for a picture of all alphas as heat maps.", **PATH)]
Heads = Annotated[int, typer.Option(min=1, help="How many of the most recombined heads to list.")]
AllAsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.")]


@app.command()
@answering
def inspect(
    adapter: AdapterFolder = None, output: Output = None, heads: Heads = 10, as_json: AllAsJson = False
) -> None:
    """What an adapter holds and how far it moved from the base model; loads no model."""
    check_output(output)
    from coeffdiff.evaluation.inspection import inspect_adapter
    from coeffdiff.evaluation.inspection_tables import tables
    from coeffdiff.utils.launch_environment import forget_launch

    forget_launch()
    [(folder, _)] = adapters_and_scales([adapter] if adapter else None, with_scales=False)
    if output:
        refuse_unwritable(output)
    found = inspect_adapter(folder)
    file = _save_heat_maps(found, folder, output) if output else None
    if as_json:
        print_json(found.as_json() | {"heat_maps": str(file) if file else None})
        return
    print_table(tables(found, heads))
    if file:
        print_result(str(file))


def _save_heat_maps(found: Inspection, adapter: Path, output: Path) -> Path:
    """Raises: AdapterError if the adapter has no alpha."""
    if not found.deviations:
        raise AdapterError(f"{adapter} is of kind {found.header.kind}: it has no alpha to draw.")
    from coeffdiff.evaluation.heatmap import draw_heat_maps
    from coeffdiff.utils.png import free_name, save_png

    maps = {layer: deviation.numpy() for layer, deviation in found.deviations.items()}
    title = f"alpha of {' and '.join(found.header.tokens)} ({adapter})"[:100]
    file = free_name(output / "alpha.png")
    save_png(draw_heat_maps(maps, title, found.taken), file)
    return file
