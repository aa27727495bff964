"""What measures adapters and writes the tables of its README, as the user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forking import fork_run

import evidence_tables
from coeffdiff.config.loading import load_section
from coeffdiff.evaluation.comparison_plan import Comparison

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_customization_is_measured_once_for_every_cell(tmp_path):
    """Base, a trained arm in two variants and both ends: five rows; asked again, nothing is made anew, packed or not."""
    arguments = ("--folder", "out", "--subjects", "robot_mug", "--arms", "base", "coeff", "ceiling", "floor")
    arguments += ("--steps", "2", "--denoising-steps", "2")
    arguments += ("--set", "method.coeff.dropout=0", "method.coeff.learning_rate=0.05")
    script = "import sys, measure_customization as m; m.SEEDS = m.SEEDS[:1]; sys.exit(m.main())"
    first = fork_run("-c", script, *arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert sum(line.startswith("robot_mug ") for line in first.stderr.splitlines()) == 5
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in first.stdout.splitlines()[2:7]}
    assert list(rows) == [
        "base",
        "coeff method.coeff.dropout=0",
        "coeff method.coeff.learning_rate=0.05",
        "ceiling",
        "floor",
    ]
    likeness = {name: float(row[2]) for name, row in rows.items()}
    assert likeness["ceiling"] > likeness["floor"]
    assert float(rows["coeff method.coeff.learning_rate=0.05"][5]) > float(
        rows["coeff method.coeff.dropout=0"][5]
    )  # mean |alpha|
    cells = [json.loads(file.read_text()) for file in (tmp_path / "out" / "cells").iterdir()]
    assert {(cell["arm"], cell.get("steps")) for cell in cells} == {
        ("base", None), ("coeff", 2), ("ceiling", None), ("floor", None)
    }  # fmt: skip
    for more in (("--pack",), ()):
        again = fork_run("-c", script, *arguments, *more, cwd=tmp_path)
        assert again.stdout.replace(" --pack", "") == first.stdout and "robot_mug" not in again.stderr
    (packed,) = (tmp_path / "out" / "cells").iterdir()
    assert packed.name == "dev.jsonl" and packed.read_text().count("\n") == 5


def test_a_comparisons_adapters_are_taken_apart(tmp_path, forked):
    """As trained they have the cell's scores; without alpha and without LoRA others; the subject itself the best."""
    (tmp_path / "plan.yaml").write_text(
        "{model: {name: pocket}, subjects: wooden_pot, seeds: [0], limit: 2, denoising_steps: 2, reference: coeff+lora,"
        " settings: {training.steps: 2, training.masked_loss: false}, arms: {coeff+lora: {method.kind: coeff+lora}}}"
    )
    done = fork_run("-m", "coeffdiff", "compare", "plan.yaml", "--output", "comparison", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = ("plan.yaml", "--comparison", "comparison", "--output", "dissected.json")
    done = forked("evidence/dissect_comparison.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "dissected.json").read_text())
    scores = {row["part"]: row["scores"] for row in rows}
    (cell,) = (json.loads(file.read_text()) for file in (tmp_path / "comparison" / "cells").glob("*.json"))
    assert scores["as trained"] == pytest.approx(
        {n: cell["scores"][n] for n in scores["as trained"]}, abs=1e-5
    )
    assert len({of["dino"] for of in scores.values()}) == len(scores) == 6
    assert max(scores, key=lambda part: scores[part]["dino"]) == "the subject itself"
    assert done.stdout.count("\n| ") == 6 + 1 + 5  # parts; then a head and pocket's blocks
    (moved,) = (row["moved"] for row in rows if "moved" in row)
    assert len(moved) == 2 * 5 and 0.0 < min(moved.values()) < max(moved.values()) < 0.02


@pytest.fixture(scope="module")
def gathered():
    """evidence_tables.gathered, which reads each plan's cells once."""
    read = evidence_tables.gathered
    known: dict[str, evidence_tables.Gathered] = {}

    def once(plans, pack=False):
        assert not pack
        known.update(read(set(plans) - known.keys()))
        return {name: known[name] for name in plans}

    return once


def test_the_tables_are_what_the_cells_say(tmp_path, gathered, monkeypatch, capsys):
    """All of them as they are; with one digit changed, the table is named."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(evidence_tables, "gathered", gathered)
    monkeypatch.setattr(evidence_tables, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr("sys.argv", ["evidence_tables.py", "--check"])
    readme = (SCRIPTS / "evidence" / "README.md").read_text(encoding="utf-8")
    begin = readme.index("<!-- table: core -->")
    spoiled = readme[:begin] + readme[begin:].replace("0.", "1.", 1)
    for text, code, said in ((readme, 0, ""), (spoiled, 1, "Not what the cells say: core.\n")):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert (evidence_tables.main(), capsys.readouterr().out) == (code, said)


def test_what_is_compared_stands_where_tuning_found_it_best(gathered, monkeypatch):
    """Each trained arm of the core comparison and of the controls has the settings and steps of its best try."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plans = {name: load_section(Comparison, evidence_tables.plan_file(name)) for name in ("core", "controls")}
    tuned = gathered(("tuning", "tuning_controls"))
    tries = {name: load_section(Comparison, evidence_tables.plan_file(name)) for name in tuned}
    called = {"lora, rank 17": "rank17"}
    for name, plan in plans.items():
        for arm, own in plan.arms.items():
            found = [
                tries[tuning].arms[best["arm"]] | {"training.steps": best["steps"]}
                for tuning, there in tuned.items()
                if (best := there.results["best"].get(called.get(arm, arm)))
            ]
            assert arm == "base" or found == [own], (name, arm)
