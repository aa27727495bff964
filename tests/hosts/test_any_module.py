"""attach and its kin on diffusers' models, torch's own attention and transformers' layers of own code."""

from __future__ import annotations

import copy

import diffusers as df
import pytest
import torch
import transformers as tf
from attention_oracle import fill, flat, oracle, sharpened
from torch import nn

import coeffdiff

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TOWN = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WORDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 2, 0]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
IMAGE = {"image_size": 8, "patch_size": 4}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2}


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(channels=4, side=4, text=16, **others):
    """What a denoiser is given."""
    given = {"timestep": torch.tensor([3, 7]), "encoder_hidden_states": noise(2, 5, text, seed=2)}
    return {"hidden_states": noise(2, channels, side, side)} | given | others


def unet(channels=4, **others):
    """A UNet of Stable Diffusion 1.5's kind: one block with attention, one in the middle, 2 + 2 + 4 + ... layers."""
    sizes = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 16,
    }
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    model = df.UNet2DConditionModel(
        in_channels=channels, sample_size=8, **sizes | kinds | {"attention_head_dim": 2} | others
    )
    inputs = step(channels, 8)
    return model, {"sample": inputs.pop("hidden_states")} | inputs


def kandinsky():
    """Attention over image and text at once, after a norm of its own."""
    model, inputs = unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=8,
        resnet_time_scale_shift="scale_shift", addition_embed_type="image", addition_embed_type_num_heads=2,
        encoder_hid_dim=12, encoder_hid_dim_type="image_proj",
    )  # fmt: skip
    inputs["added_cond_kwargs"] = {"image_embeds": noise(2, 12)}
    return model, inputs | {"encoder_hidden_states": None}


def unet2d():
    config = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 8,
    }
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return df.UNet2DModel(sample_size=8, **config, **blocks), {"sample": noise(2, 3, 8, 8), "timestep": 3}


def pixart():
    config = DIT | {"cross_attention_dim": 16, "caption_channels": 16, "sample_size": 4, "norm_num_groups": 1}
    mask = {"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    return df.PixArtTransformer2DModel(**config), step(
        **mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    )


