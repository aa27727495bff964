"""attach, save, attach_from and detach on tiny random models of transformers, against their own eager code."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from attention_oracle import fill, flat, oracle, sharpened

import coeffdiff

ROOT = Path(coeffdiff.__file__).parents[1]
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


def decoder(name, mask=RIGHT_PADDED, **others):
    """A small model of the Llama kind: grouped keys, heads of another width than hidden / heads."""
    config = getattr(tf, f"{name}Config")(**TOWN, **SIZE | {"num_key_value_heads": 2, "head_dim": 6} | others)
    return getattr(tf, f"{name}ForCausalLM")(config), text(mask)


LATENT_KEYS = {  # values of another width than keys
    "num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 8, "first_k_dense_replace": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}


def t5():
    config = tf.T5Config(
        **TOWN, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5Model(config), text(decoder_input_ids=WORDS[:, :4])


def whisper():
    config = tf.WhisperConfig(**SEQ2SEQ, num_mel_bins=4, max_source_positions=6, max_target_positions=12)
    features = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tf.WhisperModel(config), {"input_features": features, "decoder_input_ids": WORDS[:, :4]}


def swin():
    config = tf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=2
    )
    return tf.SwinModel(config), {"pixel_values": pixels(16)}


def bert_decoder():
    """Self-attention, causal, and cross-attention in each layer."""
    config = tf.BertConfig(**TOWN, **SIZE, is_decoder=True, add_cross_attention=True)
    memory = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return tf.BertModel(config), text(encoder_hidden_states=memory, use_cache=False)


def distilbert():
    config = tf.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=24)
    return tf.DistilBertModel(config), text()


def gemma3():
    config = tf.Gemma3TextConfig(**TOWN, **SIZE | {"num_key_value_heads": 2, "head_dim": 6}, sliding_window=3)
    return tf.Gemma3ForCausalLM(config), text()


def wav2vec2():
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = tf.Wav2Vec2Config(**SIZE, **convolutions, **positions, num_feat_extract_layers=2)
    sound = torch.randn(2, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return tf.Wav2Vec2Model(config), {"input_values": sound}


def detr():
    backbone = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    sizes = {name: value for name, value in SEQ2SEQ.items() if name.startswith(("d_", "encoder", "decoder_"))}
    sizes = sizes | {"decoder_attention_heads": 4}
    del sizes["decoder_start_token_id"]
    config = tf.DetrConfig(
        **sizes, num_queries=3, use_timm_backbone=False, backbone=None, backbone_config=backbone
    )
    return tf.DetrModel(config), {"pixel_values": pixels(32)}


def llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**SIZE, **IMAGE),
        text_config=tf.LlamaConfig(**TOWN, **SIZE | {"num_key_value_heads": 2, "head_dim": 6}),
        image_token_id=39,
        vision_feature_layer=-1,
    )
    words = torch.cat([torch.full((2, 4), 39), WORDS], dim=1)
    inputs = {"input_ids": words, "attention_mask": torch.cat([torch.ones(2, 4).long(), RIGHT_PADDED], dim=1)}
    return tf.LlavaForConditionalGeneration(config), inputs | {"pixel_values": pixels()}


FAMILIES = {
    "vit": lambda: (tf.ViTModel(tf.ViTConfig(**SIZE, **IMAGE)), {"pixel_values": pixels()}),
    "dinov2": lambda: (tf.Dinov2Model(tf.Dinov2Config(**SIZE, **IMAGE)), {"pixel_values": pixels()}),
    "clip": clip,
    "bert": lambda: (tf.BertModel(tf.BertConfig(**TOWN, **SIZE)), text()),
    "bert-decoder": bert_decoder,
    "roberta": lambda: (tf.RobertaModel(tf.RobertaConfig(**TOWN, **SIZE)), text()),
    "distilbert": distilbert,
    "bart": lambda: (tf.BartModel(tf.BartConfig(**SEQ2SEQ)), text(decoder_input_ids=WORDS[:, :4])),
    "t5": t5,
    "whisper": whisper,
    "gpt2": lambda: (tf.GPT2Model(tf.GPT2Config(**TOWN, n_embd=16, n_layer=2, n_head=4)), text()),
    "llama": lambda: decoder("Llama"),
    "llama-left-padded": lambda: decoder("Llama", RIGHT_PADDED.flip(1)),
    "llama-no-mask": lambda: decoder("Llama", None),
    "llama-eager": lambda: decoder("Llama", attn_implementation="eager"),
    "mistral": lambda: decoder("Mistral", sliding_window=3),
    "gemma2": lambda: decoder("Gemma2", attn_implementation="eager"),  # scores capped by tanh
    "gemma3": gemma3,
    "qwen3": lambda: decoder("Qwen3"),
    "gpt-oss": lambda: decoder("GptOss", **EXPERTS),  # a learned sink in every softmax
    "deepseek": lambda: decoder("DeepseekV3", **LATENT_KEYS),
    "modernbert": lambda: (tf.ModernBertModel(tf.ModernBertConfig(**TOWN, **SIZE, sep_token_id=2)), text()),
    "swin": swin,
    "wav2vec2": wav2vec2,
    "detr": detr,
    "llava": llava,
}
COUNTS = {"bert-decoder": 4, "detr": 6, "llava": 4} | {
    "clip": 4,
    "bart": 6,
    "t5": 6,
    "whisper": 6,
    "swin": 4,
}  # attention layers; the others have two
# Their norms or rotary positions run in float32 whatever the model's precision is, in the model's own code too
FLOAT32_INSIDE = {
    "t5",
    "mistral",
    "gemma2",
    "gemma3",
    "qwen3",
    "llava",
    "gpt-oss",
    "deepseek",
    *(n for n in FAMILIES if n.startswith("llama")),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, a float64 model in eval mode, inputs); a test leaves the model as it found it."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[request.param]()
    return request.param, sharpened(model), inputs


def outputs(model, inputs):
    """All float outputs of one forward as one vector: with padding, unless that is on the left of causal attention.

    Such a padding token sees nothing at all; what a model makes of that depends on its implementation of attention.
    """
    out = model(**inputs, return_dict=True)
    if not inputs.get("attention_mask", WORDS)[:, 0].all():
        return out.logits[inputs["attention_mask"].bool()].flatten()
    return flat(out)


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
    """Within 1e-10 in float64 (1e-6 where the model itself uses float32); and after detach bit for bit."""
    name, model, inputs = family
    config, state = model.config, {key: value.clone() for key, value in model.state_dict().items()}
    implementation = config._attn_implementation
    trained = [p.requires_grad for p in model.parameters()]
    before = outputs(model, inputs)
    alphas = coeffdiff.attach(model)
    assert {p for p in model.parameters() if p.requires_grad} == set(alphas.values())
    tolerance = 1e-6 if name in FLOAT32_INSIDE else 1e-10
    torch.testing.assert_close(outputs(model, inputs), before, rtol=tolerance, atol=tolerance)
    fill(alphas)
    assert (outputs(model, inputs) - before).abs().max() > 1e-3
    coeffdiff.detach(model)
    assert torch.equal(outputs(model, inputs), before)
    assert model.config._attn_implementation == config._attn_implementation == implementation
    assert [p.requires_grad for p in model.parameters()] == trained
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:(fan_in_fan_out|target_parameters|The following)")  # PEFT's
def test_lora_beside_alpha_in_every_family(family, tmp_path):
    """With PEFT's LoRA in all linear layers the formula holds, and saved alphas come back bit for bit."""
    from peft import LoraConfig, get_peft_model

    name, model, inputs = family
    config = LoraConfig(r=1, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model), config).double().eval()
    alphas = coeffdiff.attach(wrapped)
    fill(alphas)
    found = outputs(wrapped, inputs)
    coeffdiff.save(wrapped, tmp_path)
    coeffdiff.detach(wrapped)
    with oracle(wrapped.get_base_model(), alphas) as expected:
        tolerance = 1e-5 if name in FLOAT32_INSIDE else 1e-10
        torch.testing.assert_close(found, outputs(expected, inputs), rtol=tolerance, atol=tolerance)
    assert coeffdiff.attach_from(wrapped, tmp_path, trainable=True).keys() == alphas.keys()
    assert torch.equal(outputs(wrapped, inputs), found)


