"""alpha on a UNet: what is found, what is left untouched, what displaces it, and that it learns."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from coeffdiff.errors import ConfigError, InjectionError
from coeffdiff.hosts import summed_alphas
from coeffdiff.hosts.guard import unwrapped, verify
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import (
    MixedAttnProcessor,
    attention_layers,
    coefficients_of,
    eject,
    inject,
    injected_names,
    select_layers,
    set_scale,
)
from coeffdiff.method.coefficients import draw_dropout
from coeffdiff.pocket.model import build_unet
from coeffdiff.utils.seeding import generator_for

SELF = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
CROSS = "up_blocks.0.attentions.2.transformer_blocks.1.attn2"


def scatter(layers, std=0.3, seed=0):
    """Alphas away from zero, the same for the same layer names."""
    for name, coefficients in layers.items():
        drawn = torch.randn(coefficients.alpha.shape, generator=generator_for(seed, name))
        coefficients.alpha.data.copy_(drawn * std)
    return layers


def processors(unet):
    return {name: layer.processor for name, layer in attention_layers(unet).items()}


@pytest.fixture
def unet(tiny_pipeline):
    return tiny_pipeline.unet


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# What is found


@pytest.fixture(scope="module")
def sdxl():
    """SDXL's public config: shapes without memory."""
    return build_unet("sdxl", device="meta")


def count(layers):
    return len(layers), sum(c.alpha.numel() for c in layers.values())


def test_sdxl_has_140_layers_and_50_000_coefficients(sdxl):
    """20 layers of 10 heads and 120 of 20: 20 * 100 + 120 * 400, which is 0.00195 % of 2,567,463,684."""
    base = sum(p.numel() for p in sdxl.parameters())
    layers = inject(sdxl)
    eject(sdxl)
    assert base == 2_567_463_684
    assert count(layers) == (140, 50_000)
    assert f"{50_000 / base:.5%}" == "0.00195%"


@pytest.mark.parametrize("targets", ["self", "cross"])
def test_self_and_cross_are_half_each(sdxl, targets):
    """70 layers and 25,000 coefficients; self-attention is diffusers' attn1, cross-attention its attn2."""
    layers = inject(sdxl, targets=targets)
    eject(sdxl)
    assert count(layers) == (70, 25_000)
    assert {name.rpartition(".")[2] for name in layers} == {"attn1" if targets == "self" else "attn2"}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (["mid_block"], (20, 8_000)),  # 10 transformer blocks, 2 layers of 20 heads each
        (["down_blocks.1"], (8, 800)),  # 2 x 2 transformer blocks, 10 heads
        (["down_blocks.1", "mid_block"], (28, 8_800)),
        (["mid_block", "mid_block.attentions.0"], (20, 8_000)),  # named twice, taken once
        ([SELF], (1, 100)),
    ],
)
def test_any_subset_of_blocks(sdxl, blocks, expected):
    """A block is the beginning of a layer's name; an iterator of blocks will do."""
    layers = inject(sdxl, blocks=iter(blocks))
    eject(sdxl)
    assert count(layers) == expected


def test_an_unknown_block_gets_a_hint(unet):
    """Names are compared part by part, so "mid" is no prefix of mid_block."""
    with pytest.raises(
        ConfigError, match=r"No attention layer lies in block 'mid'\. Did you mean mid_block\?"
    ):
        select_layers(unet, blocks=["mid"])
    with pytest.raises(ConfigError, match=r"block 'down_blocks\.9'\. Did you mean down_blocks\.\d\?"):
        inject(unet, blocks=["down_blocks.1", "down_blocks.9"])
    with pytest.raises(ConfigError, match=r"block '###'\.$"):
        select_layers(unet, blocks=["###"])
    with pytest.raises(ConfigError, match=r"No attention layer is left for targets 'cross' in blocks"):
        select_layers(unet, "cross", [SELF])
    assert injected_names(unet) == set()


def test_layer_names_are_free_of_wrappers(unet):
    """A compiled UNet's layers have the UNet's own names, or a checkpoint would fit only one of them."""
    compiled = torch.compile(unet, backend="eager")
    assert unwrapped(compiled) is unet
    layers = inject(compiled)
    assert list(layers) == list(attention_layers(unet)) == list(attention_layers(compiled))
    assert coefficients_of(unet) == layers


