"""What measures adapters and writes the tables of its README, as the user runs it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from forking import fork_run
from PIL import Image

import depth_curve
import evidence_tables
import gain_shares
from coeffdiff.config.loading import load_section
from coeffdiff.config.nested import flattened
from coeffdiff.evaluation.comparison_plan import Comparison
from coeffdiff.evaluation.statistics import PLACES_KEPT
from coeffdiff.training.judge import selection_score

SCRIPTS = Path(__file__).parents[2] / "scripts"


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
        {n: cell["scores"][n] for n in scores["as trained"]}, abs=1e-4
    )
    assert len({of["dino"] for of in scores.values()}) == len(scores) == 6
    assert max(scores, key=lambda part: scores[part]["dino"]) == "the subject itself"
    assert done.stdout.count("\n| ") == 6 + 1 + 3  # parts; then a head and pocket's blocks
    (moved,) = (row["moved"] for row in rows if "moved" in row)
    assert len(moved) == 2 * 3 and 0.0 < min(moved.values()) < max(moved.values()) < 0.02


def test_the_tables_are_what_the_cells_say(tmp_path, monkeypatch, capsys):
    """All of them, and the pictures, as they are; with one digit changed, the table is named."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(evidence_tables, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr("sys.argv", ["evidence_tables.py", "--check"])
    for picture in (SCRIPTS / "evidence").glob("*.png"):
        shutil.copy(picture, tmp_path)
    readme = (SCRIPTS / "evidence" / "README.md").read_text(encoding="utf-8")
    name = re.findall("<!-- table: (\\w+) -->", readme)[-1]
    begin = readme.index(f"<!-- table: {name} -->")
    spoiled = readme[:begin] + readme[begin:].replace("0.", "1.", 1)
    for text, code, said in ((readme, 0, ""), (spoiled, 1, f"Not what the cells say: {name}.\n")):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert (evidence_tables.main(), capsys.readouterr().out) == (code, said)


