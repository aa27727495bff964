"""The schema's description of each setting, for help texts and tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from coeffdiff.config.annotations import fields_of
from coeffdiff.config.schema import Settings


@dataclass(frozen=True)
class Setting:
    """One documented field: its dotted name, default value and description."""

    name: str
    default: Any
    description: str


def documented_settings(section: type[BaseModel] = Settings) -> Iterator[Setting]:
    """Every setting, depth first, for `--list-settings`."""
    for name, field in fields_of(section):
        yield Setting(name, field.default, field.description or "")