# The base model stays the base model


@pytest.mark.parametrize("how", ["scale 0", "ejected"])
def test_scale_zero_and_ejecting_give_the_base_model_bit_for_bit(unet, unet_call, how):
    """A layer without alpha runs the very processor that it had before."""
    before, names, base = processors(unet), list(unet.state_dict()), unet_call(unet)
    scatter(inject(unet))
    assert not torch.allclose(unet_call(unet), base, atol=0.01)
    if how == "scale 0":
        set_scale(unet, 0.0)
    else:
        eject(unet)
        assert processors(unet) == before  # the same objects: processors do not define ==
        assert list(unet.state_dict()) == names
        assert not unet._forward_pre_hooks
    assert torch.equal(unet_call(unet), base)


def test_scale_comes_back_from_zero(unet, unet_call):
    """0 is no one-way street, and 1/2 is what half of alpha would do."""
    layers = scatter(inject(unet))
    full = unet_call(unet)
    set_scale(unet, 0.0)
    set_scale(unet, 0.5)
    half = unet_call(unet)
    set_scale(unet, 1.0)
    assert torch.equal(unet_call(unet), full)
    for coefficients in layers.values():
        coefficients.alpha.data.mul_(0.5)
    assert torch.equal(unet_call(unet), half)


@pytest.mark.parametrize("mixes", ["maps", "values"])
def test_the_start_is_the_base_model(unet, unet_call, mixes):
    """alpha = 0 at scale 1 runs our attention, not the original, and gives the same up to rounding."""
    base = unet_call(unet)
    inject(unet, mixes=mixes)
    torch.testing.assert_close(unet_call(unet), base, rtol=1e-4, atol=1e-5)


def test_layers_outside_the_targets_keep_their_processors(unet):
    """alpha on cross-attention leaves self-attention alone."""
    before = processors(unet)
    chosen = inject(unet, targets="cross")
    for name, processor in processors(unet).items():
        assert isinstance(processor, MixedAttnProcessor) if name in chosen else processor is before[name]


def test_two_alphas_add_up(unet, unet_call):
    """I + a + b runs as one alpha a + b; each can be switched and taken off alone."""
    base = unet_call(unet)
    first, second = (
        scatter(inject(unet, "first"), seed=1),
        scatter(inject(unet, "second", targets="self"), seed=2),
    )
    both = unet_call(unet)
    assert injected_names(unet) == {"first", "second"}
    set_scale(unet, 0.0, "second")
    only_first = unet_call(unet)
    set_scale(unet, 1.0, "second")
    eject(unet, "first")
    only_second = unet_call(unet)
    eject(unet, "second")
    assert torch.equal(unet_call(unet), base)

    total = inject(unet)
    for name, coefficients in total.items():
        coefficients.alpha.data.copy_(first[name].alpha + (second[name].alpha if name in second else 0))
    torch.testing.assert_close(unet_call(unet), both, rtol=1e-4, atol=1e-4)
    for name, coefficients in total.items():
        coefficients.alpha.data.copy_(first[name].alpha)
    assert torch.equal(unet_call(unet), only_first)
    for name, coefficients in total.items():
        coefficients.alpha.data.copy_(
            second[name].alpha if name in second else torch.zeros_like(coefficients.alpha)
        )
    torch.testing.assert_close(unet_call(unet), only_second, rtol=1e-4, atol=1e-4)


def with_mixed_weights(unet, layers):
    """A copy whose W_v do what these alphas do to values, and that holds no alpha: W_v[h] = sum_g coeff[h, g] W_v[g]."""
    twin = copy.deepcopy(unet)
    eject(twin)
    for name, coefficients in layers.items():
        weight = attention_layers(twin)[name].to_v.weight
        coeff = (coefficients.identity + coefficients.deviation()).detach().to(weight.dtype)
        by_head = weight.detach().unflatten(0, (coefficients.heads, -1))
        weight.data = torch.einsum("hg,gdc->hdc", coeff, by_head).flatten(0, 1)
    return twin


