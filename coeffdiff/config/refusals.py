"""Sentences on settings that are refused: what was found, what is expected, an example.

They are made of the field itself, so that the user sees no words of pydantic's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from coeffdiff.config.annotations import fields_of, section_of, union_members
from coeffdiff.config.synonyms import nearest

# Words for types, for lists of them, and for the limits of pydantic's fields; and an example of each type
_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path (text)"}
_MANY = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}
_LIMITS = {
    "ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "at least", "max_length": "at most",
}  # fmt: skip
_EXAMPLES: dict[Any, Any] = {bool: True, int: 1, float: 0.001, Path: "photos/", str: "text"}


def refusal_sentence(kind: type[BaseModel], problem: Mapping[str, Any], source: str, more: list[str]) -> str:
    """One of a ValidationError's problems as a sentence for the user.

    source: where the setting comes from.  more: names that are known besides those of `kind`.
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
        else f" (given: {as_written(given)})"
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


def as_written(value: Any) -> str:
    """A value as the user wrote it, cut at 200 characters."""
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
    """ "a, b or c"."""
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
    """The name of an unknown section with the first setting in it, which tells more than the section alone."""
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
    """What each member of a union expects, in words."""
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


def _inner(annotation: Any) -> list[Any]:
    """The limits of each item of a list."""
    return [m for one in getattr(get_args(annotation)[0], "__metadata__", ()) for m in one.metadata]


def _range(limits: list[Any]) -> str:
    limits_in_words = [
        f"{words} {_round(bound)}{' long' if name.endswith('length') else ''}"
        for limit in limits
        for name, words in _LIMITS.items()
        if (bound := getattr(limit, name, None)) is not None
    ]
    return f" ({', '.join(limits_in_words)})" if limits_in_words else ""


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
        kinds = union_members(field.annotation)
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        value = next((_EXAMPLES[kind] for kind in kinds if kind in _EXAMPLES), (choices or ["text"])[-1])
        value = [value] if any(get_origin(kind) is list for kind in kinds) else value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
