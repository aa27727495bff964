"""The toy experiment: what is proved about each arm holds for what tuning finds, and the numbers are what it says."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.toy.bounds import error_of, lower_bounds, reachable_polygon
from coeffdiff.evaluation.toy.problem import layer, make_problem, values_instead_of_alpha
from coeffdiff.evaluation.toy.results import table
from coeffdiff.evaluation.toy.settings import ARMS, REACHED, SETTINGS, TARGETS, TRAINED
from coeffdiff.evaluation.toy.toy import toy
from coeffdiff.evaluation.toy.tuning import polish, tune
from coeffdiff.utils.locks import try_lock

EVERY = [
    make_problem(setting, target, seed, restarts=2)
    for setting, target, seed in itertools.product(SETTINGS, TARGETS, range(2))
]


def alone(problem, trial, restart=0):
    return {name: t[0, restart] for name, t in trial.weights.items()}


def test_makers_make_their_targets():
    """An arm that is said to reach a target has an instance that makes it, within what it may train."""
    made = 0
    for problem in EVERY:
        for arm, weights in problem.makers.items():
            torch.testing.assert_close(layer(problem.x, weights), problem.o)
            for name in {"v", "o", "alpha"} - set(TRAINED[arm]):
                torch.testing.assert_close(weights[name], problem.weights[name])
            assert lower_bounds(problem)[arm] < 1e-9
            made += 1
    assert made >= 2 * (3 + 2 + 2 + 2 + 1 + 2) + 2 * (3 + 2 + 1 + 1 + 1 + 1) - 2


def test_every_arm_can_reach_something_and_provably_misses_something():
    """With real heads; in the caption's setting nothing is proved against W_v, which contains alpha."""
    for arm in ARMS:
        mine = [problem for problem in EVERY if problem.setting == "real heads"]
        assert any(arm in problem.makers for problem in mine)
        assert any(lower_bounds(problem)[arm] > 0.05 for problem in mine)
    assert all(
        lower_bounds(p)["qkv"] == lower_bounds(p)["alpha"] == 0 for p in EVERY if p.setting == "caption"
    )


def test_the_layer_by_hand():
    """Two nodes at +-1 on the first axis, q k = ln 3 / 2: maps [3/4, 1/4; 1/4, 3/4], so head 1 gives +-1/2."""
    q = torch.tensor([[[torch.tensor(3.0).log() / 2], [0.0]], [[0.0], [0.0]]], dtype=torch.float64)
    one = torch.tensor([[[1.0], [0.0]], [[1.0], [0.0]]], dtype=torch.float64)
    weights = {
        "q": q, "k": one, "v": one, "o": torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64),
        "alpha": torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.float64),
    }  # fmt: skip
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    # Head 1 takes its own map twice; head 2, whose map is even, three times head 1's, negatively
    torch.testing.assert_close(
        layer(x, weights), torch.tensor([[1.0, -1.5], [-1.0, 1.5]], dtype=torch.float64)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_in_the_captions_setting_values_do_what_alpha_does(seed):
    """sum_h (sum_g c[h,g] F^g) X W_v^h = sum_g F^g X (sum_h c[h,g] W_v^h), for any weights."""
    g = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(2, 2, 2, generator=g, dtype=torch.float64) for name in ("q", "k", "v")}
    weights["o"] = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    weights["alpha"] = 3 * torch.randn(2, 2, generator=g, dtype=torch.float64)
    x = torch.randn(7, 2, generator=g, dtype=torch.float64)
    without = values_instead_of_alpha(weights)
    assert not without["alpha"].any()
    torch.testing.assert_close(layer(x, without), layer(x, weights))


def random_instance(problem, arm, generator, spread):
    """Weights that the arm could have been tuned to."""
    weights = problem.weights | problem.starts[0]
    drawn = {
        name: spread * torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
        for name in TRAINED[arm]
    }
    return weights | drawn


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(EVERY),
    st.sampled_from(list(ARMS)),
    st.integers(0, 10**6),
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_no_instance_of_an_arm_gets_below_its_bound(problem, arm, seed, spread):
    """Nor does a scaled one, which is what could come nearest."""
    weights = random_instance(problem, arm, torch.Generator().manual_seed(seed), spread)
    bound = lower_bounds(problem)[arm]
    assert float(error_of(layer(problem.x, weights), problem.o)) >= bound - 1e-9


def test_bounds_are_tight_where_the_best_is_known():
    """Polished from many starts, the arm on nodes that it cannot tell apart comes down to its bound and no further."""
    problem = make_problem("real heads", "unread", 0, restarts=1)
    trial = tune([problem], "alpha", steps=100, rates=(0.03,), polishing=40)
    bound = lower_bounds(problem)["alpha"]
    assert bound > 0.3
    assert bound - 1e-9 <= float(trial.errors) < bound + 0.02