def test_mixed_values_are_mixed_weights(unet, unet_call):
    """On every layer, self and cross: ordinary attention with other W_v, and nothing that mixed maps compute."""
    layers = scatter(inject(unet, mixes="values"))
    unet.double()
    as_values, merged = unet_call(unet), with_mixed_weights(unet, layers)
    torch.testing.assert_close(as_values, unet_call(merged), rtol=1e-10, atol=1e-10)
    eject(unet)
    scatter(inject(unet))
    assert (unet_call(unet) - as_values).abs().max() > 0.01


def test_mixed_values_meet_mixed_maps(unet, unet_call):
    """Together they are the one's maps over the other's W_v; each can be switched alone."""
    values = scatter(inject(unet, "of values", mixes="values"), seed=1)
    unet.double()
    only_values, merged = unet_call(unet), with_mixed_weights(unet, values)
    for network in (unet, merged):
        scatter(inject(network, "of maps", targets="self"), seed=2)
    together = unet_call(unet)
    torch.testing.assert_close(together, unet_call(merged), rtol=1e-6, atol=1e-6)
    assert (together - only_values).abs().max() > 0.01
    set_scale(unet, 0.0, "of maps")
    assert torch.equal(unet_call(unet), only_values)
    set_scale(unet, 1.0, "of maps")
    assert torch.equal(unet_call(unet), together)


def test_a_name_is_taken_once(unet):
    """A second alpha under the same name would overwrite the first."""
    inject(unet, targets="self")
    with pytest.raises(InjectionError, match=r"already has an alpha called 'default'"):
        inject(unet, targets="cross")


def test_layers_by_name(unet):
    """`layers` takes the place of targets and blocks; a layer that is not there is named."""
    assert set(inject(unet, layers=[SELF, CROSS])) == {SELF, CROSS}
    with pytest.raises(InjectionError, match=r"no attention layer mid_block\.attn9 \(1 are missing in all\)"):
        inject(unet, "other", layers=[SELF, "mid_block.attn9"])
    assert injected_names(unet) == {"default"}


def test_an_unknown_backend_is_refused_before_anything_changes(unet):
    """A typing mistake in a recipe, found at once."""
    with pytest.raises(ConfigError, match=r"no attention backend 'flsh'; there are auto, reference"):
        inject(unet, backend="flsh")
    assert not any(isinstance(p, MixedAttnProcessor) for p in processors(unet).values())


def backends(unet):
    return {layer: p.backend for layer, p in processors(unet).items() if isinstance(p, MixedAttnProcessor)}


def test_alphas_on_a_layer_share_the_backend_that_one_of_them_names(unet):
    """They are mixed in one computation: the first may leave it open, and two different ones are refused."""
    inject(unet, "open", layers=[SELF, CROSS])
    inject(unet, "chunked", layers=[SELF], backend="chunked")
    assert backends(unet) == {SELF: "chunked", CROSS: "auto"}
    inject(unet, "reference", layers=[CROSS], backend="reference")
    with pytest.raises(ConfigError, match=r"attn1 .* by the backend 'chunked', not 'reference' as well"):
        inject(unet, "other", layers=[CROSS, SELF], backend="reference")
    assert injected_names(unet) == {"open", "chunked", "reference"}
    assert backends(unet) == {SELF: "chunked", CROSS: "reference"}
    eject(unet, "chunked")
    assert backends(unet) == {SELF: "auto", CROSS: "reference"}
    inject(unet, "other", layers=[CROSS, SELF], backend="reference")
    assert set(backends(unet).values()) == {"reference"}


def test_the_random_form_depends_on_seed_and_layer_name_only(unet):
    """Two layers of a size differ, and so do two seeds; the set of layers does not matter."""
    every = inject(unet, "every", form="random", seed=3)
    few = inject(unet, "few", form="random", seed=3, layers=[CROSS])
    other = inject(unet, "other", form="random", seed=4, layers=[CROSS])
    neighbour = CROSS.replace("blocks.1.attn2", "blocks.0.attn2")
    assert torch.equal(every[CROSS].alpha, few[CROSS].alpha)
    assert not torch.equal(few[CROSS].alpha, other[CROSS].alpha)
    assert not torch.equal(every[CROSS].alpha, every[neighbour].alpha)


