"""Imports point one way: the order of the house, read from the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import coeffdiff

PACKAGE = Path(coeffdiff.__file__).parent
# From the ground up; a module may import what stands on an earlier line, or in its own package.
ORDER = [
    {"errors", "foreign", "samplers", "scaled", "seeding"},
    {"launched", "noise", "outputs", "paths", "synonyms", "yaml12"},
    {"files"},
    {"speed", "refusals"},
    {"method"},
    {"config", "console", "pictures", "processes", "threads", "tokens"},
    {"shortage"},
    {"pocket"},
    {"backbone"},
    {"data", "fingerprints", "headers"},
    {"sampling", "metrics", "dryrun", "inspection", "heatmap", "opening", "promptfile"},
    {"steps"},
    {"estimate"},
    {"preflight"},
    {"training"},
    {"evaluation"},
    {"demo"},
    {"cli"},
    {"__main__"},
]


def level(part: str) -> int:
    return next(i for i, parts in enumerate(ORDER) if part in parts)


def imported_parts(file: Path) -> set[str]:
    """First-level parts of coeffdiff that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if names == ["coeffdiff"]:
            names = [f"coeffdiff.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("coeffdiff.")}
    return {part for part in found if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()}


def test_imports_point_one_way():
    """No module imports one that stands above it, or beside it on the same line of ORDER."""
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        wrong += [
            f"{file.name} imports {part}"
            for part in imported_parts(file)
            if part != own and level(part) >= level(own)
        ]
    assert wrong == []


def test_every_part_has_its_place():
    """ORDER names all of the package and nothing else."""
    parts = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if not p.name.startswith("__pycache__")}
    assert parts - {"__init__"} == set().union(*ORDER)


def test_the_method_knows_nothing_of_settings_and_models():
    """`method` takes plain arguments: of the package it imports only errors, seeding, files, paths and speed."""
    for file in (PACKAGE / "method").glob("*.py"):
        assert imported_parts(file) <= {"errors", "seeding", "files", "paths", "speed", "method"}, file
