"""attach and its kin on diffusers' models, torch's own attention and transformers' layers of own code."""

from __future__ import annotations

import copy

import diffusers as df
import pytest
import torch
from attention_oracle import fill, flat, oracle
from host_families import FAMILIES, FLOAT32_INSIDE, Classifier, build, noise, outputs, sana, sd3, wan
from torch import nn

import coeffdiff


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, a float64 model in eval mode, inputs); a test leaves the model as it found it."""
    return request.param, *build(request.param)


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


class WrittenOutAttention(OddAttention):
    """Softmax with its tensor by name."""

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return (torch.softmax(input=q @ k.mT, dim=-1) @ v).transpose(1, 2).flatten(2)


def test_a_softmax_may_name_its_tensor():
    model, x = nn.Sequential(WrittenOutAttention()).double(), noise(2, 3, 8).double()
    before = model(x)
    [alpha] = coeffdiff.attach(model).values()
    torch.testing.assert_close(model(x), before)
    alpha.data.fill_(0.5)
    assert (model(x) - before).abs().max() > 1e-3


def test_alpha_that_was_attached_in_inference_mode_trains_outside():
    model, x = nn.Sequential(WrittenOutAttention()).double(), noise(2, 3, 8).double()
    with torch.inference_mode():
        [alpha] = coeffdiff.attach(model).values()
    model(x).sum().backward()
    assert alpha.grad is not None
    with torch.no_grad():
        alpha.add_(0.1)


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


@pytest.mark.parametrize("part", ["body", "head"])
def test_a_part_that_has_alpha_already_is_refused(part):
    """Two alphas in one layer would be mixed twice."""
    model, _ = build("bert-and-multihead")
    coeffdiff.attach(model.get_submodule(part))
    with pytest.raises(coeffdiff.CoeffDiffError, match=rf"{part}.* already has alpha, from another attach"):
        coeffdiff.attach(model)
    coeffdiff.detach(model.get_submodule(part))
    assert len(coeffdiff.attach(model)) == 3
    with pytest.raises(coeffdiff.CoeffDiffError, match="already has alpha, from another attach"):
        coeffdiff.attach(model.get_submodule(part))


def test_an_adapter_of_a_pipeline_in_ones_own_module_is_refused():
    """Alpha in processors, inside of a model that is no UNet."""
    unet, _ = build("sd15")
    coeffdiff.attach(unet, ["mid_block"])
    with pytest.raises(coeffdiff.CoeffDiffError, match=r"0.mid_block.*attn1 already has alpha"):
        coeffdiff.attach(nn.Sequential(unet))
