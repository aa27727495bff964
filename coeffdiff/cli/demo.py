"""coeffdiff demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.options import PATH, Method, ResultAsJson
from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import duration, print_info, print_json, print_result
from coeffdiff.utils.output_folder import check_output


@app.command()
@answering
def demo(
    output: Annotated[
        Path | None, typer.Option(help="Output folder. (default: demo, or the next free)", **PATH)
    ] = None,
    subject: Annotated[str, typer.Option(help="The made-up subject to learn.")] = "grey_sloth_plushie",
    method: Annotated[Method, typer.Option(help="What is trained.")] = "coeff+lora",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of training and of the pictures.")] = 0,
    as_json: ResultAsJson = False,
) -> None:
    """Photos, training and pictures on the small model that is included: no network, no GPU, a few minutes."""
    check_output(output)
    from coeffdiff.demo import GUIDANCE, readable_size
    from coeffdiff.demo import demo as run_demo

    result = run_demo(output, subject=subject, method=method, steps=steps, seed=seed)
    if as_json:
        print_json(vars(result), default=str)
        return
    word = result.class_word
    print_info(f"done in {duration(result.seconds)}")
    print_info(f"photos   {result.photos}")
    print_info(
        f"adapter  {result.adapter} ({readable_size(result.adapter_bytes)}, the only thing to keep or share)"
    )
    print_info(f"pictures {result.pictures}, each with its recipe; all in one, to be opened first:")
    print_result(str(result.figure))
    print_info(
        *f"""
More of these:
    coeffdiff sample --adapter {result.run} --prompt "a photo of <V> {word} at night" --guidance {GUIDANCE:g} -n 4
With your own photos, and SDXL in place of the small model (a download of 7 GB, and a GPU to be quick):
    coeffdiff train --images YOUR_PHOTOS/ --token ohwx --class-word "stuffed animal"
    coeffdiff sample --prompt "a photo of <V> stuffed animal in the snow" -n 4""".split("\n")
    )