def bert(**config):
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig(**TOWN, **SIZE, **config)).eval()


def bart():
    torch.manual_seed(0)
    return tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ)).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_not_seen(implementation):
    """What stands in the padding changes no other token; without a mask function of its own alpha would see it."""
    model = bert(attn_implementation=implementation)
    fill(coeffdiff.attach(model))
    other = WORDS.where(RIGHT_PADDED.bool(), torch.tensor(30))
    one, two = (model(ids, attention_mask=RIGHT_PADDED).last_hidden_state for ids in (WORDS, other))
    kept = RIGHT_PADDED.bool()
    assert torch.equal(one[kept], two[kept])
    assert not torch.equal(one[~kept], two[~kept])


def test_attention_dropout_falls_on_the_maps():
    """In train() mode and at alpha = 0 the model's own eager code with the same random numbers gives the same."""
    model = bert(
        attn_implementation="eager", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0
    ).train()

    def run():
        torch.manual_seed(7)
        return model(WORDS).last_hidden_state

    before = run()
    alphas = coeffdiff.attach(model, dropout=0.0)
    torch.testing.assert_close(run(), before, rtol=1e-5, atol=1e-5)
    fill(alphas)
    (gradient,) = torch.autograd.grad(run().square().sum(), list(alphas.values())[:1])
    assert gradient.abs().min() > 0


