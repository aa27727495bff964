"""Settings from a YAML file, flags and --set: defaults < YAML < flags < --set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from coeffdiff.config import yaml12
from coeffdiff.config.annotations import fields_of, union_members
from coeffdiff.config.fields import S
from coeffdiff.config.nested import as_tree, by_name, dotted_settings, flattened, put_setting
from coeffdiff.config.refusals import refusal_sentence
from coeffdiff.config.schema import Settings
from coeffdiff.errors import ConfigError


def load_settings(
    file: Path | None = None, flags: dict[str, Any] | None = None, assignments: Iterable[str] = ()
) -> Settings:
    """Settings from a YAML file, then flags (dotted name -> value, None is skipped), then `a.b=c` assignments.

    Raises: ConfigError, naming the key and, for an unknown one, the nearest that exists.
    """
    return load_section(Settings, file, flags, assignments)


def load_names(file: Path | None, flags: dict[str, Any], assignments: Iterable[str]) -> Settings:
    """Of the settings that are given only output and subjects, which name a run; the others may need the run's own."""
    flat, lines = _merged(Settings, file, flags, assignments)
    named = {name: value for name, value in flat.items() if name.startswith(("output", "subject"))}
    return checked_tree(Settings, named, lines)


def load_section(
    kind: type[S],
    file: Path | None = None,
    flags: dict[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> S:
    """Like load_settings, for any other tree of sections that a command is configured by."""
    flat, lines = _merged(kind, file, flags, assignments)
    return checked_tree(kind, flat, lines)


def given_settings(
    stored: Settings, file: Path | None, flags: dict[str, Any], assignments: Iterable[str] = ()
) -> dict[str, Any]:
    """Only the settings that are given, as dotted name -> checked value, defaults that are given included.

    stored: settings that they go on top of, without which some would have no meaning.
    Raises: ConfigError.
    """
    flat, lines = _merged(Settings, file, flags, assignments)
    whole = flattened(as_tree(stored))
    for name, value in flat.items():
        put_setting(whole, name, value)
    checked = by_name(checked_tree(Settings, whole, lines))
    # A part of a mapping may be given too
    return {
        name: value
        for name, value in checked.items()
        if any(f"{name}.".startswith(f"{given}.") or given.startswith(f"{name}.") for given in flat)
    }


def _merged(
    kind: type[BaseModel], file: Path | None, flags: dict[str, Any] | None, assignments: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The last value of each setting by dotted name, and the lines of those that come from the file."""
    tree, lines = _read_yaml(file) if file else ({}, {})
    flat: dict[str, Any] = {}
    for name, value in sorted(dotted_settings(kind, tree), key=lambda leaf: leaf[0].count(".")):
        try:
            put_setting(flat, name, value)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
    given = [(name, value) for name, value in (flags or {}).items() if value is not None]
    for assignment in assignments:
        name, separator, text = (part.strip() for part in assignment.partition("="))
        if not separator or not name:
            raise ConfigError(
                f"{assignment!r} is not of the form name=value, such as {next(iter(dict(fields_of(kind))))}=..."
            )
        value = _assigned(kind, name, text)
        given += dotted_settings(kind, {name: value}) if isinstance(value, dict) else [(name, value)]
    for name, value in given:
        put_setting(flat, name, value)
        for line in [line for line in lines if line == name or line.startswith(f"{name}.")]:
            del lines[line]
    return flat, {name: f"{file}, line {line}" for name, line in lines.items()}


def _assigned(kind: type[BaseModel], name: str, text: str) -> Any:
    """The value of a text after `--set name=`; a setting that holds text gets the text as it stands."""
    own, trained = dict(fields_of(kind)), fields_of(Settings)
    field = own.get(name) or next((field for end, field in trained if name.endswith(f".{end}")), None)
    kinds = union_members(field.annotation) if field else []
    items = [inner for one in kinds if get_origin(one) is list for inner in union_members(get_args(one)[0])]
    try:
        value = yaml12.value(text)
    except yaml12.DuplicateKey as duplicate:
        raise ConfigError(f"--set {name}: {duplicate.name} is there twice; keep one of them.") from None
    if str in items and isinstance(value, str) and text.startswith("["):
        raise ConfigError(
            f"--set {name} (given: {text[:200]!r}) is no list that can be read: put quotes around each text that has "
            f'one of , # : [ ] {{ }} in it, such as {name}=["dog #2", "cat"].'
        )
    wants_text = {str, Path}.intersection(kinds) and not {int, float, bool}.intersection(kinds)
    if (str in items and not isinstance(value, list)) or wants_text:
        nothing = value is None and (type(None) in kinds or not text)
        return value if nothing or (isinstance(value, str) and text[0] in "\"'") else text
    return value


def checked_tree(kind: type[S], flat: dict[str, Any], lines: dict[str, str]) -> S:
    """A validated copy. Raises: ConfigError with one sentence for the first thing that is wrong."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        section = tree
        for parent in above:
            section = section.setdefault(parent, {})
        section[last] = value
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # The inner members of a union each report; an unknown key is the most useful one to report first.
        order = ["extra_forbidden", "value_error"]
        problem = min(error.errors(), key=lambda p: order.index(p["type"]) if p["type"] in order else 9)
        raise ConfigError(refusal_sentence(kind, problem, _where(problem, lines), _names_in(kind))) from None


def _where(problem: Any, lines: dict[str, str]) -> str:
    """The file and line of what is wrong; of several settings that do not go together, one that the error names."""
    place = [str(part) for part in problem["loc"]]
    below = [name for name in lines if name.startswith("".join(f"{part}." for part in place))]
    if problem["type"] == "extra_forbidden" and below:
        return lines[below[0]]
    if problem["type"] == "value_error" and isinstance(problem["input"], dict | BaseModel):
        words = re.findall(r"\w+", str(problem["ctx"]["error"]))
        return next((lines[name] for name in below if name.rpartition(".")[2] in words), "the settings")
    while place and ".".join(place) not in lines:
        inside = [name for name in lines if name.startswith(".".join([*place, ""]))]
        if isinstance(problem["input"], dict) and inside:  # a mapping where a value is wanted
            return lines[inside[0]]
        place.pop()
    return lines.get(".".join(place), "the settings")


def _names_in(kind: type[BaseModel]) -> list[str]:
    """Settings of training that a plan can give for all of its arms."""
    return [f"settings.{name}" for name, _ in fields_of(Settings)] if "settings" in kind.model_fields else []


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree in a file, and the lines of its settings by dotted name."""
    tree, lines = read_yaml(file, "settings file")
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} should hold settings such as `training: {{steps: 500}}`, not a {type(tree).__name__}."
        )
    return tree, lines


def read_yaml(file: Path, what: str) -> tuple[Any, dict[str, int]]:
    """A file's document, and the lines of its settings by dotted name; what: the file in words.

    Raises: ConfigError if it cannot be read, or is no YAML.
    """
    try:
        return yaml12.read(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no {what} {file}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The {what} {file} cannot be read: {error}.") from None
    except yaml12.DuplicateKey as duplicate:
        raise ConfigError(
            f"{file} says {duplicate.name} twice, in line {duplicate.first} and in line {duplicate.second}; keep "
            "one of them, with all that is to count."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{file}{where} is not valid YAML: {problem}.") from None
    except RecursionError:  # a thousand brackets
        raise ConfigError(f"{file} is not valid YAML: nested too deeply.") from None