def test_the_polygon_of_two_segments_by_hand():
    """Values along the axes: [-1, 1] x [-1, 1], whose corner is nearest to (3, 2)."""
    problem = make_problem("real heads", "inside", 0)
    axis = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]], dtype=torch.float64)
    problem.weights.update(v=axis, o=axis.mT.contiguous())
    x = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    corners = {tuple(corner) for corner in reachable_polygon(x, problem.weights).tolist()}
    assert corners == {(1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)}
    o = torch.tensor([[3.0, 2.0], [0.2, 0.4], [0.0, -1.5]], dtype=torch.float64)
    off = (2.0**2 + 1.0**2 + 0.5**2) / 3  # from (1, 1), inside, from (0, -1)
    size = ((o - o.mean(0)).square().sum() / 3).sqrt()
    assert lower_bounds(replace(problem, x=x, o=o))["qk"] == pytest.approx(float(off**0.5 / size))


def test_alpha_reaches_what_values_provably_cannot_and_the_other_way_round():
    """With real heads: a fold for alpha, a line that no head reads for W_v; W_q and W_k can reach neither."""
    fold = make_problem("real heads", "fold", 6, restarts=3)
    unread = make_problem("real heads", "unread", 0, restarts=3)
    effort = {"steps": 150, "rates": (0.03,), "polishing": 40}
    for problem, winner, loser in ((fold, "alpha", "qkv"), (unread, "qkv", "alpha")):
        bounds = lower_bounds(problem)
        assert bounds["qk"] > 3 * REACHED and bounds[loser] > 5 * REACHED
        assert bounds["qk"] >= bounds[loser]  # whose weights contain those of W_q and W_k
        assert float(tune([problem], winner, **effort).errors.min()) < REACHED
        assert float(tune([problem], loser, **effort).errors.min()) >= bounds[loser] - 1e-9


def test_polishing_never_makes_it_worse_and_ends_where_a_maker_is_near():
    """From a maker's weights, slightly off, Levenberg-Marquardt comes back to the target."""
    problem = make_problem("real heads", "negative", 1)
    g = torch.Generator().manual_seed(0)
    off = {
        name: t + 0.02 * torch.randn(t.shape, generator=g, dtype=torch.float64)
        if name in TRAINED["alpha"]
        else t
        for name, t in problem.makers["alpha"].items()
    }
    before = error_of(layer(problem.x, off), problem.o)
    many = {name: t[None] for name, t in off.items()}
    found = polish(problem.x[None], problem.o[None], many, "alpha", 30)
    after = error_of(layer(problem.x, {name: t[0] for name, t in found.items()}), problem.o)
    assert float(before) > 1e-3 and float(after) < 1e-6


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return toy(
        tmp_path_factory.mktemp("toy") / "out", seeds=2, steps=40, restarts=1, rates=(0.03, 0.1), polishing=10
    )


def test_the_whole_experiment_in_small(small):
    """All cells, bounds kept, files written; the caption's alphas have their W_v to within rounding."""
    results = json.loads(small.numbers.read_text())
    assert results == small.results
    cells = results["cells"]
    assert [(c["setting"], c["target"], c["arm"]) for c in cells] == list(
        itertools.product(SETTINGS, TARGETS, ARMS)
    )
    for cell in cells:
        assert all(e >= b - 1e-9 for e, b in zip(cell["errors"], cell["lower_bounds"], strict=True))
        assert len(cell["errors"]) == sum(cell["verdicts"].values()) == 2
        before = cell["after_adam"][str(cell["rate"])]
        assert all(min(b) >= e - 1e-9 for b, e in zip(before, cell["errors"], strict=True))
    assert {c["trained_numbers"] for c in cells if c["setting"] == "real heads" and c["arm"] != "qk"} == {12}
    assert results["alpha_as_values"] < 1e-9
    outside = {c["arm"]: c for c in cells if (c["setting"], c["target"]) == ("real heads", "outside")}
    assert outside["qk"]["verdicts"] == {"out of reach": 2}
    assert outside["qk"]["median_error"] > outside["alpha"]["median_error"]
    with Image.open(small.picture) as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10
    told = table(results)
    assert all(target in told for target in TARGETS) and "out of reach" in told


def test_equal_seeds_give_equal_numbers(small, tmp_path):
    again = toy(tmp_path / "again", seeds=2, steps=40, restarts=1, rates=(0.03, 0.1), polishing=10)
    assert again.results["cells"] == small.results["cells"]


def test_a_folder_that_is_taken_or_nothing_to_do_is_one_sentence(small):
    with pytest.raises(ConfigError, match="is not empty; name another --output"):
        toy(small.folder)
    with pytest.raises(ConfigError, match="at least 1 of seeds, not 0"):
        toy(small.folder / "new", seeds=0)
    with pytest.raises(ConfigError, match="has no target 'ring'"):
        make_problem("caption", "ring", 0)


def test_two_at_once_do_not_share_a_folder(tmp_path):
    """The second is refused before anything is computed."""
    with try_lock(tmp_path), pytest.raises(ConfigError, match="Another command is at work in"):
        toy(tmp_path, seeds=1, steps=1, restarts=1, rates=(0.1,), polishing=1)
