"""Alpha and LoRA on the text encoders: what they compute, how they load and go, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save, save_file

import coeffdiff
from coeffdiff import load_adapter
from coeffdiff.errors import AdapterError, AdapterMismatch, InjectionError
from coeffdiff.hosts import clip_alpha
from coeffdiff.hosts.diffusers import loaded_adapters, save_adapter
from coeffdiff.hosts.kohya import export_kohya
from coeffdiff.hosts.lora.clip import add_clip_lora
from coeffdiff.hosts.lora.layers import add_lora, lora_parameters
from coeffdiff.hosts.merging import merge_adapters
from coeffdiff.hosts.text_encoders import coefficients_on, encoders_on
from coeffdiff.hosts.unet import coefficients_of, inject, set_scale
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE
from coeffdiff.training.hub_card import hub_card
from coeffdiff.utils.seeding import generator_for

NAMES = ("text_encoder", "text_encoder_2")
PROMPTS = ("a ball on grass", "x")


def texts(pipe) -> list[torch.Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(PROMPTS), device="cpu", do_classifier_free_guidance=False
        )
    return [embeds, pooled]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def scatter(named, seed: int) -> None:
    for name, parameter in named.items():
        drawn = torch.randn(parameter.shape, generator=generator_for(seed, name))
        parameter.data += 0.2 * drawn.to(parameter.dtype)


def adapter(pipe, folder, *, seed=0, token="sks", dora=False, on_text=True, **header):
    """The folder of an adapter with alpha and LoRA far from their beginnings; `pipe` is left as it was."""
    pipe = copy.deepcopy(pipe)
    encoders = encoders_on(pipe) if on_text else {}
    add_lora(pipe.unet, rank=3, alpha=6, dora=dora)
    inject(pipe.unet)
    for network, encoder in encoders.items():
        add_clip_lora(encoder, network=network, rank=3, alpha=6, dora=dora)
        clip_alpha.inject(encoder, network=network)
    layers = coefficients_of(pipe.unet) | coefficients_on(encoders)
    scatter({name: layer.alpha for name, layer in layers.items()}, seed)
    for network in (pipe.unet, *encoders.values()):
        scatter(lora_parameters(network), seed)
    made = AdapterHeader(
        **{
            "format_version": 4 if on_text else 1,
            "kind": "coeff+lora",
            "base_model": "some/model",
            "token": token,
            "heads": {name: layer.heads for name, layer in layers.items()},
            "lora": LoraHeader(rank=3, alpha=6, dora=dora, encoders=NAMES if on_text else ()),
            "trained_steps": 5 + seed,
            "resolution": 64,
            **header,
        }
    )
    save_adapter(folder, pipe.unet, made, encoders=encoders)
    return folder


def test_alpha_is_what_the_definition_says(micro_pipeline):
    """Every layer against softmax, mixing and values written out in float64, causal; and its gradient."""
    for network in NAMES:
        encoder = getattr(micro_pipeline, network).double()
        module = clip_alpha.attention_modules(encoder)[next(iter(clip_alpha.layer_names(encoder).values()))]
        x = torch.randn(2, 7, module.embed_dim, dtype=torch.float64, generator=generator_for(network))
        plain = module(x, is_causal=True)[0]
        (layer, *_) = clip_alpha.inject(encoder, network=network).values()
        layer.double()
        assert torch.allclose(module(x, is_causal=True)[0], plain, atol=1e-12)
        scatter({"alpha": layer.alpha}, 3)
        alpha = layer.alpha.detach().clone().requires_grad_()
        q, k, v = (
            one(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for one in (module.q_proj, module.k_proj, module.v_proj)
        )
        scores = q @ k.transpose(-1, -2) * module.scale
        scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
        mixed = torch.einsum(
            "hg,bgqk->bhqk", torch.eye(len(alpha), dtype=torch.float64) + alpha, scores.softmax(-1)
        )
        expected = module.out_proj((mixed @ v).transpose(1, 2).flatten(2))
        found = module(x, is_causal=True)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator_for(9))
        (expected * weights).sum().backward()
        (found * weights).sum().backward()
        torch.testing.assert_close(layer.alpha.grad, alpha.grad, rtol=0, atol=1e-11)


def test_sdxl_has_12_and_32_layers():
    """CLIP-L 12 x 12 x 12 and OpenCLIP bigG 32 x 20 x 20 numbers, on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    counts = []
    for kind, width, layers, heads in (
        (CLIPTextModel, 768, 12, 12),
        (CLIPTextModelWithProjection, 1280, 32, 20),
    ):
        config = CLIPTextConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, projection_dim=1280
        )
        with torch.device("meta"):
            encoder = kind(config)
        found = clip_alpha.heads_of(encoder)
        assert next(iter(found)) == "text_model.encoder.layers.0.self_attn"
        counts.append(sum(count**2 for count in found.values()))
    assert counts == [12 * 12 * 12, 32 * 20 * 20]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_loaded_switched_and_removed_bit_for_bit(micro_pipeline, unet_call, tmp_path, dora):
    """What was trained comes back; 0 and removal are the base model, modules and names included."""
    base, before = texts(micro_pipeline), unet_call(micro_pipeline.unet)
    states = [list(getattr(micro_pipeline, name).state_dict()) for name in NAMES]
    modules = [dict(getattr(micro_pipeline, name).named_modules()) for name in NAMES]
    path = adapter(micro_pipeline, tmp_path / "a", dora=dora)
    loaded = load_adapter(micro_pipeline, path)
    trained = texts(micro_pipeline)
    assert all(not torch.allclose(a, b, atol=0.01) for a, b in zip(trained, base, strict=True))
    loaded.set_scale(0.5)
    half = texts(micro_pipeline)
    loaded.set_scale(0)
    assert equal(texts(micro_pipeline), base) and not equal(half, base) and not equal(half, trained)
    loaded.set_scale(1)
    assert equal(texts(micro_pipeline), trained)
    with pytest.raises(AdapterError, match=r"save_pretrained would write the adapter on this text encoder"):
        micro_pipeline.text_encoder_2.save_pretrained(tmp_path / "saved")
    loaded.remove()
    assert equal(texts(micro_pipeline), base) and torch.equal(unet_call(micro_pipeline.unet), before)
    for name, state, module in zip(NAMES, states, modules, strict=True):
        encoder = getattr(micro_pipeline, name)
        assert list(encoder.state_dict()) == state and dict(encoder.named_modules()) == module
        assert not hasattr(encoder, "peft_config")
    micro_pipeline.text_encoder_2.save_pretrained(tmp_path / "saved")


