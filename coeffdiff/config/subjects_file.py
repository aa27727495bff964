"""A file of --subjects: a YAML list, each item a subject; its paths are relative to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def settings_of_subjects(file: Path) -> dict[str, Any]:
    """The settings that a file of subjects stands for, by dotted name.

    Raises: ConfigError, with file and line, for a file that holds anything but subjects with images.
    """
    listed, lines = read_yaml(file, "file of subjects")
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{file} should hold a list of subjects, such as {_EXAMPLE}.")
    entries = [_entry(file, number, item, lines) for number, item in enumerate(listed, 1)]
    if len(entries) > 1:
        return {"subjects": entries}
    return {_ALONE[name]: value for name, value in entries[0].items() if value is not None}


def _entry(file: Path, number: int, item: Any, lines: dict[str, int]) -> dict[str, Any]:
    """One subject as plain values, its paths from the file's folder on."""
    if not isinstance(item, dict):
        raise ConfigError(f"{file}: subject {number} is not a subject's settings; write {_EXAMPLE}.")
    places = {name: f"{file}, line {lines.get(f'[{number}].{name}', '?')}" for name in item}
    for name in item:
        if name not in SubjectEntry.model_fields:
            fields = ", ".join(SubjectEntry.model_fields)
            raise ConfigError(f"{places[name]}: a subject has no setting {name}; it has {fields}.")
    given = {name: value for name, value in item.items() if value is not None}
    entry = checked_tree(SubjectEntry, given, places)
    if entry.images is None:
        raise ConfigError(f"{file}: subject {number} has no images, the folder with its photos.")
    plain = as_tree(entry)
    for name in ("images", "prior_images"):
        if plain[name] is not None:
            plain[name] = str(file.parent / plain[name])  # an absolute path stays as it is
    return plain