def sd3():
    """With the second, image-only attention of Stable Diffusion 3.5 in one block, and normalised queries."""
    config = DIT | {
        "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 12, "sample_size": 4,
        "out_channels": 4, "pos_embed_max_size": 4, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return df.SD3Transformer2DModel(**config), step(pooled_projections=noise(2, 12))


def flux():
    config = {k: v for k, v in DIT.items() if k != "patch_size"} | {
        "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 12, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    ids = {"img_ids": torch.ones(6, 3).cumsum(0), "txt_ids": torch.zeros(5, 3)}
    inputs = step(pooled_projections=noise(2, 12), **ids)
    return df.FluxTransformer2DModel(**config), inputs | {"hidden_states": noise(2, 6, 4)}


def sana():
    config = DIT | {
        "num_cross_attention_heads": 4, "cross_attention_head_dim": 4, "cross_attention_dim": 16, "caption_channels": 16,
        "sample_size": 4, "out_channels": 4,
    }  # fmt: skip
    return df.SanaTransformer2DModel(**config), step()


def auraflow():
    config = {k: v for k, v in DIT.items() if k != "num_layers"} | {
        "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 16, "caption_projection_dim": 16,
        "sample_size": 4, "pos_embed_max_size": 16,
    }  # fmt: skip
    return df.AuraFlowTransformer2DModel(**config), step()


def wan(**others):
    config = {k: v for k, v in DIT.items() if k != "patch_size"} | {
        "attention_head_dim": 12, "text_dim": 16, "freq_dim": 8, "ffn_dim": 24, "out_channels": 4,
    }  # fmt: skip
    return df.WanTransformer3DModel(**config | others), step() | {"hidden_states": noise(2, 4, 1, 4, 4)}


class Reader(nn.Module):
    """Somebody's own model: torch's attention with and without its weights asked for, keys of other widths, a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(16, 4, add_bias_kv=True)
        self.second = nn.MultiheadAttention(16, 2, kdim=6, vdim=10, batch_first=True)

    def forward(self, x, keys, values, blocked):
        x = x + self.first(x, x, x, need_weights=False)[0]
        y, weights = self.second(x, keys, values, key_padding_mask=blocked, average_attn_weights=False)
        return x + y, weights


def reader():
    blocked = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return Reader(), {
        "x": noise(2, 4, 16),
        "keys": noise(2, 5, 6),
        "values": noise(2, 5, 10),
        "blocked": blocked,
    }


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": noise(2, 6, 16), "src_key_padding_mask": PADDED == 0}


def translator():
    model = nn.Transformer(16, 4, 1, 2, 24, batch_first=True)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    return model, {"src": noise(2, 6, 16), "tgt": noise(2, 4, 16), "tgt_mask": causal, "tgt_is_causal": True}


class Classifier(nn.Module):
    """A model of transformers inside of somebody's own, whose head attends too."""

    def __init__(self):
        super().__init__()
        self.body = tf.BertModel(tf.BertConfig(**TOWN, **SIZE))
        self.head = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids, mask):
        found = self.body(ids, attention_mask=mask).last_hidden_state
        return self.head(found[:, :1], found, found, key_padding_mask=mask == 0)[0]


class GroupedAttention(nn.Module):
    """Somebody's own: two heads share a key, and a learned bias falls on the scores."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.q, self.k, self.v = 4, nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 12)
        self.bias = nn.Parameter(torch.zeros(4, 5, 5))

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in ((self.q, 4), (self.k, 2), (self.v, 2))
        )
        return nn.functional.scaled_dot_product_attention(q, k, v, self.bias, enable_gqa=True).transpose(1, 2)


def text(**others):
    return {"input_ids": WORDS, "attention_mask": PADDED} | others


def gptj():
    config = tf.GPTJConfig(**TOWN, n_embd=16, n_layer=2, n_head=4, rotary_dim=2, n_positions=16)
    return tf.GPTJModel(config), text()


def vilt():
    config = tf.ViltConfig(**SIZE, **IMAGE, vocab_size=40, num_images=1, max_image_length=-1)
    return tf.ViltModel(config), text(pixel_values=noise(2, 3, 8, 8), pixel_mask=torch.ones(2, 8, 8))


def swin2():
    config = tf.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=2
    )
    return tf.Swinv2Model(config), {"pixel_values": noise(2, 3, 16, 16)}


def siglip():
    """Layers that call the interface, and a pooling head of torch's attention."""
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**SIZE, **IMAGE)), {"pixel_values": noise(2, 3, 8, 8)}


def blip():
    return tf.BlipVisionModel(tf.BlipVisionConfig(**SIZE, **IMAGE)), {"pixel_values": noise(2, 3, 8, 8)}


# name: (model and inputs, layers with alpha, targets)
FAMILIES = {
    "sd15": (unet, 8, "all"),
    "sd21": (lambda: unet(attention_head_dim=(1, 4), use_linear_projection=True), 8, "all"),
    "sd15-inpainting": (lambda: unet(9, out_channels=4), 8, "all"),
    "kandinsky2": (kandinsky, 4, "all"),
    "unet2d": (unet2d, 4, "all"),
    "pixart": (pixart, 4, "all"),
    "sd3": (sd3, 3, "all"),
    "flux": (flux, 2, "all"),
    "sana": (sana, 2, "cross"),
    "auraflow": (auraflow, 2, "all"),
    "wan": (wan, 4, "all"),
    "multihead": (reader, 2, "all"),
    "encoder": (encoder, 2, "all"),
    "transformer": (translator, 5, "all"),
    "own": (lambda: (nn.Sequential(GroupedAttention()), {"input": noise(2, 5, 16)}), 1, "all"),
    "bert-and-multihead": (lambda: (Classifier(), {"ids": WORDS, "mask": PADDED}), 3, "all"),
    "siglip": (siglip, 3, "all"),
    "mpnet": (lambda: (tf.MPNetModel(tf.MPNetConfig(**TOWN, **SIZE)), text()), 2, "all"),
    "blip": (blip, 2, "all"),
    "vilt": (vilt, 2, "all"),
    "gptj": (gptj, 2, "all"),
    "swinv2": (swin2, 4, "all"),
    "deberta": (lambda: (tf.DebertaV2Model(tf.DebertaV2Config(**TOWN, **SIZE)), text()), 2, "all"),
    "bloom": (
        lambda: (tf.BloomModel(tf.BloomConfig(**TOWN, hidden_size=16, n_layer=2, n_head=4)), text()),
        2,
        "all",
    ),
    "falcon": (lambda: (tf.FalconModel(tf.FalconConfig(**TOWN, **SIZE, alibi=False)), text()), 2, "all"),
}
# Their rotary positions or their softmax run in float32 whatever the model's precision is, in the model's own code too
FLOAT32_INSIDE = {"flux", "wan", "gptj", "bloom"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, a float64 model in eval mode, inputs); a test leaves the model as it found it."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[request.param][0]()
    return request.param, sharpened(model), inputs


