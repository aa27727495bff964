"""coeffdiff compare"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from coeffdiff.cli.app import answering, app
from coeffdiff.cli.listings import print_settings
from coeffdiff.cli.options import NAME, PATH, BaseModel, NumbersAsJson, expanded_path
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import print_json, print_result, print_text
from coeffdiff.utils.output_folder import check_output


@app.command()
@answering
def compare(
    plan: Annotated[
        Path | None,
        typer.Argument(
            parser=expanded_path,
            metavar="[PLAN.yaml]",
            help="What is to be compared. (default: base, lora, coeff, coeff+lora)",
        ),
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(
            help="dev, eval or fresh:N of pocket's own; or a folder of photos or of such folders.", **NAME
        ),
    ] = None,
    model: BaseModel = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Only this arm of the plan and its reference; repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="A,B,...", help="Of training. (default: 0,1)")] = None,
    class_word: Annotated[
        str | None, typer.Option(help="What the subjects are, where no list of classes says it.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=B", help="Anything else of the plan; repeatable.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the comparison; what it holds is not computed again.", **PATH)
    ] = Path("comparison"),
    part: Annotated[
        str,
        typer.Option(
            metavar="K/N",
            help="Only every N-th subject and seed, for machines that share no folder.",
        ),
    ] = "1/1",
    pack: Annotated[
        bool, typer.Option("--pack", help="At the end fold the cells into one file, cells/PLAN.jsonl.")
    ] = False,
    as_json: NumbersAsJson = False,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", help="Print everything that a plan may say.")
    ] = False,
) -> None:
    """Train and score several methods on the same subjects; resumes, and processes may be started side by side."""
    from coeffdiff.config.loading import load_section
    from coeffdiff.evaluation.compare import compare as run_comparison
    from coeffdiff.evaluation.comparison_plan import Comparison
    from coeffdiff.evaluation.comparison_text import as_text

    if list_settings:
        print_settings(Comparison)
        return
    check_output(output)
    flags = {
        "subjects": subjects,
        "model.name": model,
        "class_word": class_word,
        "seeds": [_whole(text, "--seeds") for text in seeds.split(",")] if seeds else None,
    }
    asked = load_section(Comparison, plan, flags, set_ or ())
    pack_as = (plan.stem if plan else "comparison") if pack else None
    outcome = run_comparison(asked.only(arm) if arm else asked, output, _part(part), pack_as=pack_as)
    if as_json:
        print_json(outcome.results)
        return
    print_text(as_text(outcome.results))
    print_result(str(outcome.report))


def _whole(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers with commas between them, not {text!r}.") from None


def _part(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part takes a share such as 1/4, 2/4, 3/4 or 4/4, not {text!r}.")
    return int(match[1]), int(match[2])