def test_dropout_on_alpha_is_drawn_in_every_forward_of_training():
    """Other numbers each time in train() mode, none in eval() mode; with no call besides the model's own."""
    model = bert(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    fill(coeffdiff.attach(model, dropout=0.5))
    model.train()
    assert not torch.equal(outputs(model, text()), outputs(model, text()))
    model.eval()
    assert torch.equal(outputs(model, text()), outputs(model, text()))


@pytest.mark.parametrize("targets", ["all", ["encoder.layer.1"]])
def test_output_attentions_are_the_mixed_maps(targets):
    """The layer with alpha returns (I + alpha) A of the A that its eager code returns; every layer returns a map."""
    model = bert(attn_implementation="eager")
    plain = model(**text(), output_attentions=True).attentions
    alphas = coeffdiff.attach(model, targets)
    fill(alphas)
    maps = model(**text(), output_attentions=True).attentions
    assert [m.shape for m in maps] == [m.shape for m in plain] == [(2, 4, 6, 6)] * 2
    first, alpha = len(plain) - len(alphas), next(iter(alphas.values()))  # no alpha lies below it
    mixed = torch.einsum("hg,bgqk->bhqk", torch.eye(4) + alpha, plain[first])
    torch.testing.assert_close(maps[first], mixed, rtol=1e-5, atol=1e-6)
    assert not model(**text()).attentions


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
def test_generation_with_a_cache_is_that_without(name):
    """The same tokens and scores, also for the padded text of the batch."""
    torch.manual_seed(0)
    if name == "bart":
        model, inputs = bart(), text()
    elif name == "t5":
        model, inputs = tf.T5ForConditionalGeneration(t5()[0].config), text()
    elif name == "gpt2":
        config = tf.GPT2Config(**TOWN, n_embd=16, n_layer=2, n_head=4)
        model, inputs = tf.GPT2LMHeadModel(config), text(RIGHT_PADDED.flip(1))
    else:
        model, inputs = decoder("Llama", RIGHT_PADDED.flip(1))
    fill(coeffdiff.attach(model.eval()))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    runs = [model.generate(**inputs, **options, output_logits=True, use_cache=on) for on in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for one, other in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all", 6),
        ("self", 4),
        ("cross", 2),
        (["model.encoder"], 2),
        (["model.decoder.layers.1.self_attn"], 1),
    ],
)
def test_targets(targets, count):
    """BART with 2 + 2 layers: self-attention in each, cross-attention in the decoder's."""
    alphas = coeffdiff.attach(bart(), targets)
    assert len(alphas) == count
    assert {len(alpha) for name, alpha in alphas.items() if "encoder.layers" in name} <= {4}
    assert {len(alpha) for name, alpha in alphas.items() if "decoder.layers" in name} <= {2}