def test_a_copy_lives_its_own_life(unet, unet_call):
    """deepcopy takes alpha, registry and guard along, and shares none of them."""
    base = unet_call(unet)
    scatter(inject(unet))
    trained = unet_call(unet)
    twin = copy.deepcopy(unet)
    assert torch.equal(unet_call(twin), trained)
    scatter(coefficients_of(twin), seed=9)
    assert torch.equal(unet_call(unet), trained) and not torch.equal(unet_call(twin), trained)
    twin.set_attention_slice("max")
    with pytest.raises(InjectionError, match="attention slicing"):
        unet_call(twin)
    assert torch.equal(unet_call(unet), trained)
    eject(unet)
    assert torch.equal(unet_call(unet), base)
    assert injected_names(twin) == {"default"} and twin._forward_pre_hooks and not unet._forward_pre_hooks


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_unet_keeps_alpha_wide(unet, narrow):
    """.to(dtype) of the whole UNet, before or after; a layer's output has the UNet's dtype."""
    nn.Module.to(unet, narrow)  # diffusers' own .to warns that CPUs are slow at float16
    inject(unet)
    nn.Module.to(unet, narrow)
    assert {c.alpha.dtype for c in coefficients_of(unet).values()} == {torch.float32}
    layer = attention_layers(unet)[SELF]
    tokens = torch.randn(2, 5, layer.to_q.in_features, generator=generator_for(0)).to(narrow)
    assert layer(tokens).dtype == narrow


def test_alpha_survives_sequential_offloading(unet, unet_call):
    """Accelerate leaves all weights on the meta device and fetches each module's when it is called; alpha's too."""
    scatter(inject(unet))
    set_scale(unet, 0.7)
    with torch.no_grad():
        before = unet_call(unet)
        cpu_offload(unet, torch.device("cpu"))
        assert {c.alpha.device.type for c in coefficients_of(unet).values()} == {"meta"}
        assert torch.equal(unet_call(unet), before)


def test_masks_reach_the_maps(unet, unet_call, unet_inputs):
    """With alpha = 0 a masked call is the base model's masked call: per prompt in cross, per key in self."""
    kept = torch.arange(2 * 77).view(2, 77) % 3 != 1
    inputs = unet_inputs(unet) | {"encoder_attention_mask": kept}
    layer, tokens = attention_layers(unet)[SELF], torch.randn(2, 5, 32, generator=generator_for(0))
    tokens = tokens[..., : layer.to_q.in_features]
    mask = torch.zeros(2, 1, 5).masked_fill(torch.arange(10).view(2, 1, 5) % 4 == 1, -10_000.0)
    want, want_layer = unet(**inputs).sample, layer(tokens, attention_mask=mask)
    assert not torch.allclose(want, unet_call(unet), atol=1e-3)
    assert not torch.allclose(want_layer, layer(tokens), atol=1e-3)
    inject(unet)
    torch.testing.assert_close(unet(**inputs).sample, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(tokens, attention_mask=mask), want_layer, rtol=1e-4, atol=1e-5)


def test_head_zero_receives_in_a_layer():
    """Through the processor too, rows receive: alpha[0, 1] = 1 changes the first head's channels and no others."""
    layer = Attention(query_dim=6, heads=3, dim_head=2)
    layer.to_out[0] = nn.Identity()
    model = nn.ModuleDict({"attn": layer})
    tokens = torch.randn(2, 5, 6, generator=generator_for(0))
    base = layer(tokens)
    inject(model)["attn"].alpha.data[0, 1] = 1.0
    changed = (layer(tokens) - base).abs().amax((0, 1)) > 1e-4
    assert changed.tolist() == [True, True, False, False, False, False]


# What displaces alpha


def ip_adapter(unet):
    """An IP-Adapter's weights, in its own file layout, for this UNet."""
    width, found = unet.config.cross_attention_dim, {}
    for number, (name, layer) in enumerate(attention_layers(unet).items()):
        if name.endswith("attn2"):
            found[f"{number}.to_k_ip.weight"] = torch.zeros(layer.to_k.out_features, width)
            found[f"{number}.to_v_ip.weight"] = torch.zeros(layer.to_k.out_features, width)
    image_proj = {"proj.weight": (4 * width, 11), "proj.bias": (4 * width,)}
    image_proj |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {"image_proj": {key: torch.zeros(shape) for key, shape in image_proj.items()}, "ip_adapter": found}