def test_several_adapters_add_up_and_merge(micro_pipeline, unet_call, tmp_path):
    """One with the text encoders, one without, one more with: in any order, and as one merged folder."""
    paths = [
        adapter(micro_pipeline, tmp_path / f"{n}", seed=n, token=f"tok{n}", on_text=n != 1) for n in range(3)
    ]
    base = texts(micro_pipeline)
    loaded = [load_adapter(micro_pipeline, path, 0.5) for path in paths]
    together, of_unet = texts(micro_pipeline), unet_call(micro_pipeline.unet)
    loaded[0].remove()
    without = texts(micro_pipeline)
    assert not equal(without, base) and not equal(without, together)
    for one in loaded[1:]:
        one.remove()
    assert equal(texts(micro_pipeline), base)
    header = merge_adapters([(path, 0.5) for path in paths], tmp_path / "merged")
    assert header.format_version == 4 and header.encoders == NAMES
    load_adapter(micro_pipeline, tmp_path / "merged")
    for found, expected in zip(texts(micro_pipeline), together, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unet_call(micro_pipeline.unet), of_unet, rtol=1e-3, atol=1e-4)


def test_plain_diffusers_loads_the_lora(micro_pipeline, tmp_path):
    """load_lora_weights in a pipeline without coeffdiff: the text of ours with alpha off; rank is not alpha here."""
    path = adapter(micro_pipeline, tmp_path / "a")
    plain = copy.deepcopy(micro_pipeline)
    plain.load_lora_weights(path)
    loaded = load_adapter(micro_pipeline, path)
    for encoder in encoders_on(micro_pipeline).values():
        set_scale(encoder, 0.0, loaded.name)
    for found, expected in zip(texts(plain), texts(micro_pipeline), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_export_names_the_encoders_as_kohya_does(micro_pipeline, tmp_path):
    """lora_te1_ and lora_te2_, with their alphas; diffusers reads them back, whole."""
    path = adapter(micro_pipeline, tmp_path / "a")
    exported = export_kohya(path, tmp_path / "out.safetensors")
    tensors = load_file(exported.lora)
    for prefix in ("lora_te1", "lora_te2"):
        stem = f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
        assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"} < tensors.keys()
        assert float(tensors[f"{stem}.alpha"]) == 6
    state, _ = StableDiffusionXLPipeline.lora_state_dict(exported.lora)
    ours = load_file(path / LORA_FILE)
    assert sum(key.startswith("text_encoder.") for key in state) == sum(
        key.startswith("text_encoder.") for key in ours
    )
    assert "13 layers" in exported.left_out[0] and "ComfyUI" not in exported.left_out[0]
    card = hub_card("# sks", exported.header, "user/repo", {})
    assert "The ComfyUI node refuses alpha on text encoders." in card and "models/coeffdiff" not in card


def test_what_leaves_an_encoder_is_noticed(micro_pipeline, tmp_path):
    """Swapped encoders, LoRA switched off or unloaded by diffusers, attention replaced: one sentence each."""
    other = copy.deepcopy(micro_pipeline.text_encoder)
    loaded = load_adapter(micro_pipeline, adapter(micro_pipeline, tmp_path / "a"))
    own, micro_pipeline.text_encoder = micro_pipeline.text_encoder, other
    with pytest.raises(InjectionError, match=r"this pipeline's text_encoder has been replaced since"):
        loaded.verify()
    with pytest.raises(InjectionError, match=r"this pipeline's text_encoder has been replaced since"):
        loaded.set_scale(0.5)
    with pytest.raises(InjectionError, match=r"the text_encoder of this pipeline is not the one"):
        loaded.verify_text(micro_pipeline)
    micro_pipeline.text_encoder = own
    micro_pipeline.disable_lora()
    with pytest.raises(InjectionError, match=r"switched off on .*layers.0.self_attn"):
        texts(micro_pipeline)
    micro_pipeline.enable_lora()
    loaded.set_scale(1)
    layer = micro_pipeline.text_encoder_2.text_model.encoder.layers[1]
    attention, layer.self_attn = layer.self_attn, copy.deepcopy(other).encoder.layers[1].self_attn
    with pytest.raises(InjectionError, match=r"is gone from this text encoder"):
        texts(micro_pipeline)
    with pytest.raises(InjectionError, match=r"is gone from this text encoder"):
        loaded.set_scale(0.5)
    layer.self_attn = attention
    with pytest.raises(InjectionError, match=r"fuse_lora\(lora_scale=0.5\) would scale the LoRA of"):
        micro_pipeline.fuse_lora(lora_scale=0.5)
    before = texts(micro_pipeline)
    micro_pipeline.fuse_lora()
    for found, expected in zip(texts(micro_pipeline), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    with pytest.raises(InjectionError, match=r"is fused into the weights"):
        loaded.remove()


def test_a_pipeline_without_encoders_or_with_others_is_refused(micro_pipeline, tmp_path):
    """Nothing is left behind, on the UNet either."""
    path = adapter(micro_pipeline, tmp_path / "a")
    encoder, micro_pipeline.text_encoder = micro_pipeline.text_encoder, None
    with pytest.raises(
        AdapterError, match=r"was trained on the text encoders too, and this pipeline has no text_enc"
    ):
        load_adapter(micro_pipeline, path)
    micro_pipeline.text_encoder = encoder
    encoder.encoder.layers[1].self_attn.num_heads = 4
    with pytest.raises(
        AdapterMismatch, match=r"5 x 5 coefficients for text_encoder.*layers.1.* has 4 heads there"
    ):
        load_adapter(micro_pipeline, path)
    assert not coefficients_of(micro_pipeline.unet, "coeffdiff_0") and not hasattr(encoder, "peft_config")


def test_a_copy_of_the_pipeline_has_its_own(micro_pipeline, tmp_path):
    """Removed from the copy, it stays on the original, and the other way round."""
    base = texts(micro_pipeline)
    loaded = load_adapter(micro_pipeline, adapter(micro_pipeline, tmp_path / "a"))
    trained, copied = texts(micro_pipeline), copy.deepcopy(micro_pipeline)
    (other,) = loaded_adapters(copied)
    other.remove()
    assert equal(texts(copied), base) and equal(texts(micro_pipeline), trained)
    loaded.verify()
    loaded.remove()
    assert equal(texts(micro_pipeline), base)


def test_beside_attach_it_is_refused(micro_pipeline, tmp_path):
    """One alpha would push the other aside; in either order one sentence says so."""
    path, base = adapter(micro_pipeline, tmp_path / "a"), texts(micro_pipeline)
    coeffdiff.attach(micro_pipeline.text_encoder_2)
    with pytest.raises(
        InjectionError, match=r"has an alpha of coeffdiff.attach, beside which no adapter's can be"
    ):
        load_adapter(micro_pipeline, path)
    coeffdiff.detach(micro_pipeline.text_encoder_2)
    assert equal(texts(micro_pipeline), base)
    load_adapter(micro_pipeline, path)
    with pytest.raises(
        InjectionError, match=r"already has alpha, from another attach or a pipeline's adapter"
    ):
        coeffdiff.attach(micro_pipeline.text_encoder_2)


def rewritten(path, **changed):
    """The adapter with another header."""
    tensors = load_file(path / COEFF_FILE)
    header = json.loads(read_header(path).model_dump_json()) | changed
    (path / COEFF_FILE).write_bytes(save(tensors, metadata={"coeffdiff": json.dumps(header)}))
    return path


def test_old_readers_and_damaged_files_are_told(micro_pipeline, tmp_path):
    """Format 4 is what a reader of 3 refuses; a header of 3 with text encoders is damaged; files must agree."""
    path = adapter(micro_pipeline, tmp_path / "a")
    assert read_header(path).format_version == 4
    with pytest.raises(AdapterError, match="damaged header"):
        read_header(rewritten(path, format_version=3))
    path = adapter(micro_pipeline, tmp_path / "b")
    lora = load_file(path / LORA_FILE)
    save_file({k: t for k, t in lora.items() if not k.startswith("text_encoder_2")}, path / LORA_FILE)
    with pytest.raises(
        AdapterError, match=r"has LoRA for text_encoder, where coeff.safetensors names text_encoder and"
    ):
        load_adapter(micro_pipeline, path)
    save_file({k.replace("self_attn", "self_attn2"): t for k, t in lora.items()}, path / LORA_FILE)
    with pytest.raises(AdapterMismatch, match=r"which is no linear layer of this text_encoder"):
        load_adapter(micro_pipeline, path)


def test_alpha_stays_float32_on_half_precision(micro_pipeline, tmp_path):
    """On encoders in bfloat16, and moved to them after loading."""
    path = adapter(micro_pipeline, tmp_path / "a")
    load_adapter(micro_pipeline, path)
    expected = texts(micro_pipeline)
    micro_pipeline.to(dtype=torch.bfloat16)
    layers = coefficients_on(encoders_on(micro_pipeline), "coeffdiff_0")
    assert {layer.alpha.dtype for layer in layers.values()} == {torch.float32}
    for found, wide in zip(texts(micro_pipeline), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - wide).abs().mean() < 0.05 * wide.abs().mean() + 0.05