def test_another_model_of_the_same_config_is_left_alone():
    """Two models built from one config object: alpha on one changes neither the other nor the object."""
    config = tf.BertConfig(**TOWN, **SIZE)
    one, other = tf.BertModel(config).eval(), tf.BertModel(config).eval()
    before = outputs(other, text())
    fill(coeffdiff.attach(one))
    assert torch.equal(outputs(other, text()), before)
    assert other.config._attn_implementation == config._attn_implementation == "sdpa"
    fill(coeffdiff.attach(other))
    coeffdiff.detach(one)
    assert not torch.equal(outputs(other, text()), before)


def test_saved_alphas_come_back(tmp_path):
    """Bit for bit, on another model of that kind, without a gradient; the model trains what it trained."""
    model = bert()
    fill(coeffdiff.attach(model))
    coeffdiff.save(model, tmp_path / "alphas")
    fresh = bert()
    alphas = coeffdiff.attach_from(fresh, tmp_path / "alphas")
    assert torch.equal(outputs(fresh, text()), outputs(model, text()))
    assert not any(alpha.requires_grad for alpha in alphas.values())
    assert all(p.requires_grad for name, p in fresh.named_parameters() if not name.endswith(".alpha"))
    coeffdiff.detach(fresh)
    again = coeffdiff.attach_from(fresh, tmp_path / "alphas", trainable=True)
    assert {p for p in fresh.parameters() if p.requires_grad} == set(again.values())


def test_save_pretrained_writes_alpha_beside_the_model(tmp_path):
    """from_pretrained lists alpha as unexpected and drops it; attach_from takes it from the same folder."""
    model = bert()
    fill(coeffdiff.attach(model))
    model.save_pretrained(tmp_path)
    fresh, report = tf.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["unexpected_keys"]) == 2
    assert fresh.config._attn_implementation == "sdpa"
    coeffdiff.attach_from(fresh.eval(), tmp_path)
    assert torch.equal(outputs(fresh, text()), outputs(model, text()))
    coeffdiff.detach(model)
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "coeff.safetensors").exists()


def test_a_deep_copy_has_alphas_of_its_own():
    """It computes the same, and detaching it leaves the original's."""
    model = bert()
    fill(coeffdiff.attach(model))
    expected, copied = outputs(model, text()), copy.deepcopy(model)
    assert torch.equal(outputs(copied, text()), expected)
    coeffdiff.detach(copied)
    assert not torch.equal(outputs(copied, text()), expected)
    assert torch.equal(outputs(model, text()), expected)


def test_half_precision_keeps_alpha_in_float32():
    """model.to(bfloat16) and back; a small alpha on the diagonal would not survive it."""
    model = bert()
    alphas = coeffdiff.attach(model)
    fill(alphas)
    before = outputs(model, text())
    model.to(torch.bfloat16)
    assert {alpha.dtype for alpha in alphas.values()} == {torch.float32}
    torch.testing.assert_close(outputs(model, text()).float(), before, rtol=0.1, atol=0.1)


def test_gradient_checkpointing_gives_the_same_gradients():
    """With the same dropout on alpha in the second forward as in the first."""
    model = bert(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).train()
    alphas = coeffdiff.attach(model, dropout=0.3)
    fill(alphas)

    def gradients():
        torch.manual_seed(5)
        return torch.autograd.grad(outputs(model, text()).square().sum(), list(alphas.values()))

    plain = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_model_gives_the_same():
    """In one graph, checks and all."""
    model = bert()
    fill(coeffdiff.attach(model))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, text()), outputs(model, text()))


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))


def test_lora_beside_alpha_trains_too(tmp_path):
    """Attached after get_peft_model: both get gradients, the rest none; alpha is saved with PEFT's files."""
    model = lora(bert()).eval()
    alphas = coeffdiff.attach(model)
    fill(alphas)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] if "alpha" in name else name.split(".")[-3] for name in trained} == {
        "alpha", "lora_A", "lora_B",
    }  # fmt: skip
    outputs(model, text()).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    fresh = PeftModel.from_pretrained(bert(), tmp_path).eval()
    coeffdiff.attach_from(fresh, tmp_path)
    torch.testing.assert_close(outputs(fresh, text()), outputs(model, text()))
    coeffdiff.detach(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in trained if "alpha" not in name
    }


