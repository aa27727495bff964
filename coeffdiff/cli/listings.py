"""Options that print a list and end: settings, schedulers."""

from __future__ import annotations

import json
from typing import Any

import typer

from coeffdiff.utils.console import print_text


def list_settings_and_exit(wanted: bool) -> None:
    if wanted:
        from coeffdiff.config.schema import Settings

        print_settings(Settings)
        raise typer.Exit


def list_schedulers_and_exit(wanted: bool) -> None:
    if wanted:
        from coeffdiff.sampling.sampler_names import table

        print_text("\n".join(table()))
        raise typer.Exit


def print_settings(kind: Any) -> None:
    from coeffdiff.config.documentation import documented_settings

    for setting in documented_settings(kind):
        print_text(f"{setting.name}  [{json.dumps(setting.default, default=str)}]\n    {setting.description}")
