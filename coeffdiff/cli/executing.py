"""Options of commands whose work can be shared: which part of it, and by whom it is done."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from coeffdiff.cli.options import parsed_by
from coeffdiff.errors import ConfigError
from coeffdiff.execution.choosing import ExecutorName


def parse_part(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4). Raises: ConfigError for a part that is not one of the whole."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part takes a share such as 1/4, 2/4, 3/4 or 4/4, not {text!r}.")
    return int(match[1]), int(match[2])


ExecutorOption = Annotated[
    ExecutorName,
    typer.Option("--executor", help="local: this process. ray: workers of a Ray cluster (coeffdiff\\[ray])."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Of Ray, each with a GPU, or a core where there is none. (default: all GPUs, or 1)"
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Of a cluster that exists; auto: the one of this machine. (default: RAY_ADDRESS, or one made here)"
    ),
]
Part = Annotated[
    Any,
    typer.Option(
        parser=parsed_by(parse_part),
        metavar="K/N",
        help="Only every N-th subject (in a comparison, every N-th subject and seed), as in a SLURM array.",
    ),
]
