"""LoRA on the text encoders inside a real ComfyUI: the node's, and what ComfyUI's own loader makes of `export`."""

from __future__ import annotations

import pytest
import torch
from comfyui_twins import relative

from coeffdiff.errors import AdapterError
from comfyui_host import comfyui_folder

pytestmark = pytest.mark.skipif(comfyui_folder() is None, reason="COMFYUI names no ComfyUI")

PROMPTS = ("a photo of ohwx toy in the snow", "")


@pytest.fixture
def make(texts, tmp_path):
    """make(alpha=..., dora=...): the folder of an adapter with LoRA on UNet and text encoders, rank 3, alpha 7."""
    from coeffdiff.hosts import clip_alpha
    from coeffdiff.hosts.diffusers import save_adapter
    from coeffdiff.hosts.lora.clip import add_clip_lora
    from coeffdiff.hosts.lora.layers import add_lora, remove_lora
    from coeffdiff.hosts.text_encoders import coefficients_on, encoders_on, take_off
    from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader
    from coeffdiff.utils.seeding import generator_for

    def folder(alpha=False, dora=False):
        pipe, encoders = texts[1], encoders_on(texts[1])
        parameters = add_lora(pipe.unet, rank=3, alpha=7, dora=dora)
        for network, encoder in encoders.items():
            own = add_clip_lora(encoder, network=network, rank=3, alpha=7, dora=dora)
            parameters |= {f"{network}.{name}": parameter for name, parameter in own.items()}
            if alpha:
                clip_alpha.inject(encoder, network=network)
        for name, parameter in parameters.items():
            if "magnitude" not in name:
                drawn = torch.randn(parameter.shape, generator=generator_for(name))
                parameter.data = 0.5 * drawn / parameter.shape[1] ** 0.5
        header = AdapterHeader(
            format_version=4, kind="coeff+lora" if alpha else "lora", base_model="narrow SDXL", token="ohwx",
            heads={name: layer.heads for name, layer in coefficients_on(encoders).items()}, trained_steps=1,
            lora=LoraHeader(rank=3, alpha=7, dora=dora, encoders=tuple(encoders)), resolution=256,
        )  # fmt: skip
        save_adapter(tmp_path / "a", pipe.unet, header, encoders=encoders)
        remove_lora(pipe.unet, "default")
        take_off(encoders, "default")
        return tmp_path / "a"

    return folder


def comfyui(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def diffusers(pipe, text):
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    return embeds, pooled


def assert_alike(clip, pipe, text):
    for made, wanted in zip(comfyui(clip, text), diffusers(pipe, text), strict=True):
        assert relative(made, wanted) < 1e-5, text


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_node_puts_lora_on_the_text_encoders(small, texts, make, dora):
    """Embeddings and pooled ones as in diffusers, at two strengths and chained; the CLIP that came in stays."""
    from coeffdiff.hosts.comfyui.loading import apply_adapter
    from coeffdiff.hosts.diffusers import load_adapter

    clip, pipe = texts
    path = make(dora=dora)
    plain = [comfyui(clip, text)[0] for text in PROMPTS]
    _, whole = apply_adapter(small.model, clip, path)
    _, half = apply_adapter(small.model, clip, path, 0.5)
    adapter = load_adapter(pipe, path)
    for text, before in zip(PROMPTS, plain, strict=True):
        assert_alike(whole, pipe, text)
        assert relative(comfyui(whole, text)[0], before) > 0.01
        assert torch.equal(comfyui(clip, text)[0], before)
    adapter.set_scale(0.5)
    assert_alike(half, pipe, PROMPTS[0])
    adapter.remove()
    if not dora:  # ranks of one weight add up
        _, twice = apply_adapter(small.model, half, path, 0.5)
        assert relative(comfyui(twice, PROMPTS[0])[0], comfyui(whole, PROMPTS[0])[0]) < 1e-5


def test_comfyuis_own_loader_reads_the_export(small, texts, make, tmp_path):
    """Every key of both encoders, and the same text embeddings as diffusers with the adapter."""
    import comfy.sd
    import comfy.utils

    from coeffdiff.hosts.diffusers import load_adapter
    from coeffdiff.hosts.kohya import export_kohya

    clip, pipe = texts
    path = make()
    file = export_kohya(path, tmp_path / "out.safetensors").lora
    _, changed = comfy.sd.load_lora_for_models(
        small.model, clip, comfy.utils.load_torch_file(str(file)), 1.0, 1.0
    )
    assert len(changed.patcher.patches) == 4 * (3 + 3)
    adapter = load_adapter(pipe, path)
    assert_alike(changed, pipe, PROMPTS[0])
    adapter.remove()


def test_a_missing_clip_is_refused(small, make):
    from coeffdiff.hosts.comfyui.loading import apply_adapter

    with pytest.raises(AdapterError, match=r"has LoRA on the text encoders: connect the checkpoint's CLIP"):
        apply_adapter(small.model, None, make())


def test_alpha_on_encoders_is_refused(small, texts, make):
    from coeffdiff.hosts.comfyui.loading import apply_adapter

    with pytest.raises(AdapterError, match=r"has alpha on the text encoders, which this node cannot apply"):
        apply_adapter(small.model, texts[0], make(alpha=True))
