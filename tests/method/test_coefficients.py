"""alpha of one layer: its forms, its scale, its dropout, and that nothing narrows it."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from coeffdiff.method.attention import mixed_attention
from coeffdiff.method.coefficients import Coefficients, clear_dropout, draw_dropout
from coeffdiff.utils.seeding import generator_for

FORMS = ("residual", "identity", "random")
every_form = pytest.mark.parametrize("form", FORMS)


def recombination(coefficients):
    """What the layer's maps are mixed with: I + deviation."""
    return (torch.eye(coefficients.heads) + coefficients.deviation()).detach()


def layers_named(*names, heads=5):
    return {name: Coefficients(heads) for name in names}


# Forms and scale


@pytest.mark.parametrize("form", ["residual", "identity"])
def test_training_starts_at_ordinary_attention(form):
    """alpha = 0 with the residual, alpha = I without it: the recombination is the identity, exactly."""
    coefficients = Coefficients(3, form)
    assert torch.equal(coefficients.alpha, torch.zeros(3, 3) if form == "residual" else torch.eye(3))
    assert torch.equal(recombination(coefficients), torch.eye(3))
    assert coefficients.displacement().max() == 0


def test_the_random_form_starts_as_noise_from_its_generator():
    """Standard deviation 1 / sqrt(H), far from the identity; equal for equal generators only."""
    one, same, other = (Coefficients(64, "random", generator_for("alpha", seed)) for seed in (0, 0, 1))
    assert one.alpha.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert one.alpha.mean().item() == pytest.approx(0, abs=0.01)
    assert torch.equal(one.alpha, same.alpha) and not torch.equal(one.alpha, other.alpha)
    torch.testing.assert_close(recombination(one), one.alpha.detach())
    assert one.displacement().diagonal().mean() > 0.5


def test_scale_in_the_residual_form_by_hand():
    """I + s * alpha: with alpha = [[1, 2], [3, 4]] and s = 1/2."""
    coefficients = Coefficients(2)
    coefficients.alpha.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert recombination(coefficients).tolist() == [[2.0, 2.0], [3.0, 5.0]]
    coefficients.scale.fill_(0.5)
    assert recombination(coefficients).tolist() == [[1.5, 1.0], [1.5, 3.0]]
    assert coefficients.displacement().tolist() == [[1.0, 2.0], [3.0, 4.0]]  # at scale 1, whatever the scale


@pytest.mark.parametrize("form", ["identity", "random"])
def test_scale_without_the_residual_by_hand(form):
    """I + s * (alpha - I): s = 1 is alpha itself, s = 1/2 half way from the identity."""
    coefficients = Coefficients(2, form)
    coefficients.alpha.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert recombination(coefficients).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    coefficients.scale.fill_(0.5)
    assert recombination(coefficients).tolist() == [[1.0, 1.0], [1.5, 2.5]]
    assert coefficients.displacement().tolist() == [[0.0, 2.0], [3.0, 3.0]]


@every_form
def test_scale_zero_is_ordinary_attention_in_every_form(form):
    """Whatever alpha is, and whatever dropout did to it."""
    coefficients = Coefficients(7, form, generator_for("alpha"))
    nn.init.normal_(coefficients.alpha)
    draw_dropout({"layer": coefficients}, 0.5, seed=0, step=1)
    coefficients.scale.fill_(0)
    assert torch.equal(recombination(coefficients), torch.eye(7))


@pytest.mark.parametrize(
    ("form", "expected"), [("residual", [[3, 0], [0, 1]]), ("identity", [[2, 0], [0, 0]])]
)
def test_dropout_acts_on_alpha_alone(form, expected):
    """With the mask [[2, 0], [0, 0]] and alpha = [[1, 2], [3, 4]]: the residual's I stays, the other has none."""
    coefficients = Coefficients(2, form)
    coefficients.alpha.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    coefficients.mask.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert recombination(coefficients).tolist() == expected


def test_only_alpha_is_a_parameter_and_only_alpha_is_stored():
    """Scale, mask and identity are buffers that no checkpoint holds."""
    coefficients = Coefficients(3)
    assert [name for name, _ in coefficients.named_parameters()] == ["alpha"]
    assert list(coefficients.state_dict()) == ["alpha"]
    assert coefficients.alpha.requires_grad and coefficients.alpha.dtype == torch.float32


def test_a_compiled_model_is_not_compiled_again_for_a_new_scale_or_mask():
    """Both are tensors: one graph for all their values, and each value counts."""
    coefficients, counter = Coefficients(3), CompileCounter()
    nn.init.normal_(coefficients.alpha)
    q, k, v = (torch.randn(1, 3, tokens, 2, generator=generator_for(tokens)) for tokens in (5, 7, 7))

    def attend():
        coeff = coefficients.identity + coefficients.deviation()
        return mixed_attention(q, k, v, coeff, backend="reference")

    torch.compiler.reset()
    compiled, seen = torch.compile(attend, backend=counter, fullgraph=True), []
    for step, scale in enumerate([1.0, 0.5, -2.0, 0.0]):
        coefficients.scale.fill_(scale)
        draw_dropout({"layer": coefficients}, 0.3, seed=0, step=step)
        seen.append(compiled().detach())
        torch.testing.assert_close(seen[-1], attend().detach())
    torch.compiler.reset()
    assert counter.frame_count == 1
    assert all(not torch.equal(one, other) for one, other in pairwise(seen))