def outputs(model, inputs):
    torch.manual_seed(0)  # ViLT draws the order of its patches
    return flat(model(**inputs))


def assert_formula(name, model, inputs):
    """Outputs and every alpha's gradient are those of (I + alpha) softmax(...) V, in all layers."""
    _, count, targets = FAMILIES[name]
    alphas = coeffdiff.attach(model, targets)
    assert len(alphas) == count
    fill(alphas)
    found = outputs(model, inputs)
    weights = torch.linspace(-1, 1, len(found), dtype=found.dtype)
    gradients = torch.autograd.grad((found * weights).sum(), list(alphas.values()))
    values = {layer: alpha.detach().clone().requires_grad_() for layer, alpha in alphas.items()}
    coeffdiff.detach(model)
    with oracle(model, values) as expected_model:
        expected = outputs(expected_model, inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(values.values()))
    tolerance = 1e-5 if name in FLOAT32_INSIDE else 1e-10
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)


def test_a_model_with_alpha_is_the_formula(family):
    """See assert_formula."""
    assert_formula(*family)


def test_detach_gives_the_model_back(family):
    """Alpha zero changes nothing but rounding; after detach outputs, state and modules are what they were, bit for bit."""
    name, model, inputs = family
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {part: set(vars(module)) for part, module in model.named_modules()}
    before = outputs(model, inputs)
    alphas = coeffdiff.attach(model, FAMILIES[name][2])
    assert {p for p in model.parameters() if p.requires_grad} == set(alphas.values())
    tolerance = 1e-5 if name in FLOAT32_INSIDE else 1e-10
    torch.testing.assert_close(outputs(model, inputs), before, rtol=tolerance, atol=tolerance)
    fill(alphas)
    assert (outputs(model, inputs) - before).abs().max() > 1e-3
    coeffdiff.detach(model)
    assert torch.equal(outputs(model, inputs), before)
    assert all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    left = {part: set(vars(module)) - attributes[part] for part, module in model.named_modules()}
    assert not any(left.values()) or name.startswith("sd"), left


def test_saved_alphas_come_back(family, tmp_path):
    """On a copy of the model, with the same outputs bit for bit."""
    name, model, inputs = family
    fresh = copy.deepcopy(model)
    alphas = coeffdiff.attach(model, FAMILIES[name][2])
    fill(alphas)
    expected = outputs(model, inputs)
    coeffdiff.save(model, tmp_path)
    coeffdiff.detach(model)
    assert coeffdiff.attach_from(fresh, tmp_path, trainable=True).keys() == alphas.keys()
    assert torch.equal(outputs(fresh, inputs), expected)


def build(name):
    torch.manual_seed(0)
    model, inputs = FAMILIES[name][0]()
    return sharpened(model), inputs


