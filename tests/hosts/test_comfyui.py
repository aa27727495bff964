"""Adapters in a real ComfyUI against coeffdiff in diffusers: equal pictures, and what other nodes do beside them.

Skipped unless the environment variable COMFYUI names ComfyUI's folder; scripts/test_comfyui.sh fetches one.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE
from comfyui_host import comfyui_folder, put_on_path

pytestmark = pytest.mark.skipif(comfyui_folder() is None, reason="COMFYUI names no ComfyUI")
STEPS, SIDE = 3, 16  # of samplers; of the latents, in the small model


@pytest.fixture(scope="session", autouse=True)
def on_path():
    put_on_path(comfyui_folder())


class Twins:
    """One UNet in diffusers and in ComfyUI, and equal inputs for both."""

    def __init__(self, sizes, dtype=torch.float32, side=(8, 16)):
        from narrow_sdxl import comfyui_model, make_unet

        self.unet = make_unet(sizes)
        self.model = comfyui_model(self.unet, sizes, dtype)
        draw = torch.Generator().manual_seed(1)

        def noise(*shape):
            return torch.randn(2, *shape, generator=draw)

        self.x, self.context, self.pooled = noise(4, *side), noise(77, sizes.text), noise(sizes.pooled)
        self.ids = torch.tensor([[128.0, 256, 0, 0, 128, 256]]).expand(2, -1)
        self.t = torch.tensor([700, 200])

    @torch.no_grad()
    def diffusers(self, *adapters, scale=1.0):
        """The prediction with these adapters, which are taken off again."""
        from coeffdiff.hosts.diffusers import load_adapter

        pipe = SimpleNamespace(unet=self.unet)
        loaded = [load_adapter(pipe, path, scale) for path in adapters]
        added = {"text_embeds": self.pooled, "time_ids": self.ids}
        out = self.unet(self.x, self.t, encoder_hidden_states=self.context, added_cond_kwargs=added).sample
        for adapter in reversed(loaded):
            adapter.remove()
        return out

    def comfyui(self, model=None, control=None):
        """The prediction of a ModelPatcher, its patches and wrappers applied as a sampler does."""
        import comfy.model_management

        model = model or self.model
        comfy.model_management.load_models_gpu([model])
        sizes = self.unet.add_time_proj(self.ids.flatten()).reshape(2, -1)
        options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
        with torch.inference_mode():
            return model.model.diffusion_model(
                self.x, self.t.float(), self.context, torch.cat([self.pooled, sizes], -1), control, options
            ).clone()

    def with_adapters(self, *paths, model=None, **strengths):
        from coeffdiff.hosts.comfyui.loading import apply_adapter

        model = model or self.model
        for path in paths:
            model, _ = apply_adapter(model, None, path, **strengths)
        return model

    def sampled(self, model, **options):
        """Latents of KSampler after STEPS steps at guidance 5."""
        import comfy.sample

        noise = comfy.sample.prepare_noise(self.x[:1], 7)
        positive = [[self.context[:1], {"pooled_output": self.pooled[:1]}]]
        negative = [[self.context[1:], {"pooled_output": self.pooled[1:]}]]
        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                noise,
                STEPS,
                5.0,
                "euler",
                "ddim_uniform",
                positive,
                negative,
                0 * noise,
                disable_pbar=True,
                **options,
            ).clone()


def relative(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.fixture(scope="module")
def small():
    from narrow_sdxl import SMALL

    return Twins(SMALL)


@pytest.fixture(scope="module")
def narrow():
    from narrow_sdxl import NARROW

    return Twins(NARROW)


@pytest.fixture(scope="module")
def make(small, tmp_path_factory):
    """make(**of make_adapter): the folder of an adapter for the small model; made once for the same arguments."""
    from narrow_sdxl import make_adapter

    made = {}

    def folder(**how):
        key = str(sorted(how.items()))
        if key not in made:
            made[key] = make_adapter(tmp_path_factory.mktemp("adapter") / "a", small.unet, **how)
        return made[key]

    return folder


# --- the same numbers as in diffusers


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


# --- what stays as it was


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


# --- beside other nodes


def pag(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 2.0).args[0]


def sag(model):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]


def free_u(model):
    """FreeU's slot; its own node does nothing at other numbers of channels than SDXL's."""
    model = model.clone()
    model.set_model_output_block_patch(lambda h, skip, options: (1.1 * h, 0.8 * skip))
    return model


class PlainAttentionAndCallbacks:
    """What IP-Adapter nodes put into a slot: attention, to which each callback adds in its range of noise."""

    def __init__(self, callback, **kwargs):
        self.callback, self.kwargs = [callback], [kwargs]

    def __call__(self, q, k, v, extra_options):
        raise AssertionError("attention without alpha")


def add_query(out, q, k, v, extra_options, weight, **_):
    return weight * q


def ip_adapter(model):
    model = model.clone()
    patch = PlainAttentionAndCallbacks(add_query, weight=0.5, sigma_start=999.0, sigma_end=0.0)
    for block in (("input", 4, 0), ("middle", 0, 1)):
        model.set_model_attn2_replace(patch, *block)
    return model


@pytest.mark.parametrize(
    ("node", "layers"),
    [(pag, {"PerturbedAttentionGuidance (comfy_extras.nodes_pag)": 2}), (sag, {"SelfAttentionGuidance (comfy_extras.nodes_sag)": 1}),
     (free_u, {}), (ip_adapter, {})],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_other_nodes_before_or_after(small, make, caplog, node, layers):
    """The same in either order, both at work; where the other node computes attention itself, one line says so."""
    path = make()
    alone = [small.sampled(small.with_adapters(path))]
    if node is not ip_adapter:  # whose patch here is one that only mixed attention may take the place of
        alone.append(small.sampled(node(small.model)))
    caplog.clear()
    before = small.sampled(small.with_adapters(path, model=node(small.model)))
    lines = [record.message for record in caplog.records if "alpha is left out" in record.message]
    after = small.sampled(node(small.with_adapters(path)))
    assert relative(before, after) < 1e-6
    for one in alone:
        assert relative(before, one) > 1e-3
    assert len(lines) == len(layers)
    for owner, count in layers.items():
        assert f"left out of {count} of 34 attention layers: {owner} computes the attention there" in lines[0]
        assert "middle block 0, transformer block 0, attn1" in lines[0]


def test_callbacks_add_to_mixed_attention_in_their_range_of_noise():
    from coeffdiff.hosts.comfyui.alpha import Deviations, MixedAttention, _with_callbacks

    q, k, v = torch.randn(3, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    own = MixedAttention(Deviations(maps=torch.tensor([[0.0, 1.0], [2.0, -2.0]])))
    both = _with_callbacks(
        own, PlainAttentionAndCallbacks(add_query, weight=0.5, sigma_start=3.0, sigma_end=1.0)
    )
    for sigma, weight in ((4.0, 0.0), (3.0, 0.5), (2.0, 0.5), (0.5, 0.0)):
        options = {"n_heads": 2, "sigmas": torch.tensor([sigma])}
        torch.testing.assert_close(both(q, k, v, options), own(q, k, v, options) + weight * q)


def test_a_controlnet_adds_what_it_adds_in_diffusers(small, make):
    """Residuals of a ControlNet for the nine skips and the middle."""
    from coeffdiff.hosts.diffusers import load_adapter

    path, draw = make(), torch.Generator().manual_seed(3)
    sides = [(8, 16)] * 3 + [(4, 8)] * 3 + [(2, 4)] * 3
    skips = [0.3 * torch.randn(2, 32, *side, generator=draw) for side in sides]
    middle = 0.3 * torch.randn(2, 32, 2, 4, generator=draw)
    adapter = load_adapter(SimpleNamespace(unet=small.unet), path)
    with torch.no_grad():
        wanted = small.unet(
            small.x, small.t, encoder_hidden_states=small.context,
            added_cond_kwargs={"text_embeds": small.pooled, "time_ids": small.ids},
            down_block_additional_residuals=skips, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
    adapter.remove()
    made = small.comfyui(small.with_adapters(path), control={"output": list(skips), "middle": [middle]})
    assert relative(made, wanted) < 1e-5


def test_layers_that_a_node_skips_are_named(small, make, caplog):
    """A patch that another wrapper puts in alpha's place during the call."""

    def thief(executor, x, timesteps, context, y, control, options, **kwargs):
        taken = {("middle", 0, 0): lambda q, k, v, extra: v}
        replaced = {**options["patches_replace"], "attn1": {**options["patches_replace"]["attn1"], **taken}}
        return executor(x, timesteps, context, y, control, {**options, "patches_replace": replaced}, **kwargs)

    model = small.with_adapters(make())
    model.add_wrapper_with_key("diffusion_model", "thief", thief)
    small.comfyui(model)
    small.comfyui(model)
    assert caplog.text.count("alpha is left out of 1 of 34 attention layers: another node skipped") == 1


