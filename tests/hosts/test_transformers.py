"""attach, save, attach_from and detach on tiny random models of transformers, against their own eager code."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from torch import nn

import coeffdiff

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TOWN = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = TOWN | {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2,
}  # fmt: skip
WORDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 2, 0]])
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
IMAGE = {"image_size": 8, "patch_size": 4}


def pixels(side=8):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def text(mask=RIGHT_PADDED, **others):
    return {"input_ids": WORDS} | ({} if mask is None else {"attention_mask": mask}) | others


def clip():
    config = tf.CLIPConfig(
        text_config=TOWN | SIZE | {"num_attention_heads": 2}, vision_config=SIZE | IMAGE, projection_dim=8
    )
    return tf.CLIPModel(config), text(pixel_values=pixels())


def llama(mask):
    config = tf.LlamaConfig(**TOWN, **SIZE, num_key_value_heads=2, head_dim=6, attn_implementation="sdpa")
    return tf.LlamaForCausalLM(config), text(mask)


def t5():
    config = tf.T5Config(
        **TOWN, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5Model(config), text(decoder_input_ids=WORDS[:, :4])


def whisper():
    config = tf.WhisperConfig(**SEQ2SEQ, num_mel_bins=4, max_source_positions=6, max_target_positions=12)
    features = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tf.WhisperModel(config), {"input_features": features, "decoder_input_ids": WORDS[:, :4]}


FAMILIES = {
    "vit": lambda: (tf.ViTModel(tf.ViTConfig(**SIZE, **IMAGE)), {"pixel_values": pixels()}),
    "dinov2": lambda: (tf.Dinov2Model(tf.Dinov2Config(**SIZE, **IMAGE)), {"pixel_values": pixels()}),
    "clip": clip,
    "bert": lambda: (tf.BertModel(tf.BertConfig(**TOWN, **SIZE)), text()),
    "bart": lambda: (tf.BartModel(tf.BartConfig(**SEQ2SEQ)), text(decoder_input_ids=WORDS[:, :4])),
    "t5": t5,
    "whisper": whisper,
    "gpt2": lambda: (tf.GPT2Model(tf.GPT2Config(**TOWN, n_embd=16, n_layer=2, n_head=4)), text()),
    "llama": lambda: llama(RIGHT_PADDED),
    "llama-left-padded": lambda: llama(RIGHT_PADDED.flip(1)),
    "llama-no-mask": lambda: llama(None),
}
COUNTS = {"clip": 4, "bart": 6, "t5": 6, "whisper": 6}  # attention layers; the others have two
# Their norms and softmax run in float32 whatever the model's precision is, in the model's own code too
FLOAT32_INSIDE = {"t5", "llama", "llama-left-padded", "llama-no-mask"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, a float64 model in eval mode, inputs); a test leaves the model as it found it."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[request.param]()
    for (
        parameter
    ) in model.parameters():  # far from the start values, so that attention is sharp and biases count
        nn.init.normal_(parameter, std=0.4)
    return request.param, model.double().eval(), inputs


def outputs(model, inputs):
    """All float outputs of one forward as one vector: with padding, unless that is on the left of causal attention.

    Such a padding token sees nothing at all; what a model makes of that depends on its implementation of attention.
    """
    out = model(**inputs, return_dict=True)
    if not inputs.get("attention_mask", WORDS)[:, 0].all():
        return out.logits[inputs["attention_mask"].bool()].flatten()
    return torch.cat([t.flatten() for t in tensors(out)])


def tensors(out):
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        return [t for key, part in out.items() if key != "past_key_values" for t in tensors(part)]
    return [t for part in out for t in tensors(part)] if isinstance(out, tuple) else []


def fill(alphas, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in alphas.values():
            alpha.copy_(torch.randn(alpha.shape, generator=generator) * 0.3)


@contextmanager
def oracle(model, alphas):
    """A copy of the model that runs its own eager code, whose softmax in each layer is followed by I + alpha."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    inside, real = [], nn.functional.softmax

    def softmax(scores, dim=-1, **_):  # without dtype=float32, which eager code asks for
        maps = real(scores, dim=dim)
        if not inside:
            return maps
        alpha = alphas[inside[-1]]
        return torch.einsum("hg,bgqk->bhqk", torch.eye(len(alpha), dtype=maps.dtype) + alpha, maps)

    for name in alphas:
        layer = copied.get_submodule(name)
        layer.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        layer.register_forward_hook(lambda *_: inside.pop() and None)
    nn.functional.softmax = softmax
    try:
        yield copied
    finally:
        nn.functional.softmax = real


def test_a_model_with_alpha_is_the_formula(family):
    """Outputs and every alpha's gradient are those of (I + alpha) softmax(...) V, in all layers."""
    name, model, inputs = family
    alphas = coeffdiff.attach(model)
    assert len(alphas) == COUNTS.get(name, 2)
    fill(alphas)
    weights = torch.linspace(-1, 1, len(found := outputs(model, inputs)), dtype=found.dtype)
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


def test_alpha_zero_is_the_model_and_detach_gives_it_back(family):
    """Within 1e-10 in float64, whatever float32 parts the model has; and after detach bit for bit."""
    _, model, inputs = family
    config, state = model.config, {key: value.clone() for key, value in model.state_dict().items()}
    implementation = config._attn_implementation
    trained = [p.requires_grad for p in model.parameters()]
    before = outputs(model, inputs)
    alphas = coeffdiff.attach(model)
    assert {p for p in model.parameters() if p.requires_grad} == set(alphas.values())
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-6, atol=1e-6)
    fill(alphas)
    assert (outputs(model, inputs) - before).abs().max() > 1e-3
    coeffdiff.detach(model)
    assert torch.equal(outputs(model, inputs), before)
    assert model.config._attn_implementation == config._attn_implementation == implementation
    assert [p.requires_grad for p in model.parameters()] == trained
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
