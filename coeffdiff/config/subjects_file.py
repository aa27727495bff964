"""A file of --subjects: a YAML list, each item a subject; its paths are relative to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from coeffdiff.config.loading import checked_tree, read_yaml
from coeffdiff.config.nested import as_tree
from coeffdiff.config.schema import SubjectEntry
from coeffdiff.errors import ConfigError

_EXAMPLE = "`- {images: mug/, token: ohwx, class_word: mug}` in a line for each"
# A subject that is alone is an ordinary run's
_ALONE = {
    "images": "subject.images",
    "token": "subject.token",
    "class_word": "subject.class_word",
    "templates": "subject.templates",
    "prior_images": "prior.images",
}

E = TypeVar("E", bound=SubjectEntry)


def settings_of_subjects(file: Path) -> dict[str, Any]:
    """The settings that a file of subjects stands for, by dotted name.

    Raises: ConfigError, with file and line, for a file that holds anything but subjects with images.
    """
    read = [entry for entry, _ in read_entries(file, SubjectEntry)]
    if len(read) > 1:
        return {"subjects": [as_tree(entry) for entry in read]}
    return alone(read[0])


def alone(entry: SubjectEntry) -> dict[str, Any]:
    """The settings of an ordinary run that an entry stands for, by dotted name."""
    values = as_tree(entry)
    return {setting: values[name] for name, setting in _ALONE.items() if values[name] is not None}


def read_entries(file: Path, kind: type[E]) -> list[tuple[E, dict[str, str]]]:
    """The entries of a file of subjects, their paths from the file's folder on; with each, the file and line of what it
    says, by name.

    Raises: ConfigError, with file and line, for a file that holds anything but such entries with images.
    """
    listed, lines = read_yaml(file, "file of subjects")
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{file} should hold a list of subjects, such as {_EXAMPLE}.")
    return [_entry(file, number, item, lines, kind) for number, item in enumerate(listed, 1)]


def _entry(
    file: Path, number: int, item: Any, lines: dict[str, int], kind: type[E]
) -> tuple[E, dict[str, str]]:
    if not isinstance(item, dict):
        raise ConfigError(f"{file}: subject {number} is not a subject's settings; write {_EXAMPLE}.")
    own = f"[{number}]."
    places = {
        name.removeprefix(own): f"{file}, line {n}" for name, n in lines.items() if name.startswith(own)
    }
    for name in item:
        if name not in kind.model_fields:
            fields, place = ", ".join(kind.model_fields), places.get(name, file)
            raise ConfigError(f"{place}: a subject has no setting {name}; it has {fields}.")
    entry = checked_tree(kind, {name: value for name, value in item.items() if value is not None}, places)
    if entry.images is None:
        raise ConfigError(f"{file}: subject {number} has no images, the folder with its photos.")
    # An absolute path stays as it is
    folders = {name: getattr(entry, name) for name in ("images", "prior_images")}
    found = {name: file.parent / folder for name, folder in folders.items() if folder is not None}
    return entry.model_copy(update=found), places