@pytest.mark.parametrize(
    ("name", "layers"),
    {
        "pixart": ["to_q", "to_v"],
        "flux": ["to_k", "add_q_proj"],
        "mpnet": "all-linear",
        "transformer": ["self_attn"],
    }.items(),
)
def test_lora_beside_alpha(name, layers):
    """In the same layers, through diffusers' add_adapter or PEFT's get_peft_model before attach: both train."""
    from peft import LoraConfig, get_peft_model

    model, inputs = build(name)
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    if hasattr(model, "add_adapter") and name in ("pixart", "flux"):
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config).eval()
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    bare.double()
    loras = {p for p in model.parameters() if p.requires_grad}
    assert_formula(name, bare, inputs)
    alphas = coeffdiff.attach(model, dropout=0.0)
    assert {p for p in model.parameters() if p.requires_grad} == loras | set(alphas.values())
    flat(model(**inputs)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    coeffdiff.detach(model)
    assert {p for p in model.parameters() if p.requires_grad} == loras


def test_peft_after_attach_is_reported():
    """get_peft_model freezes alpha in layers of own code too."""
    from peft import LoraConfig, get_peft_model

    from coeffdiff.errors import AlphaFrozen

    model, inputs = build("mpnet")
    coeffdiff.attach(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q"])).train()
    with pytest.warns(AlphaFrozen, match=r"encoder.layer.\d.attention.attn is frozen.*after get_peft_model"):
        wrapped(**inputs)


@torch.no_grad()
def test_a_block_of_diffusers_compiles_to_one_graph():
    """As compile_repeated_blocks does it. A new alpha compiles nothing anew, and torch's function is what it was."""
    model, inputs = build("flux")
    alphas, attention = (
        coeffdiff.attach(model, ["single_transformer_blocks"]),
        nn.functional.scaled_dot_product_attention,
    )
    fill(alphas)
    expected = outputs(model, inputs)
    model.single_transformer_blocks[0].compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(model, inputs), expected)
    fill(alphas, seed=4)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert not torch.equal(outputs(model, inputs), expected)
    assert nn.functional.scaled_dot_product_attention is attention


@torch.no_grad()
def test_other_intercepted_layers_stay_out_of_compiled_graphs():
    """torch.compile compiles what is around them; fullgraph=True, which forbids that, says so."""
    model, inputs = build("encoder")
    fill(coeffdiff.attach(model))
    torch.testing.assert_close(outputs(torch.compile(model, backend="eager"), inputs), outputs(model, inputs))
    torch.compiler.reset()
    with pytest.raises(Exception, match="coeffdiff intercepts this layer's attention"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)


class ChattyProcessor:
    """Breaks the graph in the middle of a layer's forward, before it attends."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        torch._dynamo.graph_break()
        query, key, value = (part(hidden_states) for part in (attn.to_q, attn.to_k, attn.to_v))
        heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_a_graph_that_breaks_inside_a_layer_never_leaves_alpha_out():
    """The layer goes on with it after the break."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = Attention(8, heads=2, dim_head=4, processor=ChattyProcessor()).double().eval()
    fill(coeffdiff.attach(layer))
    x = noise(2, 3, 8)
    expected = layer(x)
    attention = nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), expected)
    assert nn.functional.scaled_dot_product_attention is attention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which torch itself uses
@pytest.mark.parametrize("name", ["encoder", "transformer"])
def test_torchs_fast_paths_do_not_leave_alpha_out(name):
    """Without gradients torch's layers run as one kernel and drop padding; with alpha they compute as with gradients."""
    model, inputs = build(name)
    model.requires_grad_(False)
    with torch.no_grad():
        before = outputs(model, inputs)
        fill(coeffdiff.attach(model))
        found = outputs(model, inputs)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, outputs(model, inputs), rtol=1e-10, atol=1e-10)
    coeffdiff.detach(model)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(outputs(model, inputs), before)


