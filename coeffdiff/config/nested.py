"""Settings as nested and flat dicts: laid into each other, read out of each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel

from coeffdiff.config.fields import Section
from coeffdiff.config.refusals import section_of
from coeffdiff.errors import ConfigError


def as_tree(settings: Section) -> dict[str, Any]:
    """The settings as plain values (paths as text), ready for YAML and JSON."""
    return settings.model_dump(mode="json")


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as one level: dotted name -> value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def leaves_of(kind: type[BaseModel], tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a tree by dotted name. A section with nothing in it says nothing."""
    for name, value in tree.items():
        section, free = what_is_at(kind, name)
        if section and isinstance(value, dict):
            yield from leaves_of(section, value, f"{prefix}{name}.")
        elif value is not None or not (section or free):
            yield f"{prefix}{name}", value


def lay_value(flat: dict[str, Any], name: str, value: Any) -> None:
    """Put a setting in the place of what was said of it and of all in it; names may go on inside of a mapping."""
    for other in [other for other in flat if other == name or other.startswith(f"{name}.")]:
        del flat[other]
    above = next((other for other in flat if name.startswith(f"{other}.")), None)
    if above is None:
        flat[name] = value
        return
    if not isinstance(flat[above], dict):
        raise ConfigError(f"{name} cannot be set: {above} is not a section.")
    flat[above] = dict(flat[above])
    lay_value(flat[above], name[len(above) + 1 :], value)


def what_is_at(kind: type[BaseModel], dotted: str) -> tuple[type[BaseModel] | None, bool]:
    """The section of that name, or whether it is a setting that is a mapping."""
    section: type[BaseModel] | None = kind
    field = None
    for name in dotted.split("."):
        field = section.model_fields.get(name) if section else None
        section = section_of(field)
    return section, field is not None and get_origin(field.annotation) is dict
