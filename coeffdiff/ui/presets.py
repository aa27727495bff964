"""Recipes that the page offers: the YAML files of configs/ in the working folder and in a checkout of coeffdiff."""

from __future__ import annotations

from pathlib import Path

import coeffdiff

PLACES = (Path("configs"), Path(coeffdiff.__file__).parents[1] / "configs")


def find_presets() -> dict[str, str]:
    """Names and paths, sorted by name; the working folder's before the checkout's. A wheel brings none along."""
    found: dict[str, str] = {}
    for place in PLACES:
        for file in sorted(place.glob("*.yaml")):
            found.setdefault(file.stem, str(file))
    return dict(sorted(found.items()))
