"""What is said of a setting that cannot be: what was found, what is wanted, an example.

Everything is made of the field itself, so that no words of pydantic's reach a person.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from coeffdiff.config.synonyms import nearest


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of a tree of sections by dotted name, depth first."""
    for name, field in section.model_fields.items():
        if (below := section_of(field)) is not None:
            yield from fields_of(below, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def parts(annotation: Any) -> list[Any]:
    """The members of a union, each with what Annotated says of it taken off; choices are Literal members."""
    if get_origin(annotation) is Annotated:
        return parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for member in get_args(annotation) for part in parts(member)]
    return [annotation]


def sentence(kind: type[BaseModel], problem: Mapping[str, Any], source: str, more: list[str]) -> str:
    """One of a ValidationError's problems for a person.

    source: where the setting was said.  more: names that are known besides those of `kind`.
    """
    fields = dict(fields_of(kind))
    where = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return _unknown(_down_to_a_setting(".".join(where), problem["input"]), kind, [*fields, *more], source)
    dotted, given = ".".join(where), problem["input"]
    while dotted not in fields and "." in dotted and _section_at(kind, dotted) is None:
        dotted = dotted.rpartition(".")[0]  # members of a union and items of a list are appended to the name
    field, section = fields.get(dotted), _section_at(kind, dotted)
    shown = (
        ""
        if isinstance(given, dict | BaseModel) and problem["type"] == "value_error"
        else f" (given: {said(given)})"
    )
    name = f"{dotted}{shown}: " if dotted else ""
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])
        asks = re.match(r"(it |each )?must ", reason) and field
        return f"{source}: {name}{reason}{f', such as {_example(field)}' if field and asks else ''}."
    if field is None:
        inside = next(fields_of(section or kind), ("steps", None))[0]
        return f"{source}: {name}it is a section, with settings in it, such as {dotted}.{inside}."
    wanted = " or ".join(_words(field.annotation, field.metadata))
    if "text" in wanted and type(given) in (int, float, bool):
        example = _example(field)
        quoted = example if example.startswith("[") else json.dumps(example, ensure_ascii=False)
        return f"{source}: {name}it must be {wanted}; quotes make it text, such as {dotted}: {quoted}."
    finite = "finite, and " if problem["type"] == "finite_number" else ""
    return f"{source}: {name}it must be {finite}{wanted}, such as {dotted}: {_example(field)}."


def said(value: Any) -> str:
    """A value as a person wrote it, at most so long as a line."""
    if value is None or isinstance(value, bool):
        text = {None: "nothing", True: "true", False: "false"}[value]
    elif isinstance(value, dict | BaseModel):
        text = "a section"
    elif isinstance(value, list):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def listed(names: list[str], last: str = "or") -> str:
    return f" {last} ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _unknown(dotted: str, kind: type[BaseModel], known: list[str], source: str) -> str:
    near, above = nearest(dotted, known), dotted.rpartition(".")[0]
    inside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == above]
    if near:
        hint = f"Did you mean {listed(near)}?"
        if "epoch" in dotted.lower():
            hint += " Steps are counted, a batch each; there are no epochs."
    elif above and inside:
        hint = f"{above} has {', '.join(inside)}."
    else:
        hint = f"The sections are {', '.join(kind.model_fields)}."
    return f"Unknown setting {dotted} in {source}. {hint}"


def _down_to_a_setting(dotted: str, given: Any) -> str:
    """A section that there is not, with the first setting that it was to hold: the whole name tells more."""
    while isinstance(given, dict) and given:
        inner, given = next(iter(given.items()))
        dotted = f"{dotted}.{inner}"
    return dotted


def _section_at(kind: type[BaseModel], dotted: str) -> type[BaseModel] | None:
    for name in dotted.split("."):
        if (below := section_of(kind.model_fields.get(name))) is None:
            return None
        kind = below
    return kind


def _words(annotation: Any, limits: list[Any]) -> list[str]:
    """What each member of a union asks for."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _words(inner, [*limits, *(m for one in more for m in getattr(one, "metadata", [one]))])
    if get_origin(annotation) in (Union, UnionType):
        return [word for member in get_args(annotation) for word in _words(member, limits)]
    if get_origin(annotation) is Literal:
        return [listed([str(choice) for choice in get_args(annotation)])]
    if annotation is type(None):
        return ["null"]
    if get_origin(annotation) is list:
        [items] = _words(get_args(annotation)[0], [])
        return [f"a list of {_MANY.get(items.split(' (')[0], items)}{_range([*limits, *_inner(annotation)])}"]
    return [f"{_ONE.get(annotation, 'settings by their names')}{_range(limits)}"]


_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path (text)"}
_MANY = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}


def _inner(annotation: Any) -> list[Any]:
    """What is asked of each item of a list."""
    return [m for one in getattr(get_args(annotation)[0], "__metadata__", ()) for m in one.metadata]


def _range(limits: list[Any]) -> str:
    found = [
        f"{words} {_round(bound)}{' long' if name.endswith('length') else ''}"
        for limit in limits
        for name, words in _LIMITS.items()
        if (bound := getattr(limit, name, None)) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


_LIMITS = {
    "ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "at least", "max_length": "at most",
}  # fmt: skip


def _round(bound: Any) -> str:
    power = re.fullmatch(r"0b10{20,}", bin(bound)) if isinstance(bound, int) else None
    return f"2^{bound.bit_length() - 1}" if power else f"{bound:g}"


def _example(field: FieldInfo) -> str:
    """An example of the field's own, or its default, or something of its kind, as YAML."""
    default = field.default
    if field.examples:
        value = field.examples[0]
    elif default not in (None, "auto", [], {}):
        value = default
    else:
        kinds = parts(field.annotation)
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        value = next((_OF_A_KIND[kind] for kind in kinds if kind in _OF_A_KIND), (choices or ["text"])[-1])
        value = [value] if any(get_origin(kind) is list for kind in kinds) else value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


_OF_A_KIND: dict[Any, Any] = {bool: True, int: 1, float: 0.001, Path: "photos/", str: "text"}
