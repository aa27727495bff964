"""Settings as plain trees: written, changed, compared."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coeffdiff.config import yaml12
from coeffdiff.config.fields import Section
from coeffdiff.config.loading import checked_tree
from coeffdiff.config.nested import as_tree, by_name, dotted_settings, flattened, put_setting
from coeffdiff.config.schema import Settings


def save_settings(settings: Section, file: Path) -> None:
    """Write a tree of settings as YAML."""
    tree = as_tree(settings)
    if not tree.get("subjects", True):  # most runs have one subject
        del tree["subjects"]
    file.write_text(yaml12.dump(tree), encoding="utf-8")


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    """A checked copy with other values, by dotted name. Raises: ConfigError for a value that is refused."""
    flat = flattened(as_tree(settings))
    for name, value in dotted_settings(Settings, values):
        put_setting(flat, name, value)
    return checked_tree(Settings, flat, {})


def differences(old: Settings, new: Settings, ignore: Iterable[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, with both values."""
    skipped = set(ignore)
    flat_old, flat_new = by_name(old), by_name(new)
    return {
        name: (flat_old.get(name), value)
        for name, value in flat_new.items()
        if flat_old.get(name) != value and name not in skipped
    }
