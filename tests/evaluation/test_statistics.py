"""What cells say together, by numbers that can be worked out by hand."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from coeffdiff.evaluation.comparison_text import as_text, table_of
from coeffdiff.evaluation.statistics import _student, interval, paired, summarize

MADE = {
    "date": "2026-01-01",
    "device": "CPU",
    "precision": "float32",
    "model": "m",
    "encoders": {},
    "versions": {},
}


def cell(arm="lora", subject="a", seed=0, steps=2, scale=1.0, cost=None, **scores):
    return {
        "arm": arm, "subject": subject, "class_word": "mug", "seed": seed, "steps": steps, "scale": scale,
        "scores": scores, "cost": cost or {}, "made": MADE,
    }  # fmt: skip


def test_seeds_are_averaged_before_subjects():
    """Subject a with 3 seeds of 0, 0, 0.3 and b with one of 0.5: (0.1 + 0.5) / 2, not 0.8 / 4."""
    cells = [cell(seed=s, dino=v) for s, v in enumerate((0.0, 0.0, 0.3))] + [cell(subject="b", dino=0.5)]
    found = summarize(cells, {"lora": (2, 1.0)}, "lora")["arms"]["lora"]
    assert found["scores"]["dino"]["mean"] == pytest.approx(0.3)
    assert (found["cells"], found["subjects"], found["steps"]) == (4, 2, 2)


def test_pairs_are_of_equal_subject_and_seed():
    """What only one of the arms has says nothing: of b's seed 1 and of c there is no pair."""
    ours = [cell("coeff", "a", 0, dino=0.5), cell("coeff", "b", 0, dino=0.6), cell("coeff", "b", 1, dino=9.0)]
    theirs = [cell(subject="a", dino=0.4), cell(subject="b", dino=0.3), cell(subject="c", dino=-9.0)]
    found = paired(ours, theirs)
    assert (found["subjects"], found["pairs"]) == (2, 2)
    score = found["scores"]["dino"]
    assert score["difference"] == pytest.approx(0.2)
    assert (score["better_on"], score["of"], score["low"], score["says"]) == (2, 2, None, "too few subjects")


@pytest.mark.parametrize(
    ("name", "differences", "says"),
    [
        ("dino", (0.1, 0.2, 0.3, 0.1, 0.1, 0.1), "better"),
        ("dino", (-0.1, -0.2, -0.3, -0.1, -0.1, -0.1), "worse"),
        ("dino", (0.1, -0.2, 0.3, -0.1, 0.1, -0.1), "undecided"),
        ("drift", (0.1, 0.2, 0.3, 0.1, 0.1, 0.1), "worse"),
        ("drift", (-0.1, -0.2, -0.3, -0.1, -0.1, -0.1), "better"),
        ("dino", (0.1, 0.2, 0.3, 0.1, 0.1), "too few subjects"),
    ],
)
def test_a_difference_is_decided_when_its_interval_leaves_zero_out(name, differences, says):
    """All of one sign: no resample can average to the other. For drift less is better."""
    ours = [cell("x", str(i), **{name: 0.5 + d}) for i, d in enumerate(differences)]
    theirs = [cell(subject=str(i), **{name: 0.5}) for i in range(len(differences))]
    score = paired(ours, theirs)["scores"][name]
    assert score["says"] == says
    better = sum((d > 0) == (name == "dino") for d in differences)
    assert score["better_on"] == better
    assert score["low"] <= score["difference"] <= score["high"]


def test_the_interval_is_that_of_resampled_means():
    """Of 0 and 1 in equal parts the mean of n resamples is binomial: for n = 4, P(mean = 0) = 1/16 > 2.5 %, so the
    interval is [0, 1]; for n = 100 it is about 0.5 +- 1.96 * 0.05. Fewer than three values have none."""
    assert interval([0, 0, 1, 1]) == (0.0, 1.0)
    low, high = interval([0.0] * 50 + [1.0] * 50)
    assert low == pytest.approx(0.402, abs=0.012) and high == pytest.approx(0.598, abs=0.012)
    assert interval([1.0, 2.0]) == (None, None)
    assert interval([3.0] * 5) == (3.0, 3.0)


@pytest.mark.parametrize("count", [6, 10, 20])
def test_the_interval_of_few_values_holds_the_truth_as_often_as_it_says(count):
    """2,000 samples of normal values around 0; plain percentiles hold it 87 times in a hundred for 6 of them."""
    samples = np.random.default_rng(1).normal(size=(2000, count))
    hold = [low <= 0 <= high for low, high in (interval(list(values), resamples=1000) for values in samples)]
    assert 0.92 <= np.mean(hold) <= 0.97


def test_quantiles_are_students():
    """Tables: 2.571 for 5 degrees of freedom, 2.262 for 9, 1.984 for 99."""
    assert [_student(n) for n in (5, 9, 99)] == pytest.approx([2.5706, 2.2622, 1.9842], rel=2e-3)


