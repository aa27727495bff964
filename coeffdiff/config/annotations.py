"""Sections and fields of a tree of settings, read from its annotations."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of a tree of sections by dotted name, depth first."""
    for name, field in section.model_fields.items():
        if (below := section_of(field)) is not None:
            yield from fields_of(below, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """The section that a field holds; None for a setting."""
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def union_members(annotation: Any) -> list[Any]:
    """The members of a union, each without its Annotated; other types are their own only member."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for member in get_args(annotation) for part in union_members(member)]
    return [annotation]