# --- the learned token


@pytest.fixture(scope="module")
def texts(small):
    """texts(): ComfyUI's CLIP and a pipeline of diffusers with the same two small text encoders, random weights."""
    from comfyui_texts import text_twins

    return text_twins(comfyui_folder(), small.unet)


def encoded(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


PROMPTS = (
    "a photo of ohwx  toy, OHWX; in the\nsnow",
    "ohwxy is another word",
    "ohwx",
    "",
    "caf\u00e9 ohwx \u732b " + "very " * 60,
)


def test_the_learned_word_works_in_a_prompt(small, texts, make_rows, tmp_path):
    """Both text embeddings and the pooled one, as diffusers has them: whole words only, in any case."""
    from coeffdiff.hosts.comfyui.loading import apply_adapter
    from coeffdiff.hosts.diffusers import load_adapter
    from narrow_sdxl import make_adapter

    clip, pipe = texts
    path = make_adapter(tmp_path / "a", small.unet, kind="coeff+token", rows=make_rows(3, seed=1))
    plain = [encoded(clip, text) for text in PROMPTS]
    _, changed = apply_adapter(small.model, clip, path)
    adapter = load_adapter(pipe, path)
    for text, (before, _) in zip(PROMPTS, plain, strict=True):
        with torch.no_grad():
            wanted, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        made, made_pooled = encoded(changed, text)
        assert relative(made, wanted) < 1e-5 and relative(made_pooled, pooled) < 1e-5, text
        assert torch.equal(made, before) == ("ohwx" not in text.lower().replace("ohwxy", "")), text
        assert torch.equal(encoded(clip, text)[0], before)  # the CLIP that was given
    adapter.remove()


def test_weights_of_prompts_and_several_words(small, texts, make_rows, tmp_path):
    """(ohwx:1.3) weighs the vectors as ComfyUI does; two adapters' words stand side by side, the longer one first."""
    from coeffdiff.hosts.comfyui.token import add_token

    clip, _ = texts
    one, two = make_rows(2, seed=1), make_rows(1, seed=2)
    both = add_token(add_token(clip, "ohwx", one, "one"), "my ohwx", two, "two")
    read = both.tokenize("a (my ohwx:1.3) ohwx")["l"][0]
    assert [weight for _, weight in read[1:5]] == [1.0, 1.3, 1.0, 1.0]
    vectors = [token for token, _ in read if torch.is_tensor(token)]
    torch.testing.assert_close(torch.stack(vectors), torch.cat([two["clip_l"], one["clip_l"]]))
    with pytest.raises(
        AdapterError, match="learned token 'OHWX', which another adapter in this chain has as well"
    ):
        add_token(both, "OHWX", one, "three")


@pytest.fixture(scope="module")
def make_rows(texts):
    """make_rows(vectors, seed): rows of a learned token for both encoders."""

    def rows(vectors, seed):
        draw = torch.Generator().manual_seed(seed)
        widths = {part: getattr(texts[0].cond_stage_model, part).transformer.get_input_embeddings().weight.shape[1]
                  for part in ("clip_l", "clip_g")}  # fmt: skip
        return {part: 0.02 * torch.randn(vectors, width, generator=draw) for part, width in widths.items()}

    return rows


# --- refusals


def test_a_token_needs_a_clip_of_sdxl(small, texts, make_rows, tmp_path):
    from narrow_sdxl import make_adapter

    rows = {part: values[:, :20] for part, values in make_rows(1, seed=1).items()}
    path = make_adapter(tmp_path / "a", small.unet, kind="coeff+token", rows=rows)
    with pytest.raises(
        AdapterError, match="learned token, 'ohwx', which lives in the text encoders: connect the"
    ):
        small.with_adapters(path)
    from coeffdiff.hosts.comfyui.loading import apply_adapter

    with pytest.raises(
        AdapterMismatch, match=r"shape \(1, 20\) for clip_l, but this encoder has embeddings of width"
    ):
        apply_adapter(small.model, texts[0], path)
    other = SimpleNamespace(cond_stage_model=SimpleNamespace(t5xxl=1), tokenizer=SimpleNamespace())
    with pytest.raises(
        AdapterMismatch, match=r"the CLIP that is connected has no clip_l\. Connect the CLIP of an SDXL"
    ):
        apply_adapter(small.model, other, path)


@pytest.mark.parametrize("family", ["SD15", "SDXLRefiner", "Flux"])
def test_other_base_models_are_refused(make, family):
    """ComfyUI's own classes for them, without weights."""
    import comfy.model_base
    import comfy.supported_models

    from coeffdiff.hosts.comfyui.loading import apply_adapter

    base = {"SD15": "BaseModel"}.get(family, family)
    model = object.__new__(getattr(comfy.model_base, base))
    torch.nn.Module.__init__(model)
    model.model_config = getattr(comfy.supported_models, family)({"disable_unet_model_creation": True})
    with pytest.raises(
        AdapterMismatch, match=f"an SDXL model, but the model that is connected is {family}. Connect"
    ):
        apply_adapter(SimpleNamespace(model=model), None, make())


def test_another_sdxl_and_half_an_adapter_are_refused(small, make, monkeypatch, tmp_path):
    """An adapter of another number of layers or heads, LoRA of another width, and a ComfyUI that takes only a part."""
    from narrow_sdxl import SMALL, make_adapter, make_unet

    deep, wide = SMALL._replace(depths=(1, 3)), SMALL._replace(channels=64)
    kinds = {"lora": "lora_A.weight is|no linear layer of this UNet", "coeff": "no such layer|heads there"}
    for sizes in (deep, wide):
        for kind, sentence in kinds.items():
            path = make_adapter(tmp_path / f"{sizes.channels}{kind}", make_unet(sizes), kind=kind)
            with pytest.raises(AdapterMismatch, match=sentence):
                small.with_adapters(path)
    patch = small.model.__class__.add_patches
    monkeypatch.setattr(
        small.model.__class__, "add_patches",
        lambda self, patches, *args: [] if "to_q" in next(iter(patches)) else patch(self, patches, *args),
    )  # fmt: skip
    with pytest.raises(
        AdapterError, match=r"took 102 of 136 LoRA modules\. Nothing was applied, since half a LoRA"
    ):
        small.with_adapters(make())


@pytest.mark.parametrize("file", [COEFF_FILE, LORA_FILE])
def test_damaged_adapters_are_refused(small, make, tmp_path, file):
    import shutil

    path = shutil.copytree(make(), tmp_path / "adapter")
    (path / file).write_bytes(b"damaged")
    with pytest.raises(AdapterError, match=f"{file} cannot be read; it is damaged or not a safetensors file"):
        small.with_adapters(path)
