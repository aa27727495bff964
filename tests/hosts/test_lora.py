"""LoRA and DoRA beside alpha: what is adapted, what others' LoRAs keep, and the way back to the base model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from coeffdiff.errors import AdapterError, AdapterMismatch, ConfigError
from coeffdiff.hosts.lora import layers as lora
from coeffdiff.hosts.lora.layers import (
    add_lora,
    load_lora,
    lora_parameters,
    remove_lora,
    save_lora,
    set_lora_scale,
)
from coeffdiff.hosts.unet import attention_layers, inject
from coeffdiff.method.adapter_paths import LORA_FILE
from coeffdiff.utils.seeding import generator_for

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
LAYER = "mid_block.attentions.0.transformer_blocks.1.attn2"


@pytest.fixture
def unet(tiny_pipeline):
    return tiny_pipeline.unet


def wrapped(unet):
    return {name for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)}


def scattered(parameters, seed=0):
    """LoRA away from its start, where it is nothing: a B of zeros."""
    for name, parameter in parameters.items():
        drawn = torch.randn(parameter.shape, generator=generator_for(seed, name.replace(".default", "")))
        parameter.data += 0.2 * drawn
    return parameters


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    """saved(seed, **options): tensors of a LoRA that was trained somewhere, as its file holds them."""

    def make(seed=0, **options):
        unet = copy.deepcopy(tiny_pipeline.unet)
        scattered(add_lora(unet, **options), seed)
        save_lora(unet, tmp_path)
        return load_file(tmp_path / LORA_FILE)

    return make


def test_all_attention_projections_and_nothing_else(unet):
    """Four per attention layer; feed-forward, proj_in and convolutions are not touched."""
    add_lora(unet, rank=3, alpha=3)
    assert wrapped(unet) == {f"{layer}.{name}" for layer in attention_layers(unet) for name in PROJECTIONS}


def test_targets_choose_projections(unet):
    """Only what is asked for: queries and outputs, rank 5 here, so A is 5 x in and B is out x 5."""
    parameters = add_lora(unet, rank=5, alpha=5, targets=["to_q", "to_out.0"])
    assert wrapped(unet) == {
        f"{layer}.{name}" for layer in attention_layers(unet) for name in ("to_q", "to_out.0")
    }
    assert len(parameters) == 34 * 2 * 2
    for key, parameter in parameters.items():
        assert parameter.shape[0 if "lora_A" in key else 1] == 5


def test_a_name_outside_the_attention_layers_is_not_reached(unet):
    """The time embedding gets a linear called to_q; a target by its last name alone would adapt it."""
    unet.time_embedding.to_q = nn.Linear(3, 5)
    add_lora(unet, rank=3, alpha=3, targets=["to_q"])
    assert "time_embedding.to_q" not in wrapped(unet)


@pytest.mark.parametrize("target", ["to_w", "to_out", "to_out.1", "heads", ""])
def test_an_unknown_target_is_one_sentence(unet, target):
    """to_out is a list and to_out.1 a dropout: neither is linear."""
    with pytest.raises(
        ConfigError, match=rf"no attention layer has a linear '{target}'; SDXL has to_q, to_k, to_v and"
    ):
        add_lora(unet, rank=3, alpha=3, targets=["to_q", target])
    assert not wrapped(unet)


def test_the_start_is_the_base_model_and_depends_on_the_seed_only(tiny_pipeline, unet_call):
    """B is zero; A is drawn from the seed, whatever the global random state, which stays as it was."""
    base, drawn = unet_call(tiny_pipeline.unet), []
    for seed, noise in [(0, 1), (0, 2), (1, 1)]:
        unet = copy.deepcopy(tiny_pipeline.unet)
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        parameters = add_lora(unet, rank=3, alpha=3, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(unet_call(unet), base)
        drawn.append(torch.cat([p.flatten() for key, p in parameters.items() if "lora_A" in key]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_exactly_the_lora_is_trainable(unet):
    """The base is frozen, and what add_lora returns is all that learns."""
    parameters = add_lora(unet, rank=3, alpha=3)
    trainable = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert trainable.keys() == parameters.keys() == lora_parameters(unet).keys()
    assert all(trainable[name] is parameters[name] for name in trainable)


def test_what_a_lora_computes_by_hand(unet):
    """W + scale * alpha / rank * B A: with ones in A and B, rank 3 and alpha 6 it adds 6 to each entry of W."""
    projection = attention_layers(unet)[LAYER].to_q
    tokens = torch.randn(2, 7, projection.in_features, generator=generator_for(0))
    base = projection(tokens)
    for parameter in add_lora(unet, rank=3, alpha=6).values():
        nn.init.ones_(parameter)
    adapted, added = attention_layers(unet)[LAYER].to_q, tokens.sum(-1, keepdim=True)
    torch.testing.assert_close(adapted(tokens), base + 6 * added, rtol=1e-4, atol=1e-4)
    set_lora_scale(unet, "default", 0.5)
    torch.testing.assert_close(adapted(tokens), base + 3 * added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_scale_zero_and_removal_give_the_base_model_bit_for_bit(unet, unet_call, dora):
    """And after removal the very modules of before are back, all plain nn.Linear."""
    base, before, state = unet_call(unet), dict(unet.named_modules()), list(unet.state_dict())
    scattered(add_lora(unet, rank=3, alpha=3, dora=dora))
    trained = unet_call(unet)
    assert not torch.allclose(trained, base, atol=0.01)
    set_lora_scale(unet, "default", 0.0)
    assert torch.equal(unet_call(unet), base)
    set_lora_scale(unet, "default", 1.0)
    assert torch.equal(unet_call(unet), trained)
    remove_lora(unet, "default")
    assert torch.equal(unet_call(unet), base)
    assert dict(unet.named_modules()) == before and list(unet.state_dict()) == state
    assert type(attention_layers(unet)[LAYER].to_q) is nn.Linear
    assert not getattr(unet, "peft_config", None)


def test_dora_learns_a_magnitude_per_output(unet):
    """One number per output of each projection, beside A and B."""
    parameters = add_lora(unet, rank=3, alpha=3, dora=True, targets=["to_v"])
    magnitudes = {key: p for key, p in parameters.items() if "magnitude" in key}
    assert len(parameters) == 3 * 34 and len(magnitudes) == 34
    assert all(p.requires_grad for p in magnitudes.values())
    assert magnitudes[f"{LAYER}.to_v.lora_magnitude_vector.default.weight"].shape == (24,)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_was_saved_is_what_arrives(tiny_pipeline, unet_call, tmp_path, dora):
    """Through the file, with an alpha that is not the rank: equal output, bit for bit."""
    unet = copy.deepcopy(tiny_pipeline.unet)
    scattered(add_lora(unet, rank=3, alpha=7, dora=dora))
    trained = unet_call(unet)
    save_lora(unet, tmp_path)
    loaded = tiny_pipeline.unet
    load_lora(loaded, load_file(tmp_path / LORA_FILE), "x", rank=3, alpha=7, dora=dora, origin="f")
    assert torch.equal(unet_call(loaded), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_in_half_precision_too_what_is_loaded_is_what_was_trained(
    tiny_pipeline, unet_call, tmp_path, dora, dtype
):
    """Training holds LoRA in float32 beside a half-precision UNet: so does loading, number for number, and the
    outputs, in the UNet's own type, are equal bit for bit. Without it the UNet is what it was."""
    loaded, unet = (copy.deepcopy(tiny_pipeline.unet).to(dtype) for _ in range(2))
    base = unet_call(loaded)
    parameters = add_lora(unet, rank=3, alpha=7, dora=dora)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    scattered(parameters)
    trained = unet_call(unet)
    save_lora(unet, tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    load_lora(loaded, tensors, "x", rank=3, alpha=7, dora=dora, origin="f")
    arrived = lora_parameters(loaded, "x")
    assert len(arrived) == len(parameters)
    for key, parameter in parameters.items():
        assert torch.equal(arrived[key.replace(".default.", ".x.")], parameter)
    assert trained.dtype == base.dtype == dtype and not torch.equal(trained, base)
    assert torch.equal(unet_call(loaded), trained)
    set_lora_scale(loaded, "x", 0.0)
    assert torch.equal(unet_call(loaded), base)
    remove_lora(loaded, "x")
    assert torch.equal(unet_call(loaded), base) and not wrapped(loaded)


def test_two_loras_add_up_and_come_off_one_by_one(unet, saved, unet_call):
    """PEFT activates a new one alone, and an inactive one when the active one goes; neither may happen here."""
    base = unet_call(unet)
    first, second = saved(1, rank=3, alpha=3), saved(2, rank=5, alpha=5, targets=["to_v"])
    load_lora(unet, first, "first", rank=3, alpha=3, dora=False, origin="f")
    alone = unet_call(unet)
    load_lora(unet, second, "second", rank=5, alpha=5, dora=False, origin="f")

    tokens = torch.randn(2, 7, 48, generator=generator_for(0))
    projection = attention_layers(unet)[LAYER].to_v
    expected = projection.base_layer(tokens)
    for tensors in (first, second):
        down, up = (tensors[f"unet.{LAYER}.to_v.lora.{part}.weight"] for part in ("down", "up"))
        expected = expected + tokens @ down.T @ up.T
    torch.testing.assert_close(projection(tokens), expected, rtol=1e-4, atol=1e-5)

    set_lora_scale(unet, "second", 0.0)
    assert torch.equal(unet_call(unet), alone)
    set_lora_scale(unet, "first", 0.0)
    set_lora_scale(unet, "second", 1.0)
    remove_lora(unet, "second")  # the first is still there, at scale 0
    assert torch.equal(unet_call(unet), base)
    set_lora_scale(unet, "first", 1.0)
    assert torch.equal(unet_call(unet), alone)
    remove_lora(unet, "first")
    assert torch.equal(unet_call(unet), base) and not wrapped(unet)


def test_training_a_second_lora_leaves_the_first_as_it_is(unet, saved, unet_call):
    """It goes on working, frozen, under the new one, of which all is trainable."""
    load_lora(unet, saved(rank=3, alpha=3), "first", rank=3, alpha=3, dora=False, origin="f")
    alone = unet_call(unet)
    parameters = add_lora(unet, "second", rank=5, alpha=5)
    assert torch.equal(unet_call(unet), alone)  # the new B is zero
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(parameters)


def test_removing_what_is_not_there_is_nothing(unet, unet_call):
    """remove_lora is also the clean-up after a load that failed early."""
    base = unet_call(unet)
    remove_lora(unet, "never")
    assert torch.equal(unet_call(unet), base) and not wrapped(unet)


# Refusals: the UNet is untouched after each


@pytest.fixture
def refused(unet, unet_call):
    base = unet_call(unet)

    def check(tensors, error, match, rank=3, dora=False):
        with pytest.raises(error, match=match):
            load_lora(unet, tensors, "x", rank=rank, alpha=3, dora=dora, origin="some/file")
        assert not wrapped(unet) and torch.equal(unet_call(unet), base)

    return check


KEY = f"unet.{LAYER}.to_k.lora"


def test_tensors_that_are_no_lora_are_refused(saved, refused):
    """Foreign keys, a half pair, nothing at all, DoRA without its magnitudes, plain LoRA with them."""
    good, dora = saved(rank=3, alpha=3), saved(rank=3, alpha=3, dora=True)
    refused(
        good | {"te.what": torch.ones(1)}, AdapterError, r"some/file is not a LoRA of this layout: te\.what"
    )
    refused(
        {k: t for k, t in good.items() if k != f"{KEY}.up.weight"}, AdapterError, "not a LoRA of this layout"
    )
    refused(
        {k: t for k, t in good.items() if k != f"{KEY}.down.weight"},
        AdapterError,
        "not a LoRA of this layout",
    )
    refused({}, AdapterError, r"some/file is not a LoRA of this layout: it is empty")
    refused(good, AdapterError, r"not a LoRA of this layout: .*lora_magnitude_vector", dora=True)
    refused(dora, AdapterError, r"not a LoRA of this layout: .*lora_magnitude_vector")


def test_tensors_of_another_unet_are_refused(saved, refused):
    """A layer that is not there, one that is no linear, a width that differs, a rank other than promised."""
    good = saved(rank=3, alpha=3)

    def renamed(old, new):
        return {key.replace(old, new): tensor for key, tensor in good.items()}

    refused(
        renamed("mid_block", "mid_block.9"),
        AdapterMismatch,
        r"adapts unet\.mid_block\.9\..* no linear layer of this",
    )
    refused(
        renamed(f"{LAYER}.to_k", f"{LAYER}.to_out.1"), AdapterMismatch, r"to_out\.1, which is no linear layer"
    )
    wide = good | {f"{KEY}.down.weight": torch.zeros(3, 49)}
    refused(wide, AdapterMismatch, r"lora_A\.weight is \(3, 49\), but this UNet needs \(3, 48\)")
    refused(good, AdapterMismatch, r"is \(3, \d+\), but this UNet needs \(4, \d+\)", rank=4)


def test_a_tensor_that_does_not_arrive_is_noticed(saved, refused, monkeypatch):
    """Should diffusers or PEFT leave one out, or change it, that is an error and not a weaker adapter."""
    good, read = saved(rank=3, alpha=3), lora.get_peft_model_state_dict
    key = f"{LAYER}.to_k.lora_A.weight"

    def lossy(*args, **options):
        return {k: t for k, t in read(*args, **options).items() if k != key}

    monkeypatch.setattr(lora, "get_peft_model_state_dict", lossy)
    refused(good, AdapterError, rf"some/file: unet\.{key} did not reach the UNet")
    monkeypatch.setattr(
        lora, "get_peft_model_state_dict", lambda *a, **o: read(*a, **o) | {key: torch.zeros(3, 48)}
    )
    refused(good, AdapterError, rf"some/file: unet\.{key} did not reach the UNet")


def test_a_load_that_breaks_half_way_switches_no_other_lora(unet, saved, unet_call, monkeypatch):
    """Whatever PEFT did before it failed, the LoRA that was there works as before, and removal cleans up."""
    base = unet_call(unet)
    first, second = saved(1, rank=3, alpha=3), saved(2, rank=5, alpha=5)
    load_lora(unet, first, "first", rank=3, alpha=3, dora=False, origin="f")
    alone = unet_call(unet)

    def broken(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("peft.set_peft_model_state_dict", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_lora(unet, second, "second", rank=5, alpha=5, dora=False, origin="f")
    monkeypatch.undo()
    remove_lora(unet, "second")
    assert torch.equal(unet_call(unet), alone)
    load_lora(unet, second, "second", rank=5, alpha=5, dora=False, origin="f")
    remove_lora(unet, "second")
    assert torch.equal(unet_call(unet), alone)
    remove_lora(unet, "first")
    assert torch.equal(unet_call(unet), base) and not wrapped(unet)


def test_alpha_beside_lora(unet, unet_call, saved):
    """Mixing uses the adapted projections: both together differ from either, in any order of putting on."""
    base = unet_call(unet)
    load_lora(unet, saved(rank=3, alpha=3), "x", rank=3, alpha=3, dora=False, origin="f")
    only_lora = unet_call(unet)
    layers = inject(unet)
    for name, coefficients in layers.items():
        nn.init.normal_(coefficients.alpha, std=0.3, generator=generator_for(name))
    both = unet_call(unet)
    remove_lora(unet, "x")
    only_alpha = unet_call(unet)
    load_lora(unet, saved(rank=3, alpha=3), "x", rank=3, alpha=3, dora=False, origin="f")
    assert torch.equal(unet_call(unet), both)
    outputs = [base, only_lora, only_alpha, both]
    assert all((one - other).abs().max() > 0.01 for n, one in enumerate(outputs) for other in outputs[:n])


def test_the_stock_file_needs_nothing_of_ours(saved, tiny_pipeline, unet_call, tmp_path):
    """Written by hand in diffusers' layout, without our metadata, it arrives as well: rank and alpha are the header's."""
    good = saved(rank=3, alpha=7)
    save_file(good, tmp_path / "bare.safetensors")
    load_lora(tiny_pipeline.unet, good, "x", rank=3, alpha=7, dora=False, origin="f")
    with_metadata = unet_call(tiny_pipeline.unet)
    remove_lora(tiny_pipeline.unet, "x")
    load_lora(
        tiny_pipeline.unet,
        load_file(tmp_path / "bare.safetensors"),
        "x",
        rank=3,
        alpha=7,
        dora=False,
        origin="f",
    )
    assert torch.equal(unet_call(tiny_pipeline.unet), with_metadata)