def test_what_is_compared_stands_where_tuning_found_it_best(monkeypatch):
    """Every trained arm of the other plans has the rates and the steps of its method's best try, or of one that is as
    good within 0.005 and no longer."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plans = {
        name: load_section(Comparison, evidence_tables.plan_file(name)) for name in evidence_tables.PLANS
    }
    tuning = evidence_tables.gathered(["tuning"])["tuning"].results
    assert set(tuning["best"]) == {"lora", "coeff", "coeff+lora", "values+lora"}
    good = {
        method: [
            plans["tuning"].arms[arm] | {"training.steps": point["steps"]}
            for arm, curve in tuning["curves"].items()
            for point in curve
            if arm.startswith(f"{method} ")
            and point["steps"] <= best["steps"]
            and point["scores"]["place"] >= PLACES_KEPT
            and selection_score(point["scores"]) >= best["choice"] - 0.005
        ]
        for method, best in tuning["best"].items()
    }
    assert set(plans) == {"tuning", "core", "ablations", "depth", "ranks", "tellable", "told"}
    for name in set(plans) - {"tuning"}:
        for arm, given in plans[name].arms.items():
            method = "coeff" if name == "ablations" else arm.split(",")[0]
            settings = flattened(plans[name].settings) | flattened(given or {})
            assert arm == "base" or any(one.items() <= settings.items() for one in good[method]), (name, arm)


def test_a_comparison_is_packed_and_comes_out_as_tables_and_a_picture(tmp_path, monkeypatch, capsys):
    """From fresh cells to the page; run again, and only asked, nothing is out of date."""
    lora, others = "lora: {method.kind: lora}", "base: null, coeff: {method.kind: coeff}, coeff+lora: {}"
    plans = tmp_path / "configs" / "compare"
    plans.mkdir(parents=True)
    for name, more in (
        ("core", f", arms: {{{lora}, {others}}}"),
        ("tuning", f", arms: {{{lora}}}, checkpoints: [1]"),
    ):
        (plans / f"{name}.yaml").write_text(
            "{model: {name: pocket}, subjects: wooden_pot, seeds: [0], limit: 1, denoising_steps: 1,"
            f" drift_pictures: 1, settings: {{training.steps: 2}}{more}}}"
        )
        done = fork_run(
            *("-m", "coeffdiff", "compare", f"configs/compare/{name}.yaml", "--output", "evidence"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    evidence = tmp_path / "evidence"
    page = evidence / "README.md"
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("core", "tuning")))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    given = {"ROOT": tmp_path, "CELLS": evidence / "cells", "PAGE": page, "PLANS": {"core", "tuning"}}
    for name, value in given.items():
        monkeypatch.setattr(evidence_tables, name, value)
    for arguments, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr("sys.argv", ["evidence_tables.py", *arguments])
        assert evidence_tables.main() == code
    assert capsys.readouterr().out == "Not what the cells say: core.png, core, tuning.\n"
    assert {file.name for file in (evidence / "cells").iterdir()} == {"core.jsonl", "tuning.jsonl"}
    text = page.read_text()
    assert "| coeff+lora - lora |" in text and "| arm | 1 steps | 2 steps |" in text
    assert Image.open(evidence / "core.png").width > 500


def on_a_line(slope: float, subjects: int = 6) -> tuple[list[dict], dict]:
    """Cells whose gain over their reference is 0.1, and `slope` more for each doubling of 14 layers; each subject has a
    level of its own, so that only pairs know it."""
    arms = {"base": None, "lora": None} | {
        f"{method}, {layers} layers": layers for method in ("coeff", "coeff+lora") for layers in (14, 28, 112)
    }
    cells = [
        {"arm": arm, "subject": f"s{n}", "seed": seed, "steps": 1 if layers else 0, "scale": 1.0,
         "scores": {"dino_masked": n + (0.1 + slope * math.log2(layers / 14) if layers else 0.0), "clip_t": 0.5}}
        for n in range(subjects) for seed in (0, 1) for arm, layers in arms.items()
    ]  # fmt: skip
    return cells, {arm: (1 if layers else 0, 1.0) for arm, layers in arms.items()}


def test_a_gain_that_grows_with_depth_is_found_and_carried_on_to_sdxls(tmp_path):
    """0.05 a doubling: 0.1 with 14 layers, 0.25 with 112, and 0.1 + 0.05 log2(10) = 0.266 with 140."""
    cells, ends = on_a_line(0.05)
    of = depth_curve.gains(cells, ends, "coeff", "dino_masked")
    assert len(of) == 6
    for by_layers in of.values():
        assert by_layers == pytest.approx({14: 0.1, 28: 0.15, 112: 0.25})
        assert depth_curve.fitted(by_layers) == pytest.approx((0.05, 0.26610), abs=1e-5)
    table = depth_curve.table(cells, ends).splitlines()
    assert table[0] == "| | 14 layers | 28 layers | 112 layers | a doubling |  | the line at 140 |"
    assert table[2].startswith("| coeff - base, DINO, photos masked | +0.100 [+0.100, +0.100] | +0.150")
    assert table[2].endswith("| +0.050 [+0.050, +0.050] | better | +0.266 [+0.266, +0.266] |")
    assert "| +0.000 [+0.000, +0.000] | undecided | +0.000" in table[3]
    assert len(table) == 2 + 4
    depth_curve.draw(cells, ends, tmp_path / "depth.png")
    assert Image.open(tmp_path / "depth.png").width > 500


def test_a_subject_that_lacks_a_number_of_layers_takes_no_part():
    cells, ends = on_a_line(-0.05)
    cells = [c for c in cells if (c["subject"], c["arm"]) != ("s0", "coeff, 28 layers")]
    assert list(depth_curve.gains(cells, ends, "coeff", "dino_masked")) == ["s1", "s2", "s3", "s4", "s5"]
    assert "| -0.050 [-0.050, -0.050] | worse |" in depth_curve.table(cells, ends)


def test_alphas_share_of_loras_gain_is_of_the_means_over_subjects():
    """Gains of 0.1, 0.2, 0.3 beside 0.2, 0.4, 0.6 are half, with certainty; a subject that lacks an arm is left out."""
    scores = {"base": 0.1, "lora": 0.3, "coeff": 0.2}
    cells = [
        {"arm": arm, "subject": f"s{n}", "seed": seed,
         "scores": {"dino_masked": 0.1 + (value - 0.1) * n + (0.01 if seed else -0.01)}}
        for n in (1, 2, 3) for seed in (0, 1) for arm, value in scores.items()
    ]  # fmt: skip
    cells.append({"arm": "lora", "subject": "s4", "seed": 0, "scores": {"dino_masked": 9.0}})
    told = [{"arm": "base", "subject": "s1", "seed": 0, "scores": {"dino_masked": 0.25}}]
    table = gain_shares.table({"core": cells, "depth": [], "tellable": cells[:18], "told": told}).splitlines()
    assert (
        table[2]
        == table[3].replace("tellable", "eval")
        == "| eval, 3 | 0.100 | 0.500 | 0.300 | 50 % [50, 50] |"
    )
    assert table[4:] == ["| the same, told, 1 | 0.250 | | | |"]


def test_an_uncertain_share_has_an_interval_around_it():
    lora, alone = [0.5, 0.6, 0.7, 0.5, 0.6, 0.7], [0.1, 0.5, 0.2, 0.4, 0.3, 0.3]
    ratio, low, high = gain_shares.share([0.0] * 6, lora, alone)
    assert ratio == pytest.approx(0.5)
    assert 0.3 < low < 0.45 and 0.55 < high < 0.75


def test_a_level_whose_attention_says_nothing_moves_nothing(micro_pipeline):
    """Zero output projections at one level of two: exactly nothing there, something at the other; and the UNet is
    afterwards what it was."""
    import measure_attention

    pipe = micro_pipeline
    names = {name.split(".attentions.")[0] for name in pipe.unet.attn_processors}
    dead = min(names)
    for name, parameter in pipe.unet.named_parameters():
        if name.startswith(f"{dead}.") and ".to_out.0." in name:
            parameter.data.zero_()
    calls = measure_attention.calls_of(pipe, ["a photo of a mug"], steps=4)
    assert len(calls) == 1
    before = pipe.unet(**calls[0]).sample
    found = measure_attention.shares(pipe.unet, calls)
    assert set(found) == names | {"all"} and found["all"]["layers"] == len(pipe.unet.attn_processors)
    assert found[dead]["attention"] == found[dead]["most"] == found["all"]["least"] == 0
    assert found[dead]["alphas"] < 1e-5  # mixed attention rounds otherwise
    others = [row for level, row in found.items() if level != dead]
    assert all(row[name] > 1e-4 for row in others for name in ("attention", "transformers", "alphas"))
    assert all(0 < row["least"] <= row["median"] <= row["most"] for row in others if row is not found["all"])
    assert torch.equal(pipe.unet(**calls[0]).sample, before)
