"""The paper's propositions 4.2 and 4.3, put to mixed_attention itself and decided by linear programming.

Whether a point is in H^1 + ... + H^heads, the sum of the convex hulls of the heads' projected values, is a linear
program, which scripts/evidence/measure_hull.py puts to trained adapters as well.

Source: Miao, Chen and Qiu 2025, arXiv 2503.18337, section 4.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coeffdiff.method.attention import BACKENDS, mixed_attention
from measure_hull import distance_to_sum_of_hulls

ON_CPU = [name for name in BACKENDS if name != "fused"]


def layer_and_parts(q, k, v, project, coeff, backend):
    """A layer's output [Q, C] after its output projection [H, D, C], and its projected values [H, K, C]."""
    heads = mixed_attention(q[None], k[None], v[None], coeff, backend=backend)[0]
    return (heads @ project).sum(0).numpy(), (v @ project).numpy()


@st.composite
def layers(draw, least_heads=1):
    """q, k, v, output projection and the sizes' generator; float64, small odd sizes, sharp or flat scores."""
    heads, queries = draw(st.integers(least_heads, 4)), draw(st.integers(1, 4))
    keys, width, out = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    sharpness = draw(st.sampled_from([0.0, 1.0, 6.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    parts = (
        sharpness * normal(heads, queries, width), normal(heads, keys, width),
        3 * normal(heads, keys, width) + normal(heads, 1, width), normal(heads, width, out),
    )  # fmt: skip
    return parts, g


def test_the_linear_program_by_hand():
    """Hulls [0, 1] and [10, 12] on a line: the sum is [10, 13]; 15 is 2 outside, 9.5 half a unit, 11 inside."""
    values = np.array([[[0.0], [1.0], [0.5]], [[10.0], [12.0], [11.0]]])
    for point, outside in ((15.0, 2.0), (9.5, 0.5), (11.0, 0.0), (13.0, 0.0)):
        assert distance_to_sum_of_hulls(np.array([point]), values) == pytest.approx(outside, abs=1e-9)
    triangle = np.array([[[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]])
    assert distance_to_sum_of_hulls(np.array([3.0, 3.0]), triangle) == pytest.approx(
        1.0
    )  # (2, 2) is on its edge


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=40, deadline=None)
@given(layers())
def test_ordinary_attention_stays_in_the_sum_of_hulls(backend, layer):
    """Proposition 4.2 for coeff = I: every query's output, whatever the weights."""
    (q, k, v, project), _ = layer
    out, values = layer_and_parts(q, k, v, project, torch.eye(len(q), dtype=q.dtype), backend)
    size = 1 + np.abs(values).max() * len(values)
    for point in out:
        assert distance_to_sum_of_hulls(point, values) < 1e-7 * size


@settings(max_examples=40, deadline=None)
@given(layers(least_heads=2), st.floats(0, 1))
def test_the_sum_of_hulls_is_convex(layer, share):
    """Proposition 4.2: a point between two outputs of ordinary attention, of unequal W_q, is in the set as well."""
    (q, k, v, project), g = layer
    other = q + torch.randn(q.shape, generator=g, dtype=q.dtype)
    eye = torch.eye(len(q), dtype=q.dtype)
    first, values = layer_and_parts(q, k, v, project, eye, "reference")
    second, _ = layer_and_parts(other, k, v, project, eye, "reference")
    between = share * first[0] + (1 - share) * second[-1]
    assert distance_to_sum_of_hulls(between, values) < 1e-7 * (1 + np.abs(values).max() * len(values))


@settings(max_examples=40, deadline=None)
@given(layers(least_heads=2))
def test_row_stochastic_coefficients_stay_inside_as_well(layer):
    """Mixed maps are then distributions still: it takes negative weights or other row sums to get out."""
    (q, k, v, project), g = layer
    coeff = torch.rand(len(q), len(q), generator=g, dtype=q.dtype)
    coeff = coeff / coeff.sum(1, keepdim=True)
    out, values = layer_and_parts(q, k, v, project, coeff, "reference")
    for point in out:
        assert distance_to_sum_of_hulls(point, values) < 1e-7 * (1 + np.abs(values).max() * len(values))


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_learned_alpha_leaves_the_sum_of_hulls(backend):
    """Maps [3/4, 1/4] and [1/2, 1/2]; coeff [0 1; 2 -2] makes [1/2, 1/2] and [1/2, -1/2].

    Values 4 and 0 on the first axis, 0 and 8 on the second: the sum of hulls is [0, 4] x [0, 8]. The output is
    (1/2 * 4, -1/2 * 8) = (2, -4): 4 below.
    """
    q = torch.tensor([[[math.log(3)]], [[0.0]]], dtype=torch.float64)
    k = torch.tensor([[[1.0], [0.0]], [[1.0], [0.0]]], dtype=torch.float64)
    v = torch.tensor([[[4.0], [0.0]], [[0.0], [8.0]]], dtype=torch.float64)
    project = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    coeff = torch.tensor([[0.0, 1.0], [2.0, -2.0]], dtype=torch.float64)
    out, values = layer_and_parts(q, k, v, project, coeff, backend)
    np.testing.assert_allclose(out, [[2.0, -4.0]])
    assert distance_to_sum_of_hulls(out[0], values) == pytest.approx(4.0)
    plain, _ = layer_and_parts(q, k, v, project, torch.eye(2, dtype=torch.float64), backend)
    assert distance_to_sum_of_hulls(plain[0], values) == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(layers(least_heads=2), st.floats(0.1, 3))
def test_for_every_layer_some_alpha_leaves_it_by_as_much_as_one_likes(layer, margin):
    """Proposition 4.3. For any layer whose values differ from zero a multiple of the maps gets out: an alpha on
    the diagonal that is large enough. By how much is derived: the set ends at the sum of the values' largest norms."""
    (q, k, v, project), _ = layer
    eye = torch.eye(len(q), dtype=q.dtype)
    plain, values = layer_and_parts(q, k, v, project, eye, "reference")
    farthest = np.abs(plain).max()
    ends = np.abs(values).max(axis=1).sum(axis=0).max()  # no coordinate of a point inside is larger
    if farthest < 1e-6:
        return
    alpha = ((ends + margin) / farthest) * eye
    out, _ = layer_and_parts(q, k, v, project, eye + alpha, "reference")
    worst = max(distance_to_sum_of_hulls(point, values) for point in out)
    assert worst >= margin - 1e-6 * (1 + ends)