# Dropout


def test_a_mask_depends_on_seed_step_and_layer_name_only():
    """Not on the order of the layers, not on which others there are, not on the global random state."""
    one, other = layers_named("a", "b", "c"), layers_named("c", "a", heads=5)
    draw_dropout(one, 0.4, seed=3, step=7)
    torch.manual_seed(123)
    draw_dropout(other, 0.4, seed=3, step=7)
    before = torch.random.get_rng_state()
    draw_dropout(other, 0.4, seed=3, step=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one["a"].mask, other["a"].mask) and torch.equal(one["c"].mask, other["c"].mask)
    assert not torch.equal(one["a"].mask, one["b"].mask)


def test_layers_of_different_size_each_get_their_own_mask():
    """All masks travel to the device as one tensor; the parts must not be mixed up."""
    together = {"a": Coefficients(3), "b": Coefficients(7), "c": Coefficients(5)}
    draw_dropout(together, 0.4, seed=0, step=0)
    for name, coefficients in together.items():
        alone = {name: Coefficients(coefficients.heads)}
        draw_dropout(alone, 0.4, seed=0, step=0)
        assert torch.equal(alone[name].mask, coefficients.mask)


def test_a_step_repeats_its_mask_and_another_step_or_seed_has_another():
    """What makes a resumed run equal to an unbroken one."""
    masks = {}
    for seed, step in [(0, 1), (0, 2), (1, 1), (0, 1)]:
        layers = layers_named("a")
        draw_dropout(layers, 0.5, seed=seed, step=step)
        if (seed, step) in masks:
            assert torch.equal(masks[seed, step], layers["a"].mask)
        masks[seed, step] = layers["a"].mask
    assert not torch.equal(masks[0, 1], masks[0, 2]) and not torch.equal(masks[0, 1], masks[1, 1])


def test_kept_entries_are_scaled_up_and_their_share_is_right():
    """Values 0 and 1 / (1 - p) only; of 20,000 entries a fifth falls (standard error 0.003), so the mean stays 1."""
    layers = layers_named(*(f"layer {n}" for n in range(50)), heads=20)
    draw_dropout(layers, 0.2, seed=0, step=1)
    entries = torch.stack([c.mask for c in layers.values()])
    assert sorted(entries.unique().tolist()) == [0.0, 1.25]
    assert (entries == 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert entries.mean().item() == pytest.approx(1, abs=0.0125)


def test_no_dropout_is_all_ones_and_clear_brings_them_back():
    """p = 0 drops nothing; clear_dropout undoes any draw."""
    layers = layers_named("a", "b")
    draw_dropout(layers, 0.0, seed=0, step=0)
    assert all(torch.equal(c.mask, torch.ones(5, 5)) for c in layers.values())
    draw_dropout(layers, 0.9, seed=0, step=0)
    assert all((c.mask == 0).any() for c in layers.values())
    clear_dropout(layers)
    assert all(torch.equal(c.mask, torch.ones(5, 5)) for c in layers.values())


def test_drawing_for_no_layers_is_nothing():
    """A LoRA without alpha has no masks."""
    draw_dropout({}, 0.5, seed=0, step=0)
    clear_dropout({})


def test_the_gradient_of_a_dropped_entry_is_zero():
    """deviation = mask * alpha, so d sum / d alpha is the mask itself."""
    layers = layers_named("a")
    draw_dropout(layers, 0.5, seed=0, step=0)
    layers["a"].deviation().sum().backward()
    assert torch.equal(layers["a"].alpha.grad, layers["a"].mask)


# Width


@pytest.mark.parametrize(
    "narrow",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(torch.float8_e4m3fn),
    ],
    ids=["half", "bfloat16", "to bfloat16", "to cpu float16", "to float8"],
)
def test_nothing_narrows_alpha(narrow):
    """A model cast as a whole keeps alpha, scale, mask in float32, and alpha the object that the optimizer holds."""
    model = nn.ModuleDict({"linear": nn.Linear(3, 5), "alpha": Coefficients(3)})
    coefficients = model["alpha"]
    nn.init.normal_(coefficients.alpha)
    draw_dropout({"a": coefficients}, 0.1, seed=0, step=0)
    parameter, before = coefficients.alpha, copy.deepcopy(coefficients)
    narrow(model)
    assert model["linear"].weight.element_size() < 4
    assert coefficients.alpha is parameter
    for name in ("alpha", "mask", "scale", "identity"):
        assert getattr(coefficients, name).dtype == torch.float32
        assert torch.equal(getattr(coefficients, name), getattr(before, name))


def test_double_widens_and_float_comes_back():
    """Wider is allowed: a float64 model has float64 alphas, and narrowing that to float32 is no loss of ours."""
    coefficients = Coefficients(3).double()
    assert {coefficients.alpha.dtype, coefficients.mask.dtype, coefficients.deviation().dtype} == {
        torch.float64
    }
    assert coefficients.float().alpha.dtype == torch.float32


def test_alpha_moves_to_another_device_as_float32():
    """Also when device and dtype change at once; meta stands for any device."""
    coefficients = Coefficients(3).to("meta", torch.bfloat16)
    assert {coefficients.alpha.device.type, coefficients.mask.device.type} == {"meta"}
    assert coefficients.alpha.dtype == torch.float32