def load_ip_adapter(pipe):
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)


DISPLACED = {
    "slicing": (lambda pipe: pipe.enable_attention_slicing(), "attention slicing.*SlicedAttnProcessor"),
    "slicing and back": (
        lambda pipe: (pipe.enable_attention_slicing(), pipe.disable_attention_slicing()),
        "another attention processor put AttnProcessor2_0",
    ),
    "fusing": (lambda pipe: pipe.fuse_qkv_projections(vae=False), "QKV fusing.*FusedAttnProcessor2_0"),
    "default": (lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()), "another.*put AttnProcessor in"),
    "IP-Adapter": (load_ip_adapter, "loading an IP-Adapter put IPAdapterAttnProcessor2_0 in its place"),
}


@pytest.mark.parametrize("which", DISPLACED)
def test_displaced_alpha_is_noticed_at_the_next_forward(which, tiny_pipeline, unet_call):
    """What diffusers itself does to processors: named, counted, with a layer and what to do."""
    unet = tiny_pipeline.unet
    displace, culprit = DISPLACED[which]
    inject(unet, targets="cross")
    unet_call(unet)
    displace(tiny_pipeline)
    sentence = rf"alpha is gone from 17 of 17 attention layers \(down_blocks\.1\..*attn2, \.\.\.\): {culprit}"
    with pytest.raises(InjectionError, match=sentence):
        unet_call(unet)
    with pytest.raises(InjectionError, match=r"Undo that, or load the adapter again without it\."):
        verify(unet)
    with pytest.raises(InjectionError, match=sentence):
        inject(unet, "another")


def test_one_displaced_layer_is_enough(unet, unet_call):
    """1 of 34, and by its name."""
    inject(unet)
    attention_layers(unet)[CROSS].set_processor(AttnProcessor2_0())
    with pytest.raises(InjectionError, match=rf"alpha is gone from 1 of 34 attention layers \({CROSS}"):
        unet_call(unet)


def test_loading_an_ip_adapter_over_self_attention_is_refused_there_and_then(tiny_pipeline, unet_call):
    """diffusers makes self-attention's processors anew from their class; alpha stays, and still works."""
    scatter(inject(tiny_pipeline.unet))
    before = unet_call(tiny_pipeline.unet)
    with pytest.raises(
        InjectionError, match=r"Loading an IP-Adapter replaces .* remove the coeffdiff adapter first"
    ):
        load_ip_adapter(tiny_pipeline)
    assert torch.equal(unet_call(tiny_pipeline.unet), before)


def test_undoing_what_displaced_alpha_is_enough(tiny_pipeline, unet_call):
    """unfuse_qkv_projections puts back the processors that hold alpha."""
    unet = tiny_pipeline.unet
    scatter(inject(unet))
    before = unet_call(unet)
    tiny_pipeline.fuse_qkv_projections(vae=False)
    tiny_pipeline.unfuse_qkv_projections(vae=False)
    assert torch.equal(unet_call(unet), before)


def test_ejecting_displaced_alpha_leaves_what_displaced_it(tiny_pipeline, unet_call):
    """Slicing that came later stays when alpha goes, and the guard goes with alpha."""
    inject(tiny_pipeline.unet)
    tiny_pipeline.enable_attention_slicing()
    eject(tiny_pipeline.unet)
    assert {type(p).__name__ for p in processors(tiny_pipeline.unet).values()} == {"SlicedAttnProcessor"}
    unet_call(tiny_pipeline.unet)


@pytest.mark.parametrize("occupied", ["IP-Adapter", "fusing"])
def test_alpha_does_not_take_the_place_of_other_attention(occupied, tiny_pipeline):
    """On an IP-Adapter or fused UNet alpha would silently switch off what is there."""
    DISPLACED[occupied][0](tiny_pipeline)
    before = processors(tiny_pipeline.unet)
    with pytest.raises(
        InjectionError, match=r"runs (IPAdapter|Fused)AttnProcessor2_0, which is not plain attention"
    ):
        inject(tiny_pipeline.unet)
    assert processors(tiny_pipeline.unet) == before
    assert injected_names(tiny_pipeline.unet) == set()


