"""Adapters in a real ComfyUI against coeffdiff in diffusers: the same numbers, and what stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from comfyui_twins import STEPS, relative

from comfyui_host import comfyui_folder

pytestmark = pytest.mark.skipif(comfyui_folder() is None, reason="COMFYUI names no ComfyUI")


def test_all_140_layers_agree_with_diffusers(narrow, tmp_path, monkeypatch):
    """Alpha and LoRA in float32 through ComfyUI's own loader: 1e-5; with alpha transposed or its blocks shifted by
    one they differ by more than a thousand times as much."""
    from coeffdiff.hosts.comfyui import loading
    from coeffdiff.hosts.comfyui.alpha import Deviations
    from narrow_sdxl import make_adapter

    path = make_adapter(tmp_path / "adapter", narrow.unet)
    wanted, base = narrow.diffusers(path), narrow.diffusers()
    right = loading.deviations
    assert relative(narrow.comfyui(), base) < 1e-5
    model = narrow.with_adapters(path)
    difference = relative(narrow.comfyui(model), wanted)
    print(
        f"UNet against UNet: {difference:.1e} relative, the adapter moves it by {relative(wanted, base):.2f}"
    )
    assert difference < 1e-5 and relative(wanted, base) > 0.1
    (wrapper,) = model.get_wrappers("diffusion_model", "coeffdiff")
    assert len(wrapper.deviations) == 140 and len(model.patches) == 560

    def transposed(*args):
        return {slot: Deviations(maps=d.maps.T) for slot, d in right(*args).items()}

    def shifted(*args):
        slots, values = zip(*right(*args).items(), strict=True)
        return dict(
            zip(slots, values[2:] + values[:2], strict=True)
        )  # each block's attn1 and attn2 to the next

    for control in (transposed, shifted):
        monkeypatch.setattr(loading, "deviations", control)
        wrong = relative(narrow.comfyui(narrow.with_adapters(path)), wanted)
        print(f"control, {control.__name__}: {wrong:.1e}")
        assert wrong > 1e-2


def test_through_the_sampler(narrow, tmp_path):
    """KSampler with guidance against diffusers' Euler at the same sigmas: 1e-4."""
    import comfy.sample
    import comfy.samplers
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from coeffdiff.hosts.diffusers import load_adapter
    from narrow_sdxl import make_adapter

    path = make_adapter(tmp_path / "adapter", narrow.unet)
    sampling = narrow.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", STEPS)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    torch.testing.assert_close(scheduler.sigmas, sigmas)
    pipe = StableDiffusionXLPipeline(None, None, None, None, None, narrow.unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    adapter = load_adapter(pipe, path)
    start = comfy.sample.prepare_noise(narrow.x[:1], 7) * sigmas[0]
    latents = pipe(
        latents=start / scheduler.init_noise_sigma, num_inference_steps=STEPS, guidance_scale=5.0,
        height=64, width=128, output_type="latent",
        prompt_embeds=narrow.context[:1], pooled_prompt_embeds=narrow.pooled[:1],
        negative_prompt_embeds=narrow.context[1:], negative_pooled_prompt_embeds=narrow.pooled[1:],
    ).images  # fmt: skip
    adapter.remove()
    ours = narrow.sampled(narrow.with_adapters(path)) * 0.13025  # out of process_latent_out
    difference = relative(ours, latents)
    print(f"KSampler, {STEPS} steps, guidance 5: {difference:.1e} relative")
    assert difference < 1e-4
    assert relative(narrow.sampled(narrow.model) * 0.13025, latents) > 1e-2


@pytest.mark.parametrize(
    "how",
    [
        {"kind": "coeff"},
        {"kind": "coeff", "mixes": "values"},
        {"kind": "lora", "rank": 5, "lora_alpha": 2.0},
        {"kind": "lora", "dora": True},
        {"kind": "coeff+lora", "dora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_each_kind_at_each_strength(small, make, how, scale):
    """DoRA is exact as well: its strength goes where PEFT's scale goes."""
    path = make(**how)
    wanted = small.diffusers(path, scale=scale)
    assert relative(small.comfyui(small.with_adapters(path, strength=scale)), wanted) < 1e-5
    assert relative(wanted, small.diffusers()) > 0.02


def test_alpha_and_lora_have_strengths_of_their_own(small, make):
    path = make()
    alpha, lora = make(kind="coeff"), make(kind="lora")  # the same numbers: they come from seed and name
    only_alpha = small.with_adapters(path, strength_lora=0.0)
    only_lora = small.with_adapters(path, strength_alpha=0.0, strength=0.5)
    assert relative(small.comfyui(only_alpha), small.diffusers(alpha)) < 1e-5 and not only_alpha.patches
    assert relative(small.comfyui(only_lora), small.diffusers(lora, scale=0.5)) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_add_up(small, make, dora):
    """In each order as in diffusers in that order: PEFT's DoRA scales what the adapters before it have changed."""
    one, two = make(token="one", dora=dora), make(token="two", seed=1, rank=4, dora=True)
    for order in ((one, two), (two, one)):
        assert relative(small.comfyui(small.with_adapters(*order)), small.diffusers(*order)) < 1e-5


def test_nothing_upstream_is_changed(small, make):
    """A model with one adapter is the same after a second was added to it, and the base model is, bit for bit."""
    before = small.comfyui()
    first = small.with_adapters(make(dora=True))
    kept = small.comfyui(first)
    state = (
        copy.copy(first.patches),
        copy.deepcopy(first.model_options),
        list(first.wrappers["diffusion_model"]),
    )
    second = small.with_adapters(make(token="two", seed=1, dora=True), model=first)
    assert not torch.equal(small.comfyui(second), kept)
    assert (first.patches, first.model_options, list(first.wrappers["diffusion_model"])) == state
    assert torch.equal(small.comfyui(first), kept)
    assert torch.equal(small.comfyui(), before) and not small.model.patches and not small.model.wrappers


def test_strength_0_is_the_model_itself(small, make):
    from coeffdiff.hosts.comfyui.loading import apply_adapter

    clip = object()
    assert apply_adapter(small.model, clip, make(), strength=0.0) == (small.model, clip)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_models_of_other_types(small, make, dtype):
    """Against diffusers with the weights so rounded: fp8 weights are computed with in float32 on a CPU, so exactly."""
    from narrow_sdxl import SMALL, comfyui_model

    path, twin = make(kind="coeff"), copy.copy(small)
    twin.unet = copy.deepcopy(small.unet)
    twin.model = comfyui_model(twin.unet, SMALL, dtype)
    for parameter in twin.unet.parameters():
        parameter.data = parameter.to(dtype).float()
    model = twin.with_adapters(path)
    narrow_type = model.model.manual_cast_dtype or dtype
    twin.x, twin.context, twin.pooled = (t.to(narrow_type) for t in (small.x, small.context, small.pooled))
    made = twin.comfyui(model)
    twin.x, twin.context, twin.pooled = small.x, small.context, small.pooled
    wanted = twin.diffusers(path)
    assert made.dtype == narrow_type
    assert relative(made, wanted) < (1e-5 if narrow_type == torch.float32 else 3e-2)
    assert relative(wanted, twin.diffusers()) > 0.1


def test_alpha_stays_float32(small):
    """1 + 0.002 is 1 in bfloat16; here it still moves the output by 0.002 of it."""
    from coeffdiff.hosts.comfyui.alpha import Deviations, MixedAttention

    q, k, v = torch.randn(3, 1, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = MixedAttention(Deviations(maps=0.002 * torch.eye(2)))
    wide = [layer(q.double(), k.double(), v.double(), {"n_heads": 2})]
    wide.append(
        MixedAttention(Deviations(maps=torch.zeros(2, 2)))(q.double(), k.double(), v.double(), {"n_heads": 2})
    )
    assert layer.maps.dtype == torch.float32
    torch.testing.assert_close(wide[0], 1.002 * wide[1], rtol=1e-6, atol=0)
    assert layer(q, k, v, {"n_heads": 2}).dtype == torch.bfloat16