def test_alpha_that_peft_has_frozen_is_reported():
    """get_peft_model after attach freezes alpha: the first forward in train() mode says so."""
    from coeffdiff.errors import AlphaFrozen

    model = bert()
    coeffdiff.attach(model)
    wrapped = lora(model).train()
    with pytest.warns(AlphaFrozen, match=r"encoder.layer.\d.attention.self is frozen.*after get_peft_model"):
        wrapped(WORDS)


def test_replicas_of_data_parallel_do_not_disturb_each_other():
    """One begins after another has used its alpha and before that ends, as in nn.DataParallel's threads."""
    model, seen = bert(), torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    fill(coeffdiff.attach(model))
    layer = model.encoder.layer[0].attention.self
    expected = layer(seen)[0]
    one, other = (layer._replicate_for_data_parallel() for _ in range(2))
    other.query = None  # so that it begins and comes no further

    def begin_the_other(module, *_):
        if module is one:
            with pytest.raises(TypeError):
                other(seen)

    layer.register_forward_hook(begin_the_other, prepend=True)
    assert torch.equal(one(seen)[0], expected)


def test_a_changed_attention_implementation_is_refused():
    """set_attn_implementation would take alpha out without a word."""
    model = bert()
    coeffdiff.attach(model)
    model.set_attn_implementation("eager")
    with pytest.raises(coeffdiff.CoeffDiffError, match=r"alpha is gone from encoder.layer.0.*'eager'"):
        model(WORDS)
    coeffdiff.detach(model)
    assert model.config._attn_implementation == "eager"


def test_a_layer_that_goes_round_the_interface_is_refused():
    """A forward of somebody else's that computes attention itself would leave alpha out."""
    model = bert()
    coeffdiff.attach(model)
    model.encoder.layer[1].attention.self.forward = lambda hidden, *_, **__: (hidden, None)
    with pytest.raises(coeffdiff.CoeffDiffError, match=r"encoder.layer.1.* without its alpha"):
        model(WORDS)


def flash(model):
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


