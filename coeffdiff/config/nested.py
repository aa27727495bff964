"""Settings as nested dicts, and as flat ones by dotted name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel

from coeffdiff.config.annotations import section_of
from coeffdiff.config.fields import Section
from coeffdiff.errors import ConfigError


def as_tree(settings: Section) -> dict[str, Any]:
    """The settings as plain values (paths as text), ready for YAML and JSON."""
    return settings.model_dump(mode="json")


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as one level: dotted name -> value. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def dotted_settings(
    kind: type[BaseModel], tree: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The settings of a nested dict by dotted name. Empty sections are left out."""
    for name, value in tree.items():
        section, free = section_at(kind, name)
        if section and isinstance(value, dict):
            yield from dotted_settings(section, value, f"{prefix}{name}.")
        elif value is not None or not (section or free):
            yield f"{prefix}{name}", value


def by_name(settings: Section) -> dict[str, Any]:
    """Every setting by dotted name; one that holds a mapping is one setting, with all of it as its value."""
    return dict(dotted_settings(type(settings), as_tree(settings)))


def put_setting(flat: dict[str, Any], name: str, value: Any) -> None:
    """Set a value by dotted name, in place of an earlier one and of all below it; a name may lead into a mapping.

    Raises: ConfigError if a part of the name is a setting that holds no mapping.
    """
    for other in [other for other in flat if other == name or other.startswith(f"{name}.")]:
        del flat[other]
    above = next((other for other in flat if name.startswith(f"{other}.")), None)
    if above is None:
        flat[name] = value
        return
    if not isinstance(flat[above], dict):
        raise ConfigError(f"{name} cannot be set: {above} is not a section.")
    flat[above] = dict(flat[above])
    put_setting(flat[above], name[len(above) + 1 :], value)


def section_at(kind: type[BaseModel], dotted: str) -> tuple[type[BaseModel] | None, bool]:
    """The section of that name, if it is one; and whether it is a setting that holds a mapping."""
    section: type[BaseModel] | None = kind
    field = None
    for name in dotted.split("."):
        field = section.model_fields.get(name) if section else None
        section = section_of(field)
    return section, field is not None and get_origin(field.annotation) is dict