def test_weights_of_multihead_attention_are_the_mixed_maps():
    """need_weights=True returns (I + alpha) A of the A that it returns without alpha."""
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    _, plain = layer(x, x, x, average_attn_weights=False)
    (alpha,) = coeffdiff.attach(layer).values()
    fill({"": alpha})
    _, maps = layer(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(maps, torch.einsum("hg,bgqk->bhqk", torch.eye(2) + alpha, plain))


@pytest.mark.parametrize(
    ("name", "targets", "layers"),
    [
        ("transformer", "cross", ["decoder.layers.0.multihead_attn", "decoder.layers.1.multihead_attn"]),
        ("pixart", "cross", ["transformer_blocks.0.attn2", "transformer_blocks.1.attn2"]),
        ("wan", "self", ["blocks.0.attn1", "blocks.1.attn1"]),
        (
            "sd3",
            "self",
            ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"],
        ),
        ("flux", ["single_transformer_blocks"], ["single_transformer_blocks.0.attn"]),
        (
            "bert-and-multihead",
            ["body.encoder.layer.1", "head"],
            ["body.encoder.layer.1.attention.self", "head"],
        ),
    ],
)
def test_targets(name, targets, layers):
    """Joint attention over image and text, as in SD3 and Flux, counts as self-attention."""
    assert list(coeffdiff.attach(FAMILIES[name][0]()[0], targets)) == layers


def test_dropout_on_alpha_and_checkpointing():
    """Other numbers in each forward of train(), the same ones when a checkpointed block is computed again."""
    model, inputs = build("flux")
    alphas = coeffdiff.attach(model, dropout=0.3)
    fill(alphas)
    model.train()
    found = outputs(model, inputs)
    assert not torch.equal(found, flat(model(**inputs)))
    plain = torch.autograd.grad(found.square().sum(), list(alphas.values()))
    model.enable_gradient_checkpointing()
    again = torch.autograd.grad(outputs(model, inputs).square().sum(), list(alphas.values()))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["flux", "encoder", "mpnet"])