REFUSED = {
    "no attention": (
        lambda: tf.ConvNextModel(tf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)),
        "ConvNextModel: it has no attention layer",
    ),
    "flash": (lambda: flash(bert()), "layer.0.attention.self uses .*'flash_attention_2'.*sdpa"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_alpha_cannot_reach_are_refused(case):
    """In one sentence that names the layer."""
    build, sentence = REFUSED[case]
    with pytest.raises(coeffdiff.CoeffDiffError, match=sentence):
        coeffdiff.attach(build())


def test_mistakes_in_arguments():
    """One sentence each, and the model is as it was."""
    model = bert()
    for targets, sentence in {
        "both": 'must be "all", "self", "cross" or a list of layer names, not \'both\'',
        "cross": "BertModel has no attention layer for targets 'cross'",
        ("encoder.layer.0.attention.sel",): "Did you mean 'encoder.layer.0.attention.self'?",
    }.items():
        with pytest.raises(coeffdiff.CoeffDiffError, match=sentence.replace("?", r"\?")):
            coeffdiff.attach(model, targets)
    with pytest.raises(coeffdiff.CoeffDiffError, match="dropout must be at least 0 and less than 1, not 1"):
        coeffdiff.attach(model, dropout=1)
    with pytest.raises(coeffdiff.CoeffDiffError, match="no alpha to save"):
        coeffdiff.save(model, "nowhere")
    coeffdiff.detach(model)  # without alpha nothing happens
    assert not any("coeffdiff" in key for module in model.modules() for key in vars(module))
    coeffdiff.attach(model)
    with pytest.raises(coeffdiff.CoeffDiffError, match="already has alpha"):
        coeffdiff.attach(model)


OTHERS = {
    "heads": (lambda: tf.BertModel(tf.BertConfig(**TOWN, **SIZE | {"num_attention_heads": 2})), "has 2 heads there"),
    "layers": (lambda: tf.ViTModel(tf.ViTConfig(**SIZE, **IMAGE)), "this ViTModel has no such layer"),
    "type": (lambda: tf.RobertaModel(tf.RobertaConfig(**TOWN, **SIZE)), "for models of type bert, this RobertaModel"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_alphas_of_another_model_are_refused(case, tmp_path):
    """By the first layer that does not fit, before anything is attached."""
    model = bert()
    coeffdiff.attach(model)
    coeffdiff.save(model, tmp_path)
    build, sentence = OTHERS[case]
    other = build()
    with pytest.raises(coeffdiff.CoeffDiffError, match=f"4 x 4 coefficients for encoder.layer.0.*{sentence}"):
        coeffdiff.attach_from(other, tmp_path)
    assert not any("alpha" in key for key in other.state_dict())


def test_files_of_another_kind_are_refused(tmp_path, micro_pipeline):
    """Alphas of a model are no adapter of a pipeline, and a damaged header is named as that."""
    model = bert()
    coeffdiff.attach(model)
    coeffdiff.save(model, tmp_path)
    with pytest.raises(coeffdiff.CoeffDiffError, match=r"load it with coeffdiff.attach_from"):
        coeffdiff.load_adapter(micro_pipeline, tmp_path)
    file = tmp_path / "coeff.safetensors"
    file.write_bytes(file.read_bytes().replace(b"model_type", b"model_typo"))
    with pytest.raises(coeffdiff.CoeffDiffError, match=r"damaged header \(model_type\)"):
        coeffdiff.attach_from(bert(), tmp_path)


def test_the_unet_of_sdxl(micro_pipeline, unet_inputs, tmp_path):
    """The same four calls on a diffusers UNet."""
    unet = micro_pipeline.unet.eval()
    call = unet_inputs(unet)
    before = unet(**call).sample
    alphas = coeffdiff.attach(unet, "cross")
    fill(alphas)
    changed = unet(**call).sample
    assert not torch.equal(changed, before)
    assert {p for p in unet.parameters() if p.requires_grad} == set(alphas.values())
    coeffdiff.save(unet, tmp_path)
    coeffdiff.detach(unet)
    assert torch.equal(unet(**call).sample, before)
    coeffdiff.attach_from(unet, tmp_path)
    assert torch.equal(unet(**call).sample, changed)


def example():
    section = (
        (ROOT / "configs" / "README.md").read_text(encoding="utf-8").split("## Any model with attention")[1]
    )
    return section.split("```python\n")[1].split("```")[0]


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_the_example_with_trainer(tmp_path, monkeypatch):
    """The README's, on a tiny BERT: it learns, its checkpoint goes on to the same alphas, its folder is the model."""
    monkeypatch.chdir(tmp_path)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a fine warm film dull cold and waste ,"
    Path("vocab.txt").write_text(words.replace(" ", "\n"), encoding="utf-8")
    tf.BertTokenizer("vocab.txt").save_pretrained("base")
    torch.manual_seed(0)
    config = tf.BertConfig(**TOWN, **SIZE, initializer_range=0.3, hidden_dropout_prob=0.0)
    tf.BertForSequenceClassification(config).save_pretrained("base")
    source = example().replace("google-bert/bert-base-uncased", "base")
    assert len(source.splitlines()) <= 40
    torch.manual_seed(0)
    exec(source, first := {})
    losses = [entry["loss"] for entry in first["trainer"].state.log_history if "loss" in entry]
    model, again = first["model"].eval(), first["again"].eval()
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(alpha.abs().mean() > 0.01 for alpha in first["alphas"].values())
    ids = {"input_ids": torch.tensor([[2, 5, 6, 8, 3]])}
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    # Weights in a file's memory lie otherwise aligned, and on some processors a product of them is rounded otherwise
    torch.testing.assert_close(outputs(again, ids), outputs(model, ids), rtol=1e-5, atol=1e-6)
    assert Path("run/checkpoint-20/coeff.safetensors").is_file()
    resumed = source.replace("trainer.train()", "trainer.train(resume_from_checkpoint='run/checkpoint-20')")
    torch.manual_seed(0)  # of the new head
    exec(resumed, second := {})
    for name, alpha in first["alphas"].items():
        assert torch.equal(second["alphas"][name], alpha)
