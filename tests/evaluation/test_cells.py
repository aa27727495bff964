"""Cells are found by their keys wherever they are kept, and packing them changes nothing that is read."""

from __future__ import annotations

import json
import math

import pytest

from coeffdiff.config.loading import load_settings
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.cells import CellFolder
from coeffdiff.evaluation.comparison_plan import deciding
from coeffdiff.utils.locks import try_lock

CELL = {
    "subject": "mug",
    "scores": {"dino": 0.1 + 0.2, "place": 1.0, "drift": -1e-17},
    "arm": "lora ×2",
    "scale": 1.0,
}


def one(n: int) -> dict:
    return CELL | {"seed": n}


def test_a_packed_cell_is_the_cell_that_was_packed(tmp_path):
    """To the last digit, with int and float kept apart; the single files are gone, the lines are in order of keys."""
    cells = CellFolder(tmp_path)
    for n, key in enumerate(("ff", "0a", "77")):
        cells.write(key, f"mug lora/{n}", one(n))
    before = {key: json.dumps(cells.read(key)) for key in ("ff", "0a", "77")}
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "mug_lora_0-ff.json",
        "mug_lora_1-0a.json",
        "mug_lora_2-77.json",
    ]
    assert cells.pack("a plan", ["ff", "77", "not there"]) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a_plan.jsonl", "mug_lora_1-0a.json"]
    assert [json.loads(line)["key"] for line in (tmp_path / "a_plan.jsonl").read_text().splitlines()] == [
        "77",
        "ff",
    ]
    for folder in (cells, CellFolder(tmp_path)):
        assert {key: json.dumps(folder.read(key)) for key in before} == before
        assert list(folder.all()) == ["0a", "77", "ff"]
    assert cells.pack("a plan", ["0a", "ff"]) == 1
    assert [json.loads(line)["key"] for line in (tmp_path / "a_plan.jsonl").read_text().splitlines()] == [
        "0a",
        "77",
        "ff",
    ]


def test_a_cell_of_several_plans_is_stored_once(tmp_path):
    """In the file that it was packed into first, whatever another machine has computed of it since."""
    cells = CellFolder(tmp_path)
    cells.write("aa", "x", one(1))
    cells.pack("first", ["aa"])
    cells.write("aa", "x", one(2))
    cells.write("bb", "x", one(3))
    assert cells.read("aa") == one(1)
    assert cells.pack("second", ["aa", "bb"]) == 2
    assert cells.read("aa") == one(1) and cells.read("bb") == one(3)
    assert (tmp_path / "second.jsonl").read_text().count("\n") == 1


def test_a_cell_that_is_not_whole_is_none_and_stays_where_it_is(tmp_path):
    cells = CellFolder(tmp_path / "cells")
    assert cells.read("aa") is None and cells.pack("plan", ["aa"]) == 0 and cells.all() == {}
    cells.write("aa", "x", one(1))
    (file,) = (tmp_path / "cells").iterdir()
    file.write_text(file.read_text()[:20])
    assert cells.read("aa") is None and cells.pack("plan", ["aa"]) == 0 and cells.all() == {}
    assert list((tmp_path / "cells").iterdir()) == [file]
    cells.write("aa", "other words", one(1))  # takes the place of the broken one
    assert list((tmp_path / "cells").iterdir()) == [file] and cells.read("aa") == one(1)


def test_what_another_process_packs_is_seen_at_once(tmp_path, monkeypatch):
    """Also when it happens between the look at the packed files and the look at the single one."""
    mine, other = CellFolder(tmp_path), CellFolder(tmp_path)
    other.write("aa", "x", one(1))
    other.write("bb", "x", one(2))
    assert mine.read("aa") == one(1)
    other.pack("plan", ["aa"])
    assert mine.read("aa") == one(1)

    single = CellFolder._single

    def packed_just_now(self, key):
        if self is mine:
            other.pack("plan", ["bb"])
        return single(self, key)

    monkeypatch.setattr(CellFolder, "_single", packed_just_now)
    assert mine.read("bb") == one(2) and not list(tmp_path.glob("*.json"))


def test_while_another_process_packs_nothing_is_moved(tmp_path):
    cells = CellFolder(tmp_path)
    cells.write("aa", "x", one(1))
    with try_lock(tmp_path) as mine:
        if mine is None:
            pytest.skip("no locks here")
        assert cells.pack("plan", ["aa"]) == 0 and cells.read("aa") == one(1)
    assert cells.pack("plan", ["aa"]) == 1


@pytest.mark.parametrize(
    "line", ["<<<<<<< ours", '{"subject": "mug"}', "[1]", '{"key": "cc"', "", "[" * 100_000, "\udcff"]
)
def test_a_damaged_line_is_one_sentence_and_nothing_is_lost(tmp_path, line):
    cells = CellFolder(tmp_path)
    cells.write("aa", "x", one(1))
    cells.pack("plan", ["aa"])
    cells.write("bb", "x", one(2))
    file = tmp_path / "plan.jsonl"
    file.write_bytes(file.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    before = file.read_bytes()
    for act in (lambda: cells.read("aa"), lambda: cells.pack("plan", ["bb"]), cells.all):
        with pytest.raises(ConfigError, match=r"Line 2 of .*plan\.jsonl is no cell"):
            act()
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_numbers_that_json_does_not_have_survive(tmp_path):
    cells = CellFolder(tmp_path)
    cells.write("aa", "x", {"scores": {"dino": math.inf}})
    cells.pack("plan", ["aa"])
    assert cells.read("aa") == {"scores": {"dino": math.inf}}


def test_later_settings_leave_the_names_of_cells_until_they_do_something():
    """What came after cells were recorded is in their keys only where it changes a training."""
    both = {"method.kind": "coeff+lora"}
    before = deciding(load_settings(None, both))
    assert "training.optimizer_args" not in before
    assert (
        not {"training.ema", "subjects", "model.quantize", "method.lora.text_learning_rate"} & before.keys()
    )
    for name, value in (
        ("training.ema", 0.9),
        ("model.quantize", "int8"),
        ("training.optimizer_args.eps", 1e-6),
        ("method.lora.text_encoders", True),
    ):
        assert deciding(load_settings(None, both | {name: value})) != before, name
