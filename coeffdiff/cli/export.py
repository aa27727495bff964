"""coeffdiff export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coeffdiff.cli.adapters import adapters_and_scales
from coeffdiff.cli.options import PATH, ResultAsJson, expanded_text
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import print_info, print_json, print_result

Layout = Literal["kohya"]


@app.command()
@answering
def export(
    adapter: Annotated[
        str,
        typer.Argument(
            parser=expanded_text,
            metavar="ADAPTER",
            help="Run or adapter folder, RUN@STEP, or user/repo on the Hub.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file to write, such as ohwx.safetensors.", **PATH)],
    to: Annotated[
        Layout,
        typer.Option(help="kohya: the LoRA for A1111, Forge, InvokeAI, SD.Next and ComfyUI's own loader."),
    ] = "kohya",
    as_json: ResultAsJson = False,
) -> None:
    """The LoRA of an adapter as a file for other tools; a learned token goes into embeddings/ beside it."""
    _check_file(output)
    from coeffdiff.hosts.kohya import export_kohya
    from coeffdiff.training.kohya_facts import kohya_facts
    from coeffdiff.utils.launch_environment import forget_launch

    forget_launch()
    [(folder, _)] = adapters_and_scales([adapter], with_scales=False)
    done = export_kohya(folder, output, kohya_facts(folder))
    for sentence in done.left_out:
        print_info(f"warning  {sentence}")
    if as_json:
        embeddings = [str(file) for file in done.embeddings]
        files: dict[str, Any] = {"lora": str(done.lora), "embedding": next(iter(embeddings), None)}
        files |= {"embeddings": embeddings} if len(embeddings) > 1 else {}
        print_json({"layout": to, **files, "left_out": list(done.left_out)})
        return
    for file in done.embeddings:
        name = file.stem
        print_info(
            f"token    {file}: put it into the tool's embeddings folder, and write {name!r} in prompts "
            f"(embedding:{name} in ComfyUI)"
        )
    if done.header.recommended_scale != 1:
        print_info(f"strength {done.header.recommended_scale:g} is what the adapter recommends")
    print_result(str(done.lora))


def _check_file(output: Path) -> None:
    """Raises: ConfigError for a name that other tools would not list."""
    if output.is_dir():
        raise ConfigError(
            f"--output {output} is a folder, and a file is wanted; name {output / 'lora.safetensors'}."
        )
    if output.suffix != ".safetensors":
        raise ConfigError(
            f"--output {output} must end in .safetensors, as other tools list such files alone."
        )