def test_copies_and_precisions(name, tmp_path):
    """A deep copy and a pickled model have alphas of their own; in half precision alpha stays float32."""
    model, inputs = build(name)
    alphas = coeffdiff.attach(model)
    fill(alphas)
    expected = outputs(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(outputs(other, inputs), expected)
        coeffdiff.detach(other)
        assert not torch.equal(outputs(other, inputs), expected)
    assert torch.equal(outputs(model, inputs), expected)
    model.to(torch.bfloat16)
    assert {alpha.dtype for alpha in alphas.values()} <= {torch.float32, torch.float64}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_alpha_of_quantized_layers(dtype):
    """It lies where their weights do, in float32."""
    layer = OddAttention()
    for part in layer.children():
        weight = torch.zeros(8, 8, dtype=dtype, device="meta")
        part.weight, part.bias = nn.Parameter(weight, requires_grad=False), None
    (alpha,) = coeffdiff.attach(layer).values()
    assert (alpha.dtype, alpha.device.type) == (torch.float32, "meta")


def test_save_pretrained_of_diffusers(tmp_path):
    """from_pretrained leaves alpha out, attach_from takes it from the same folder."""
    model, inputs = build("flux")
    fill(coeffdiff.attach(model))
    model.save_pretrained(tmp_path)
    fresh = df.FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert not any("alpha" in key for key in fresh.state_dict())
    coeffdiff.attach_from(fresh.eval(), tmp_path)
    torch.testing.assert_close(outputs(fresh, inputs), outputs(model, inputs))


class OddAttention(nn.Module):
    """A linear attention of somebody's own: nothing that softmax would touch."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.q, self.k, self.v = 2, *(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.q(x) @ (self.k(x).mT @ self.v(x))


class CountlessAttention(OddAttention):
    """Attention of somebody's own that does not say how many heads it has."""

    def __init__(self):
        super().__init__()
        del self.num_heads


def image_to_video():
    model, inputs = wan(image_dim=16, added_kv_proj_dim=24)
    inputs["encoder_hidden_states"] = noise(2, 512, 16)
    return model, inputs | {"encoder_hidden_states_image": noise(2, 3, 16)}


WITHOUT_MAPS = {
    "linear": (sana, r"transformer_blocks.0.attn1 \(2 such layers\) is linear attention.*such as \['transformer_blocks.0.attn2'\]"),
    "twice": (image_to_video, "blocks.0.attn2 computes attention more than once in a forward.*leave this layer out"),
    "none": (lambda: (nn.Sequential(OddAttention()), {"input": noise(2, 3, 8)}), "0 has computed attention without its alpha: .*maps of its 2 heads"),
    "heads": (lambda: (nn.Sequential(CountlessAttention()), {"input": noise(2, 3, 8)}), "0 .CountlessAttention. does not say how many heads"),
    "no attention": (lambda: (nn.Linear(2, 2), {"input": noise(2, 2)}), "this Linear: it has no attention layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_MAPS)
def test_layers_without_one_computation_of_maps_are_refused(case):
    """In one sentence that names the layer: by attach where the layer shows it, otherwise by the first forward."""
    make, sentence = WITHOUT_MAPS[case]
    model, inputs = make()
    with pytest.raises(coeffdiff.CoeffDiffError, match=sentence):
        coeffdiff.attach(model.double())
        model(**inputs)


class OtherHead(Classifier):
    """With more heads at the end."""

    def __init__(self):
        super().__init__()
        self.head = nn.MultiheadAttention(16, 4, batch_first=True)


OTHERS = {
    "layers": (sd3, r"4 x 4 coefficients for body.* SD3Transformer2DModel has no such layer"),
    "heads": (
        lambda: (OtherHead(), {}),
        r"2 x 2 coefficients for head, but this OtherHead has 4 heads there",
    ),
    "no attention": (lambda: (nn.Linear(2, 2), {}), "this Linear: it has no attention layer"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_alphas_of_another_model_are_refused(case, tmp_path):
    """By the layer that does not fit, before anything is attached."""
    model = Classifier()
    coeffdiff.attach(model, ["head"] if case == "heads" else "all")
    coeffdiff.save(model, tmp_path)
    make, sentence = OTHERS[case]
    other, _ = make()
    with pytest.raises(coeffdiff.CoeffDiffError, match=sentence):
        coeffdiff.attach_from(other, tmp_path)
    assert not any("alpha" in key for key in other.state_dict())


def test_a_pipeline_is_no_model(micro_pipeline):
    with pytest.raises(coeffdiff.CoeffDiffError, match=r"to a StableDiffusionXLPipeline: .* here pipe.unet"):
        coeffdiff.attach(micro_pipeline)


def test_data_parallel_copies_are_refused():
    """nn.DataParallel's replicas share the forward of the original, on another GPU."""
    model, _ = build("mpnet")
    coeffdiff.attach(model)
    layer = model.encoder.layer[0].attention.attn
    with pytest.raises(coeffdiff.CoeffDiffError, match=r"nn.DataParallel.*accelerate launch"):
        layer._replicate_for_data_parallel()(noise(2, 3, 16))


def test_a_forward_that_others_have_wrapped():
    """Before attach it stays in use; after attach it may stay on, and detach takes alpha out from under it."""
    model, inputs = build("encoder")
    layer, calls = model.layers[0].self_attn, []

    def wrapped(forward):
        def wrapper(*args, **kwargs):
            calls.append(1)
            return forward(*args, **kwargs)

        return wrapper

    before = outputs(model, inputs)
    layer.forward = own = wrapped(layer.forward)
    fill(coeffdiff.attach(model))
    layer.forward = wrapped(layer.forward)
    assert not torch.equal(outputs(model, inputs), before)
    assert len(calls) == 2
    coeffdiff.detach(model)
    assert torch.equal(outputs(model, inputs), before)
    coeffdiff.attach(model)
    layer.forward = own
    with pytest.raises(
        coeffdiff.CoeffDiffError, match=r"layers.0.self_attn .*another forward since.*attach again"
    ):
        model(**inputs)
    coeffdiff.detach(model)
    assert layer.forward is own