def test_an_ip_adapter_on_the_other_layers_is_no_obstacle(tiny_pipeline):
    """alpha on self-attention and an IP-Adapter on cross-attention do not meet, if the IP-Adapter came first."""
    load_ip_adapter(tiny_pipeline)
    assert len(inject(tiny_pipeline.unet, targets="self")) == 17
    kept = [p for p in processors(tiny_pipeline.unet).values() if isinstance(p, IPAdapterAttnProcessor2_0)]
    assert len(kept) == 17


def test_slicing_before_injection_is_replaced_and_comes_back(tiny_pipeline, unet_call):
    """Sliced attention is plain attention, so alpha may take its place, and give it back."""
    unet = tiny_pipeline.unet
    tiny_pipeline.enable_attention_slicing()
    base = unet_call(unet)
    inject(unet)
    torch.testing.assert_close(unet_call(unet), base, rtol=1e-4, atol=1e-5)
    eject(unet)
    assert {type(p).__name__ for p in processors(unet).values()} == {"SlicedAttnProcessor"}


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"norm_num_groups": 2}, "group_norm"),
        ({"residual_connection": True}, "residual_connection"),
        ({"cross_attention_norm": "layer_norm"}, "norm_cross"),
        ({"rescale_output_factor": 2.0}, "rescale_output_factor"),
        ({"qk_norm": "layer_norm"}, "norm_q, norm_k"),
    ],
)
def test_layers_unlike_sdxl_s_are_refused(options, extra):
    """The processor does none of these; leaving one out would be silent."""
    model = nn.ModuleDict({"odd": Attention(query_dim=6, heads=3, dim_head=2, **options)})
    with pytest.raises(InjectionError, match=f"odd is not an attention layer of SDXL's kind: it has {extra}"):
        inject(model)


# Training


def test_alpha_is_trainable_after_lora_and_frozen_before(unet):
    """Why the order matters: the first PEFT call freezes all it did not make, alpha included."""
    early = inject(unet, "early")
    add_lora(unet, rank=3, alpha=3)
    assert not any(c.alpha.requires_grad for c in early.values())  # the trap
    late = inject(unet, "late")
    assert all(c.alpha.requires_grad for c in late.values())
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trainable) == 34 * 4 * 2 + 34
    assert all("lora_" in name or name.endswith("processor.adapters.late.alpha") for name in trainable)


def test_alpha_s_gradient_is_the_finite_difference_through_the_unet(unet, unet_call):
    """Central differences in float64, in self- and cross-attention of every block, under dropout and scale."""
    layers = scatter(inject(unet))
    unet.double()
    draw_dropout(layers, 0.2, seed=0, step=1)
    set_scale(unet, 0.7)
    target = torch.sin(torch.arange(4 * 64, dtype=torch.float64)).view(1, 4, 8, 8)

    def loss():
        return (unet_call(unet, batch=1) - target).square().mean()

    loss().backward()
    chosen = [
        name for name in layers if name.startswith(("down_blocks.1.attentions.1", "mid_block", "up_blocks.1"))
    ]
    checked, step = 0, 1e-5
    with torch.no_grad():
        for number, name in enumerate([SELF, CROSS, *chosen]):
            coefficients = layers[name]
            row, column = number % coefficients.heads, (number + 1) // 2 % coefficients.heads
            original, gradient = (
                coefficients.alpha[row, column].item(),
                coefficients.alpha.grad[row, column].item(),
            )
            values = []
            for sign in (1, -1):
                coefficients.alpha[row, column] = original + sign * step
                values.append(loss().item())
            coefficients.alpha[row, column] = original
            difference = (values[0] - values[1]) / (2 * step)
            assert gradient == pytest.approx(difference, rel=1e-5, abs=1e-9), (name, row, column)
            if coefficients.mask[row, column] == 0:
                assert gradient == 0
            checked += abs(gradient) > 1e-6
    assert checked >= 8


