"""Data for experiments, and tables of what they left."""

from __future__ import annotations

import json

import pytest
from experiments.make_package_texts import described, paragraphs
from forking import fork_run

import classify_tables
from coeffdiff.data.photos import read_photos
from coeffdiff.tasks.arms import ARMS


def test_class_folders_are_made_of_the_world(tmp_path, forked):
    """A folder for each side, pictures of 128 pixels that the photo reader takes; all of them differ."""
    done = forked("make_classes.py", "--task", "view", "--output", "view", "--count", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.name for folder in (tmp_path / "view").iterdir()) == [
        "back",
        "front",
        "left",
        "right",
    ]
    found = [read_photos(folder) for folder in (tmp_path / "view").iterdir()]
    assert all(not one.skipped and {p.width for p in one.photos} == {128} for one in found)
    assert len({photo.digest for one in found for photo in one.photos}) == 8


def test_every_task_of_the_world_can_be_drawn(tmp_path):
    """All classes of all tasks make a scene; those that differ by a mark alone have it."""
    script = """
import make_classes
for names, scene in make_classes.TASKS.values():
    for name in names:
        print(name, len(scene(name, 7).marks), round(scene(name, 7).camera.distance, 1))
"""
    done = fork_run("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert len(drawn) == 4 + 4 + 5
    assert [drawn[name][0] for name in ("none", "band", "half")] == ["0", "1", "1"]
    assert float(drawn["near"][1]) < float(drawn["middle"][1]) < float(drawn["far"][1])


def test_one_package_of_a_source_is_described():
    """libz2 and z-doc are of z: libz2 comes first; q is of another section; m has no description."""
    listing = (
        "Package: z-doc\nSource: z (1.2)\nSection: text\nDescription: zeds, manual\n long\n\n"
        "Package: libz2\nSource: z\nSection: text\nDescription: zeds: a library\nTag: x::y,\n z::y\n\n"
        "Package: q\nSection: net\nDescription: queue\n\nPackage: m\nSection: text\n"
    )
    assert described(paragraphs(listing), {"text"}) == [("text", "zeds: a library")]


def cell(arm, seed, accuracy):
    numbers = {"head": 51} | {part: 4 for part in arm.split("+") if part != "linear"}
    made = {"device": "CPU", "date": "2026-01-01", "versions": {"torch": "2"}}
    return {
        "arm": arm, "shots": 4, "seed": seed, "rates": {"head": 0.001}, "numbers": numbers, "seconds": 1.0,
        "scores": {"accuracy": accuracy, "loss": 1.0}, "mean_abs_alpha": 0.25 if "coeff" in arm else None, "made": made,
    }  # fmt: skip


def test_the_table_of_a_classification(tmp_path):
    """Means and differences by hand; cells of tuning are left out; a cell twice is an error, not a mean."""
    cells = [cell(arm, seed, 0.5 + 0.1 * ARMS.index(arm)) for arm in ARMS for seed in range(6)]
    (tmp_path / "cells").mkdir()
    file = tmp_path / "cells" / "some.jsonl"
    file.write_text("\n".join(map(json.dumps, [*cells, cell("lora", "tune-0", 0.0)])) + "\n")
    lines = classify_tables.tables(tmp_path)["classify_some"].splitlines()
    assert lines[2] == "| 4 | linear | 0 | 0.500 [0.500, 0.500] |  |  |  | head 0.001 |"
    assert lines[5] == (
        "| 4 | coeff+lora | 8 | 0.800 [0.800, 0.800] | +0.300 [+0.300, +0.300], better "
        "| +0.200 [+0.200, +0.200], better | 0.25 | head 0.001 |"
    )
    assert lines[-1] == "6 seeds; 2026-01-01, CPU, torch 2."
    with pytest.raises(ValueError, match="two cells of"):
        classify_tables.table([*cells, cells[0]])