def test_only_numbers_after_one_word_make_tries():
    """`lora 1e-3` and `lora 3e-3` are tries of lora, `coeff+lora 1e-3 3e-3` and `coeff+lora 1e-3 1e-2` of coeff+lora;
    `lora, rank 16` and `no dropout` are arms."""
    names = ("lora 1e-3", "lora 0.003", "lora, rank 1", "lora, rank 16", "no dropout", "no alpha")
    names += ("coeff+lora 1e-3 3e-3", "coeff+lora 1e-3 1e-2")
    cells = [cell(arm, dino=0.5, clip_t=0.5) for arm in names]
    found = summarize(cells, dict.fromkeys(names, (2, 1.0)), "lora 1e-3")
    assert list(found["best"]) == ["lora", "coeff+lora"]


def test_an_arm_is_judged_where_the_plan_says_and_nowhere_else():
    """b has not come to the last step: its earlier cell does not stand in for it, in means or in pairs."""
    points = ((2, 0.5, 0.1), (2, 1.0, 0.2), (4, 0.5, 0.3), (4, 1.0, 0.4), (4, 2.0, 0.9))
    cells = [cell(steps=steps, scale=scale, dino=value) for steps, scale, value in points]
    cells += [cell(subject="b", steps=2, dino=-1.0), cell("x", "b", steps=4, dino=0.0)]
    results = summarize(cells, {"lora": (4, 1.0), "x": (4, 1.0)}, "lora")
    assert results["arms"]["lora"]["scores"]["dino"]["mean"] == 0.4
    assert results["arms"]["lora"]["subjects"] == 1 and results["paired"]["x"]["pairs"] == 0
    curve = summarize(cells[:5], {"lora": (4, 1.0)}, "lora")["curves"]["lora"]
    assert [(p["steps"], p["scale"], p["scores"]["dino"]) for p in curve] == list(points)


def test_a_curve_is_of_those_that_have_all_points():
    """b has no cell at step 4, so the curve is a's alone."""
    cells = [cell(steps=2, dino=0.2), cell(steps=4, dino=0.4), cell(subject="b", steps=2, dino=0.8)]
    curve = summarize(cells, {"lora": (4, 1.0)}, "lora")["curves"]["lora"]
    assert [(p["cells"], p["scores"]["dino"]) for p in curve] == [(1, 0.2), (1, 0.4)]


def test_the_best_try_has_the_largest_geometric_mean_at_any_point():
    """sqrt(0.4 * 0.4) at its first look > sqrt(0.9 * 0.1); a try with fewer cells, or one that loses the places, is not
    chosen however good it is; where all lose them, places no longer count."""
    cells = [
        cell(arm, subject, steps=steps, dino=dino, clip_t=clip, place=place)
        for arm, steps, dino, clip, place, of in (
            ("lora 1", 2, 0.9, 0.1, 1.0, "ab"),
            ("lora 2", 1, 0.4, 0.4, 1.0, "ab"),
            ("lora 2", 2, 0.3, 0.4, 1.0, "ab"),
            ("lora 3", 2, 1.0, 1.0, 1.0, "a"),
            ("lora 4", 2, 1.0, 1.0, 0.9, "ab"),
        )
        for subject in of
    ]
    ends = {f"lora {n}": (2, 1.0) for n in (1, 2, 3, 4)}
    best = summarize(cells, ends, "lora 1")["best"]["lora"]
    assert (best["arm"], best["steps"], best["choice"]) == ("lora 2", 1, pytest.approx(0.4))
    losing = [c | {"scores": c["scores"] | {"place": 0.5}} for c in cells]
    assert summarize(losing, ends, "lora 1")["best"]["lora"]["arm"] == "lora 4"
    assert summarize(cells[:2], {"lora 1": (2, 1.0)}, "lora 1")["best"] == {}


def test_what_is_missing_or_failed_is_said():
    failed = cell("x") | {"failed": "NonFiniteLoss: step 3", "scores": {}}
    ends = dict.fromkeys(("lora", "x", "y"), (2, 1.0))
    results = summarize([cell(dino=0.5), failed], ends, "lora", ["b, lora, seed 0"])
    assert list(results["arms"]) == ["lora"]
    assert results["failed"] == ["a, x, seed 0: NonFiniteLoss: step 3"]
    text = as_text(results)
    assert "1 cells are missing, the first: b, lora, seed 0" in text and "NonFiniteLoss" in text


def test_a_row_for_each_cell_and_costs_are_medians():
    cells = [cell(subject=s, dino=0.5, cost={"peak_gib": g}) for s, g in (("a", 1.0), ("b", 5.0), ("c", 2.0))]
    cells.append(cell("base", dino=0.1))
    results = summarize(cells, dict.fromkeys(("base", "lora"), (2, 1.0)), "lora")
    assert results["arms"]["lora"]["cost"] == {"peak_gib": 2.0} and results["arms"]["base"]["cost"] == {}
    rows = list(csv.DictReader(io.StringIO(table_of(cells))))
    assert [row["peak_gib"] for row in rows] == ["1.0", "5.0", "2.0", ""]
    assert [row["arm"] for row in rows] == ["lora", "lora", "lora", "base"]
    assert results["made"] == [
        {**{k: v for k, v in MADE.items() if k != "date"}, "cells": 4, "dates": ["2026-01-01"]}
    ]