def overfit(unet, inputs, parameters, rate, steps):
    """Losses of Adam with a falling rate on one fixed latent, noise and timestep."""
    latent = inputs["sample"]
    noise = torch.randn(latent.shape, generator=generator_for("noise"))
    inputs = inputs | {"sample": (latent + noise) / 2**0.5}
    optimizer = torch.optim.Adam(parameters, rate, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = (unet(**inputs).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lora_overfits_one_sample(micro_pipeline, unet_inputs):
    """Below 20 % of its first loss on a 4 x 4 latent: a merely falling loss on random weights proves nothing."""
    unet = micro_pipeline.unet
    parameters = add_lora(unet, rank=8, alpha=32).values()
    losses = overfit(unet, unet_inputs(unet, batch=1, side=4), parameters, rate=1e-2, steps=150)
    assert losses[-1] < 0.2 * losses[0]


def test_alpha_learns_one_sample(unet, unet_inputs):
    """Its 424 numbers cannot overfit what random weights do, but they take off a quarter of the loss in 40 steps."""
    parameters = [c.alpha for c in inject(unet).values()]
    assert sum(p.numel() for p in parameters) == 10 * 2 * 2 + 24 * 4 * 4
    losses = overfit(unet, unet_inputs(unet, batch=1), parameters, rate=5e-2, steps=40)
    assert losses[-1] < 0.75 * losses[0]


def test_gradient_checkpointing_repeats_the_gradients_bit_for_bit(unet, unet_call, monkeypatch):
    """With dropout on alpha and with LoRA: what is recomputed has the same mask, since the mask is a buffer."""
    unet.train()
    lora = add_lora(unet, rank=3, alpha=3)
    for parameter in lora.values():
        nn.init.normal_(parameter, std=0.1, generator=generator_for("lora"))
    layers = scatter(inject(unet))
    draw_dropout(layers, 0.3, seed=0, step=1)
    calls, attend = [], summed_alphas.mixed_attention
    monkeypatch.setattr(summed_alphas, "mixed_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))

    def gradients():
        unet.zero_grad()
        calls.clear()
        unet_call(unet).square().mean().backward()
        return [p.grad.clone() for p in [*lora.values(), *(c.alpha for c in layers.values())]], len(calls)

    plain, once = gradients()
    unet.enable_gradient_checkpointing()
    again, twice = gradients()
    assert (once, twice) == (34, 68)  # it does recompute
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in plain)


# Compilation


class Two(nn.Module):
    """Two of SDXL's transformer blocks: the smallest model with several attention layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (BasicTransformerBlock(12, 3, 4, cross_attention_dim=20) for _ in range(2))

    def forward(self, tokens, text):
        return self.second(self.first(tokens, encoder_hidden_states=text), encoder_hidden_states=text)


@pytest.fixture
def blocks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Two(), torch.randn(2, 5, 12), torch.randn(2, 7, 20)


def test_a_new_scale_or_mask_compiles_nothing_anew(blocks, fresh_compiler):
    """One graph, without breaks, for every scale but 0, which leaves our code."""
    model, *inputs = blocks
    layers = scatter(inject(model))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step, scale in enumerate([1.0, 0.5, -1.5]):
        set_scale(compiled, scale)
        draw_dropout(layers, 0.3, seed=0, step=step)
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    set_scale(compiled, 0.0)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


def test_displaced_alpha_is_noticed_in_a_compiled_model(blocks, fresh_compiler):
    """torch.compile would otherwise trace the new processor and go on without alpha."""
    model, *inputs = blocks
    scatter(inject(model))
    compiled = torch.compile(model, backend="eager")
    compiled(*inputs)
    model.first.attn1.set_attention_slice(1)
    with pytest.raises(
        InjectionError, match=r"gone from 1 of 4 attention layers \(first\.attn1.*attention slicing"
    ):
        compiled(*inputs)


def test_the_unet_compiles_into_one_graph(micro_pipeline, unet_call, fresh_compiler):
    """fullgraph, with alpha on all layers and the guard traced along: the same prediction."""
    unet = micro_pipeline.unet
    scatter(inject(unet))
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(unet_call(compiled), unet_call(unet), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixes", ["maps", "values"])
def test_compiled_blocks_have_the_same_gradients(blocks, fresh_compiler, mixes):
    """Through two transformer blocks, for every alpha and for the tokens."""
    model, tokens, text = blocks
    layers = scatter(inject(model, mixes=mixes))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def gradients(run):
        leaves = [tokens.clone().requires_grad_(), *(c.alpha for c in layers.values())]
        return torch.autograd.grad(run(leaves[0], text).square().sum(), leaves)

    for one, other in zip(gradients(compiled), gradients(model), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
