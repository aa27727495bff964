"""A file of `batch`: a YAML list, each item a subject with a training of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coeffdiff.config.loading import checked_tree
from coeffdiff.config.nested import as_tree, dotted_settings, flattened, put_setting
from coeffdiff.config.schema import Settings
from coeffdiff.config.subject_entries import BatchEntry, can_name_a_folder
from coeffdiff.config.subjects_file import alone, read_entries
from coeffdiff.errors import ConfigError

# What an entry says beside `set`, and what the batch decides
_BESIDE = {"subject.images": "images", "subject.token": "token", "subject.class_word": "class_word"}
_BESIDE |= {"prior.images": "prior_images"}
_NOT_SET = {name: f"write {own} beside set." for name, own in _BESIDE.items()}
_NOT_SET |= {"subjects": "each subject of a batch is trained by itself.", "output": "the batch decides it."}
TASKS = "tasks"  # the folder of what each subject's training prints
_RESERVED = (TASKS, "batch.json", "batch.txt", "ray.log")  # in the batch's folder, and no run's


def settings_of_batch(file: Path, shared: Settings) -> dict[str, Settings]:
    """The settings of each subject's training, by its name.

    shared: what holds for all of them where they say nothing else.
    Raises: ConfigError, with file and line, for anything that is wrong, before a folder is looked at.
    """
    if shared.subjects:
        raise ConfigError(f"{file} lists the subjects, so leave `subjects` out of the settings.")
    found: dict[str, Settings] = {}
    taken: dict[str, str] = dict.fromkeys(_RESERVED, "what the batch itself writes")
    for number, (entry, places) in enumerate(read_entries(file, BatchEntry), 1):
        assert entry.images is not None
        name = entry.name or entry.images.name
        place = places.get("name") or places.get("images") or str(file)
        if not can_name_a_folder(name):
            raise ConfigError(f"{place}: subject {number} needs a name that a folder can have; add name.")
        if other := taken.get(name.casefold()):  # folders that some disks take for one
            raise ConfigError(
                f"{place}: the name {name} is taken by {other}; add another name to one of them."
            )
        taken[name.casefold()] = f"subject {number}"
        found[name] = _settings_of(entry, name, places, shared)
    return found


def _settings_of(entry: BatchEntry, name: str, places: dict[str, str], shared: Settings) -> Settings:
    flat, lines = flattened(as_tree(shared)), {}
    given: list[tuple[str, Any, str]] = [(setting, value, "") for setting, value in alone(entry).items()]
    for setting, value in dotted_settings(Settings, entry.set):
        if setting in _NOT_SET:
            raise ConfigError(
                f"{_place(places, setting)}: {setting} cannot be in set of {name}; {_NOT_SET[setting]}"
            )
        given.append((setting, value, _place(places, setting)))
    for setting, value, place in given:
        try:
            put_setting(flat, setting, value)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        if place:
            lines[setting] = place
    return checked_tree(Settings, flat, lines)


def _place(places: dict[str, str], setting: str) -> str:
    """The file and line of a setting in `set`, which may be dotted or nested, or hold a mapping."""
    own = f"set.{setting}"
    return next((place for name, place in places.items() if name == own or name.startswith(f"{own}.")), "set")
