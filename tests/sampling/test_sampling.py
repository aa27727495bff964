"""Pictures from a real, tiny pipeline: repeatable, independent of their batch, and carrying their recipe."""

from __future__ import annotations

import importlib.util
import json
import os
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image

from coeffdiff.errors import AdapterError, ConfigError, InjectionError, ModelError
from coeffdiff.hosts.diffusers import load_adapter, save_adapter
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.pocket.model import build_pipeline
from coeffdiff.sampling.device import _offload_sequentially, choose_device, prepare_device
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options, Request, check_options, picture_size
from coeffdiff.sampling.output import plan, recipe, write_pictures
from coeffdiff.sampling.prompts import encode_prompts, fill_prompt, length_warnings, warnings_for
from coeffdiff.sampling.runs import find_newest_run
from coeffdiff.sampling.schedulers import schedulers, set_scheduler
from coeffdiff.utils.png import read_recipe

QUICK = Options(steps=2, width=64, height=64)
PROMPT = "a photo of sks ball in the snow"
ONE = [Request(PROMPT, 11)]
FIVE = [
    Request(PROMPT, 11),
    Request("a red barn", 12),
    Request(PROMPT, 13),
    Request("", 14),
    Request("sks", 11),
]


@pytest.fixture
def pipe(micro_pipeline):
    return micro_pipeline


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """An adapter of both kinds with large random values, so that losing a part of it shows."""
    unet = build_pipeline("micro").unet
    folder = tmp_path_factory.mktemp("runs") / "sks" / "adapter"
    folder.parent.mkdir()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in add_lora(unet, rank=3, alpha=2.0).items():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
        layers = inject(unet)
        for coefficients in layers.values():
            coefficients.alpha.copy_(torch.randn(coefficients.alpha.shape, generator=generator))
    header = AdapterHeader(
        format_version=1,
        kind="coeff+lora",
        base_model="tiny",
        token="sks",
        class_word="ball",
        heads={name: c.heads for name, c in layers.items()},
        lora={"rank": 3, "alpha": 2.0},
        trained_steps=7,
        resolution=64,
    )
    save_adapter(folder, unet, header)
    return folder


def draw(pipe, requests=ONE, options=QUICK, **more) -> list[np.ndarray]:
    return [np.asarray(image) for _, image in generate(pipe, requests, options, **more)]


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# --- what decides a picture ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_picture(pipe):
    """Bit-equal at equal batch shape, whatever was drawn in between and whatever the global generator holds."""
    first = draw(pipe)[0]
    draw(pipe, FIVE[1:3])
    torch.manual_seed(99)
    np.testing.assert_array_equal(draw(pipe)[0], first)
    assert distance(draw(pipe, [Request(PROMPT, 12)])[0], first) > 50


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_alone_in_its_batch_a_picture_is_what_diffusers_makes_of_the_seed(pipe, guidance):
    """The same noise, embeddings, steps and decoding as a plain call of the pipeline, with and without guidance."""
    generator = torch.Generator("cpu").manual_seed(11)
    theirs = pipe(
        PROMPT, width=64, height=64, num_inference_steps=2, guidance_scale=guidance, generator=generator
    )
    ours = draw(pipe, options=Options(steps=2, guidance=guidance, width=64, height=64))[0]
    np.testing.assert_array_equal(ours, np.asarray(theirs.images[0]))


@pytest.mark.parametrize("scheduler", ["euler", "euler-ancestral", "ddpm"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_picture_does_not_depend_on_its_batch(pipe, adapter_folder, scheduler, with_adapter):
    """Five pictures in batches of 1, 3 (3 + 2) and 5 agree within 2/255, also where every step draws noise."""
    if with_adapter:
        load_adapter(pipe, adapter_folder)
    set_scheduler(pipe, scheduler)
    one, three, five = (
        draw(pipe, FIVE, Options(steps=3, width=64, height=64, batch_size=size)) for size in (1, 3, 5)
    )
    assert len(one) == len(three) == len(five) == 5
    for other in (three, five):
        assert max(map(distance, one, other)) <= 2
    assert distance(one[0], one[2]) > 50


def test_an_adapter_changes_the_picture_by_its_scale_and_not_at_scale_zero(pipe, adapter_folder):
    """Scale 1 and 0.5 give other pictures than the base model and each other; 0 gives its bytes."""
    base = draw(pipe)[0]
    adapter = load_adapter(pipe, adapter_folder)
    full = draw(pipe)[0]
    adapter.set_scale(0.5)
    half = draw(pipe)[0]
    adapter.set_scale(0)
    np.testing.assert_array_equal(draw(pipe)[0], base)
    assert min(distance(full, base), distance(half, base), distance(full, half)) > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_starts_from_the_noise_of_float32(dtype, monkeypatch):
    """torch draws other numbers in half precision; the noise is drawn in float32 and rounded."""
    seen = {}
    pipe = build_pipeline("micro", dtype=dtype)
    real = pipe.prepare_latents
    monkeypatch.setattr(
        pipe, "prepare_latents", lambda *a: real(*a[:-1], seen.setdefault("noise", a[-1])), raising=True
    )
    draw(pipe)
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(11)).to(dtype)
    assert torch.equal(seen["noise"][0], expected)


def test_guidance_of_one_or_less_runs_the_unet_once_a_step(pipe):
    """Two steps: two passes of one latent without guidance, two passes of a pair with it."""
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda _m, inputs: sizes.append(len(inputs[0])))
    for guidance in (0.0, 1.0, 1.5):
        draw(pipe, options=Options(steps=2, guidance=guidance, width=64, height=64))
    assert sizes == [1, 1, 1, 1, 2, 2]


def test_an_empty_negative_prompt_is_none_and_another_one_counts(pipe):
    """ "" gives the zero embeddings that SDXL's config asks for; a text gives its own."""
    encoded = encode_prompts(pipe, ["x"])["x"]
    assert not encoded.negative_text.any() and not encoded.negative_pooled.any()
    blurred = Options(steps=2, width=64, height=64, negative_prompt="blurred")
    assert distance(draw(pipe)[0], draw(pipe, options=blurred)[0]) > 20


# --- prompts ---------------------------------------------------------------------------------------------------


def test_each_distinct_prompt_is_encoded_once(pipe, monkeypatch):
    """Six pictures of two prompts: two calls of encode_prompt with a text, and the negative prompt only in the first."""
    calls = []
    real = pipe.encode_prompt

    def counted(*args, **kwargs):
        text = args[0] if args else kwargs.get("prompt")
        if text is not None:
            calls.append((text, kwargs["negative_prompt"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", counted)
    options = Options(steps=1, width=64, height=64, negative_prompt="blurred", batch_size=4)
    draw(pipe, [Request(prompt, seed) for seed in range(3) for prompt in ("a", "b")], options)
    assert calls == [("a", "blurred"), ("b", None)]


def test_encoded_before_gives_the_same_bytes_without_text_encoders(pipe):
    """Training's way: encode, free the text encoders, sample from a pipeline that has none."""
    options = Options(steps=2, width=64, height=64, negative_prompt="blurred", batch_size=2)
    expected = draw(pipe, FIVE, options)
    encoded = encode_prompts(pipe, [r.prompt for r in FIVE], negative_prompt="blurred")
    pipe.text_encoder = pipe.text_encoder_2 = pipe.tokenizer = pipe.tokenizer_2 = None
    for ours, theirs in zip(draw(pipe, FIVE, options, encoded=encoded), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ConfigError, match="has no text encoders"):
        draw(pipe)
    with pytest.raises(ConfigError, match='"a cat" is not among those'):
        draw(pipe, [Request("a cat", 0)], encoded=encoded)
    with pytest.raises(ConfigError, match='negative prompt "blurred", not ""'):
        draw(pipe, encoded=encoded)
    assert draw(pipe, options=Options(steps=1, guidance=1, width=64, height=64), encoded=encoded)


def test_prompts_encoded_without_guidance_cannot_be_guided(pipe):
    """There is no negative embedding to guide away from."""
    encoded = encode_prompts(pipe, [PROMPT], guidance=1.0)
    with pytest.raises(ConfigError, match="encoded without guidance, and 5 needs it"):
        draw(pipe, encoded=encoded)


def test_the_placeholder_becomes_the_one_adapters_token():
    """<V> stands for the token; without an adapter, or with two, nobody knows which."""
    assert fill_prompt("<V> ball beside a <V>", ["sks"]) == "sks ball beside a sks"
    assert fill_prompt("a {token} < V >", []) == "a {token} < V >"
    with pytest.raises(ConfigError, match=r"<V> in the prompt \"a <V>\" has no meaning without an adapter"):
        fill_prompt("a <V>", [])
    with pytest.raises(ConfigError, match="may mean sks or ohwx; write <V1> or <V2>, or the word itself"):
        fill_prompt("a <V>", ["sks", "ohwx"])
    assert fill_prompt("<V1> beside <V2>", ["sks", "ohwx"]) == "sks beside ohwx"
    with pytest.raises(ConfigError, match=r"There is no <V3> .*<V1> is sks, <V2> is ohwx"):
        fill_prompt("<V3>", ["sks", "ohwx"])
    assert fill_prompt("a <V>", ["sks", "sks"]) == "a sks"  # loading both says why not


def test_a_prompt_without_the_token_is_named(pipe, adapter_folder):
    """The token counts as a whole word in any case; "asks" and "sks2" do not hold it."""
    adapter = load_adapter(pipe, adapter_folder)
    fine = ["a photo of sks ball", "SKS, ball", "(sks)", "the ball's name is sks"]
    assert warnings_for(fine, [(adapter.path, adapter.header)], pipe) == []
    lines = warnings_for(["who asks", "sks2", "sks2"], [(adapter.path, adapter.header)], pipe)
    assert [line.split(" lacks ")[0] for line in lines] == ['The prompt "who asks"', 'The prompt "sks2"']
    assert lines[0].endswith(
        f'lacks sks, the token of {adapter_folder}; write for instance "a photo of sks ball".'
    )
    assert warnings_for(["who asks"], [], pipe) == []


def test_a_prompt_that_is_too_long_says_what_is_not_read(pipe):
    """The tiny tokenizer makes a token of each byte: 75 letters fit between begin and end, and the rest does not."""
    letters = "abcde " * 15  # 75 letters
    assert length_warnings(letters, pipe) == []
    (line,) = length_warnings(letters + "in\nthe snow", pipe)
    assert line.endswith(
        'has 86 tokens, begin and end included, and the model reads 77; it will not see "in the snow".'
    )
    # A word that is cut in two is named whole.
    (line,) = length_warnings(letters[:-3] + "xyz tail", pipe)
    assert line.endswith('it will not see "abcxyz tail".')
    (line,) = length_warnings("🎉" * 20, pipe)  # four bytes each
    assert "has 82 tokens" in line


def test_what_a_negative_prompt_does_is_said(pipe):
    """Without guidance it does nothing; with it, it may be too long like any other."""
    lines = warnings_for([], [], pipe, Options(negative_prompt="blurred", guidance=1))
    assert lines == ["The negative prompt has no effect without guidance, and 1 is none."]
    assert len(warnings_for([], [], pipe, Options(negative_prompt="x" * 80))) == 1
    assert warnings_for([], [], pipe, Options(negative_prompt="blurred")) == []


def test_a_long_prompt_is_drawn_without_a_word_from_the_libraries(pipe, capfd):
    """What is cut off is ours to say, once; diffusers' and transformers' own messages stay away."""
    draw(pipe, [Request("long " * 40, 0)], Options(steps=1, width=64, height=64))
    assert capfd.readouterr() == ("", "")


# --- sizes, steps, progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (8, 72)])
def test_sizes_other_than_square(pipe, size):
    """Width and height come out as asked for, in this order."""
    image = next(iter(generate(pipe, [Request("x", 0)], Options(2, width=size[0], height=size[1]))))[1]
    assert image.size == size


def test_the_default_size_is_the_models_own(pipe):
    """The tiny model's: 8 latents x 8 pixels."""
    assert picture_size(pipe, Options()) == (64, 64)
    pipe.default_sample_size = [4, 12]  # rows and columns, as some UNets' configs have it
    assert picture_size(pipe, Options()) == (96, 32)


@pytest.mark.parametrize(("asked", "nearest"), [(101, 104), (1, 8), (0, 8), (-64, 8), (1023, 1024)])
def test_a_size_that_cannot_be_made_names_the_nearest_that_can(pipe, asked, nearest):
    """Before anything is drawn: generate itself raises, not its first picture."""
    with pytest.raises(ConfigError, match=f"A height of {asked} pixels is no multiple of 8; {nearest} is."):
        generate(pipe, [Request("x", 0)], Options(width=64, height=asked))


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"batch_size": 0}, {"guidance": float("nan")}, {"guidance": -1.0}]
)
def test_impossible_options_are_refused(bad):
    """By name."""
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Options(**bad)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    """torch would wrap the one and fail on the other."""
    with pytest.raises(ConfigError, match=f"The seed {seed} must lie"):
        Request("x", seed)
    Request("x", 2**63 - 1)


def test_progress_counts_pictures_by_their_steps(pipe, capfd):
    """Three pictures in batches of two, two steps each; diffusers' own bar stays away and comes back as it was."""
    pipe.set_progress_bar_config(desc="mine")
    seen = []
    options = Options(steps=2, width=64, height=64, batch_size=2)
    draw(pipe, [Request("x", seed) for seed in range(3)], options, on_progress=seen.append)
    assert seen == [1.0, 2.0, 2.5, 3.0]
    assert capfd.readouterr().err == ""
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_pictures_come_as_they_are_made_and_nothing_asks_for_none(pipe):
    """The first picture is there before the second is begun; an empty list gives no picture."""
    seen = []
    pictures = generate(pipe, FIVE[:2], QUICK, on_progress=seen.append)
    assert seen == []
    next(pictures)
    assert seen == [0.5, 1.0]
    assert list(generate(pipe, [], QUICK)) == []


def test_more_steps_than_the_model_was_trained_with_are_refused(pipe):
    """SDXL knows 1000 timesteps; a scheduler's own complaint becomes a sentence as well."""
    with pytest.raises(ConfigError, match="1001 steps are more than the 1000"):
        check_options(pipe, Options(steps=1001))
    check_options(pipe, Options(steps=1000))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm"])
def test_steps_that_begin_beyond_training_are_refused(pipe, name):
    """Spaced by 1 and moved by 1, as SDXL's are, 1000 steps begin at timestep 1000, and the model knows 0 to 999."""
    assert (pipe.scheduler.config.timestep_spacing, pipe.scheduler.config.steps_offset) == ("leading", 1)
    set_scheduler(pipe, name)
    with pytest.raises(
        ConfigError, match=r"cannot do 1000 steps: .* at timestep 1000, .* at most 999 steps are"
    ):
        check_options(pipe, Options(steps=1000))
    check_options(pipe, Options(steps=999))
    pipe.scheduler.set_timesteps(999)
    latents, first = torch.zeros(1, 4, 2, 2), pipe.scheduler.timesteps[0]
    assert pipe.scheduler.step(torch.zeros_like(latents), first, latents).prev_sample.isfinite().all()


# --- what must not go wrong silently ---------------------------------------------------------------------------


def test_a_displaced_alpha_is_noticed_before_the_first_picture(pipe, adapter_folder):
    """Attention slicing replaces the processors; the error names it."""
    load_adapter(pipe, adapter_folder)
    pipe.enable_attention_slicing(1)
    with pytest.raises(InjectionError, match="attention slicing"):
        generate(pipe, [Request("x", 0)], QUICK)


@pytest.mark.parametrize("broken", ["unet", "vae"])
def test_a_picture_that_is_not_finite_is_an_error_that_names_where(pipe, broken):
    """Never a black picture: one NaN among the weights, and the network and its precision are named."""
    network = getattr(pipe, broken)
    next(p for name, p in network.named_parameters() if "conv_in.weight" in name and "encoder" not in name)
    weight = pipe.unet.conv_in.weight if broken == "unet" else pipe.vae.decoder.conv_in.weight
    weight.data[0, 0, 0, 0] = float("nan")
    name = {"unet": "UNet", "vae": "VAE"}[broken]
    with pytest.raises(ModelError, match=f"seed 11, is not finite: the {name} in float32 made NaN"):
        draw(pipe)


def test_a_vae_that_overflows_in_float16_is_decoded_in_float32(pipe, monkeypatch):
    """force_upcast: float32 while decoding, float16 before and after; without it float16 all along."""
    half = build_pipeline("micro", dtype=torch.float16)
    seen = []
    real = half.vae.decode
    monkeypatch.setattr(half.vae, "decode", lambda z, **kw: (seen.append(z.dtype), real(z, **kw))[1])
    draw(half)
    assert half.vae.dtype == torch.float16
    half.vae.register_to_config(force_upcast=False)
    draw(half)
    assert seen == [torch.float32, torch.float16]


def test_a_float16_vae_that_makes_nan_says_what_to_use_instead(monkeypatch):
    """SDXL's own VAE in float16 without its force_upcast."""
    half = build_pipeline("micro", dtype=torch.float16)
    half.vae.register_to_config(force_upcast=False)
    half.vae.decoder.conv_out.weight.data *= 3e4
    with pytest.raises(ModelError, match=r"VAE in float16 .*--precision bf16 or fp32.*sdxl-vae-fp16-fix"):
        draw(half)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_vae_beside_a_half_precision_unet(dtype):
    """How backbone loads SDXL on a GPU; diffusers' own decoding stumbles over the two precisions."""
    half = build_pipeline("micro", dtype=dtype)
    torch.nn.Module.to(half.vae, torch.float32)
    assert draw(half)[0].std() > 1
    assert recipe(half, Request("x", 0), QUICK)["vae_precision"] == "float32"


def test_latent_means_and_deviations_are_undone(pipe):
    """Some VAEs have them in their config; with mean 0 and deviation 1 nothing changes, with others all does."""
    plain = draw(pipe)[0]
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    np.testing.assert_array_equal(draw(pipe)[0], plain)
    pipe.vae.register_to_config(latents_mean=[1.0, 0.0, -1.0, 2.0])
    assert distance(draw(pipe)[0], plain) > 20


# --- devices ---------------------------------------------------------------------------------------------------


def test_offload_without_a_gpu_is_refused(pipe):
    """And so is an offload that does not exist."""
    for offload in ("model", "sequential"):
        with pytest.raises(ConfigError, match=f"--offload {offload} .* no GPU is used here"):
            prepare_device(pipe, "cpu", offload)
    with pytest.raises(ConfigError, match="none, model or sequential, not 'disk'"):
        prepare_device(pipe, "cpu", "disk")
    prepare_device(pipe, "cpu")


@pytest.fixture
def sequential(monkeypatch):
    """prepare_device's sequential offload with the CPU as its GPU; diffusers would call it cpu:0, another device."""
    real = accelerate.cpu_offload
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda m, _device, **more: real(m, torch.device("cpu"), **more)
    )
    return lambda pipe: _offload_sequentially(pipe, torch.device("cpu"))


def test_alpha_survives_sequential_offload(pipe, adapter_folder, sequential):
    """Weights lie on the meta device between their uses, and alpha, which no hook would fetch, does not."""
    load_adapter(pipe, adapter_folder)
    expected = draw(pipe)[0]
    sequential(pipe)
    assert pipe.unet.conv_in.weight.is_meta
    np.testing.assert_array_equal(draw(pipe)[0], expected)


def test_a_dora_is_not_offloaded_sequentially(pipe, sequential, tmp_path):
    """Its forward reads weights that no hook has brought; nothing has been moved when this is said."""
    lora = LoraHeader(rank=3, alpha=3.0, dora=True)
    header = AdapterHeader(
        format_version=1,
        kind="lora",
        base_model="tiny",
        token="sks",
        heads={},
        lora=lora,
        trained_steps=7,
        resolution=64,
    )
    unet = build_pipeline("micro").unet
    add_lora(unet, rank=3, alpha=3.0, dora=True)
    save_adapter(tmp_path / "adapter", unet, header)
    load_adapter(pipe, tmp_path)
    with pytest.raises(ConfigError, match=r"adapter is a DoRA, which --offload sequential.*--offload model"):
        sequential(pipe)
    assert not pipe.unet.conv_in.weight.is_meta
    assert draw(pipe)[0].std() > 1


def test_an_adapter_that_came_after_sequential_offload_is_refused(pipe, sequential):
    """Its alpha went to the meta device, where values vanish."""
    sequential(pipe)
    layers = inject(pipe.unet)
    assert any(isinstance(c, Coefficients) and c.alpha.is_meta for c in layers.values())
    with pytest.raises(ConfigError, match="loaded after prepare_device"):
        draw(pipe)


def test_a_float16_vae_is_upcast_before_sequential_offload(sequential):
    """Afterwards its weights are out of reach, and decoding would be done in float16."""
    half = build_pipeline("micro", dtype=torch.float16)
    sequential(half)
    assert half.vae.dtype == torch.float32
    assert draw(half)[0].std() > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_device_is_chosen_with_its_precision():
    """float32 where there is no CUDA, unless another is asked for."""
    device, dtype = choose_device()
    assert device.type in ("cpu", "mps") and dtype == torch.float32
    assert choose_device("bf16")[1] == torch.bfloat16


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_draws_in_bfloat16_only_where_it_does_not_imitate_it(native, dtype, monkeypatch):
    """A T4 or a V100 says that it can, unless it is asked without imitation."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert choose_device(device=torch.device("cuda"))[1] == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_a_gpu_draws_the_picture_of_the_cpu(pipe, adapter_folder, offload):
    """The noise is the CPU's, so the picture is nearly: sums are rounded in another order."""
    load_adapter(pipe, adapter_folder)
    set_scheduler(pipe, "euler-ancestral")
    expected = draw(pipe, FIVE)
    prepare_device(pipe, "cuda", offload)
    for ours, theirs in zip(draw(pipe, FIVE), expected, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 2


# --- schedulers ------------------------------------------------------------------------------------------------


def usable_names() -> list[str]:
    found = schedulers(SimpleNamespace(scheduler=EulerDiscreteScheduler()))
    return sorted(key for key, (_, lacks) in found.items() if not lacks)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", usable_names())
def test_every_scheduler_draws_with_few_steps(pipe, name, prediction_type):
    """1, 2 and 3 steps give pictures, with the model's own noise schedule and prediction type."""
    pipe.scheduler.register_to_config(prediction_type=prediction_type)
    before = dict(pipe.scheduler.config)
    set_scheduler(pipe, name)
    for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert pipe.scheduler.config[key] == before[key]
    for steps in (1, 2, 3):
        assert draw(pipe, options=Options(steps=steps, width=64, height=64))[0].std() > 1


def test_thirteen_schedulers_need_nothing_more_and_the_others_say_why_not(pipe):
    """EDMEuler replaces the noise schedule by its own; two need a package that is no dependency of ours."""
    lacking = {cls.__name__: lacks for cls, lacks in schedulers(pipe).values() if lacks}
    assert (
        lacking.pop("EDMEulerScheduler")
        == "it knows nothing of this model's beta_start, beta_end, beta_schedule"
    )
    needs = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}
    expected = {
        name: f"it needs {package} (pip install {package})"
        for name, package in needs.items()
        if importlib.util.find_spec(package) is None
    }
    assert lacking == expected
    assert len(usable_names()) == 15 - len(expected)
    for name in ("edm_euler", *([] if importlib.util.find_spec("torchsde") else ["dpmsolver sde"])):
        with pytest.raises(ConfigError, match="cannot be used: it "):
            set_scheduler(pipe, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("EULER", "EulerDiscreteScheduler"),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("euler-a", "EulerAncestralDiscreteScheduler"),
        ("ddim", "DDIMScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("dpmsolver_multistep", "DPMSolverMultistepScheduler"),
        ("KDPM2 Ancestral", "KDPM2AncestralDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
    ],
)
def test_schedulers_by_name(pipe, name, expected):
    """Any case and punctuation, with and without Scheduler and Discrete, and beginnings that only one has."""
    set_scheduler(pipe, name)
    assert type(pipe.scheduler).__name__ == expected


def test_a_scheduler_that_does_not_exist_names_the_nearest_and_all(pipe):
    """A typo, a beginning of several, and nothing at all."""
    with pytest.raises(
        ConfigError, match=r"no scheduler 'eulr' .* Did you mean Euler\? There are DDIM, DDPM, .*UniPC"
    ):
        set_scheduler(pipe, "eulr")
    with pytest.raises(ConfigError, match="may be DPMSolverMultistep or DPMSolverSDE or DPMSolverSinglestep"):
        set_scheduler(pipe, "dpmsolver")
    with pytest.raises(ConfigError, match="no scheduler ''"):
        set_scheduler(pipe, "")
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"


def test_a_scheduler_keeps_what_was_its_predecessors_default(pipe):
    """diffusers forgets defaults on the way: 0.02 is Euler's default for beta_end, and Heun's is 0.012."""
    pipe.scheduler = EulerDiscreteScheduler()
    set_scheduler(pipe, "heun")
    assert pipe.scheduler.config.beta_end == 0.02
    assert pipe.scheduler.config.beta_schedule == "linear"


def test_ddim_does_not_clip_latents(pipe):
    """Its default keeps pixels between -1 and 1; latents go beyond, and clipping them changes the picture."""
    set_scheduler(pipe, "ddim")
    assert not pipe.scheduler.config.clip_sample
    pictures = draw(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    assert distance(pictures[0], draw(pipe)[0]) > 20


def test_a_model_of_zero_terminal_snr_refuses_schedulers_that_cannot(pipe):
    """UniPC can rescale its betas; PNDM would sample from another noise schedule without a word."""
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    set_scheduler(pipe, "unipc")
    assert pipe.scheduler.config.rescale_betas_zero_snr
    with pytest.raises(ConfigError, match=r"PNDMScheduler cannot be used: .*rescale_betas_zero_snr"):
        set_scheduler(pipe, "pndm")


# --- recipes and files -----------------------------------------------------------------------------------------


def test_a_recipe_holds_what_it_takes(pipe, adapter_folder):
    """Every option, the adapter with its scale, the versions, and whatever the caller adds."""
    load_adapter(pipe, adapter_folder, scale=0.25)
    options = Options(steps=9, guidance=3.5, negative_prompt="blurred", width=96, batch_size=2)
    found = recipe(pipe, Request("an sks", 5), options, {"model": "my/model", "trained_steps": 3})
    versions = found.pop("versions")
    assert set(versions) == {"coeffdiff", "torch", "diffusers", "transformers"}
    assert found == {
        "prompt": "an sks",
        "negative_prompt": "blurred",
        "seed": 5,
        "steps": 9,
        "guidance": 3.5,
        "scheduler": "EulerDiscreteScheduler",
        "scheduler_settings": {"timestep_spacing": "leading"},
        "prediction_type": "epsilon",
        "width": 96,
        "height": 64,
        "batch_size": 2,
        "model": "my/model",
        "precision": "float32",
        "vae_precision": "float32",
        "device": "cpu",
        "adapters": [
            {
                "path": str(adapter_folder),
                "scale": 0.25,
                "kind": "coeff+lora",
                "token": "sks",
                "trained_steps": 7,
            }
        ],
        "trained_steps": 3,
    }


def test_pictures_and_their_grid_are_written(pipe, tmp_path):
    """A file for each request that repeats its picture from its own recipe, and one grid; nothing is overwritten."""
    requests = [Request(prompt, seed) for prompt in ("a/b: 猫?", "..") for seed in (7, 8)]
    files = write_pictures(pipe, requests, QUICK, tmp_path / "new", details={"model": "tiny"})
    assert [file.name for file in files] == [
        "001-a-b-猫-seed7.png",
        "002-a-b-猫-seed8.png",
        "003-picture-seed7.png",
        "004-picture-seed8.png",
        "grid.png",
    ]
    found = read_recipe(files[3])
    again = Options(
        found["steps"], found["guidance"], found["negative_prompt"], found["width"], found["height"]
    )
    with Image.open(files[3]) as image:
        np.testing.assert_array_equal(
            draw(pipe, [Request(found["prompt"], found["seed"])], again)[0], np.asarray(image)
        )
    before = {path: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert {path.name for path in before} == {file.name for file in files}
    more = write_pictures(pipe, requests[:1], Options(1, width=64, height=64), tmp_path / "new")
    assert [file.name for file in more] == ["001-a-b-猫-seed7-2.png", "grid-2.png"]
    assert all(path.read_bytes() == content for path, content in before.items())
    same = write_pictures(pipe, requests, QUICK, tmp_path / "new", overwrite=True)
    assert same == files and len(list((tmp_path / "new").iterdir())) == 7


def test_scales_are_drawn_side_by_side_with_equal_noise(pipe, adapter_folder, tmp_path):
    """Each picture is that of the adapter loaded at its scale, bit for bit and batch for batch; the recipe and the
    name carry the scale, and afterwards the adapter has its own again."""
    adapter = load_adapter(pipe, adapter_folder, scale=0.7)
    prompts, seeds, scales = (PROMPT, "a red barn"), (11, 12), (0.0, 0.5, -1.0)
    requests = [Request(p, n, scale) for p in prompts for n in seeds for scale in scales]
    options = Options(steps=2, width=64, height=64, batch_size=3)
    files = write_pictures(pipe, requests, options, tmp_path / "swept")
    assert adapter.scale == 0.7
    assert [f.name for f in files[:3]] == [
        "001-a-photo-of-sks-ball-in-the-snow-seed11-scale0.png",
        "002-a-photo-of-sks-ball-in-the-snow-seed11-scale0.5.png",
        "003-a-photo-of-sks-ball-in-the-snow-seed11-scale-1.png",
    ]
    grid = Image.open(files[-1])
    for number, scale in enumerate(scales):
        adapter.set_scale(scale)
        alone = draw(pipe, [Request(p, n) for p in prompts for n in seeds], options)
        swept = files[number:-1:3]
        assert [read_recipe(file)["adapters"][0]["scale"] for file in swept] == [scale] * 4
        for file, expected in zip(swept, alone, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(file)), expected)
        # The grid's columns are scales, its rows prompts and seeds: 64 px pictures are drawn at 256
        x = grid.width - (3 - number) * 264 + 2
        for row, expected in enumerate(alone):
            assert grid.getpixel((x, grid.height - (4 - row) * 264 + 2)) == tuple(expected[0, 0])


def test_a_learned_token_is_an_ordinary_word_in_the_column_of_scale_0(pipe, tmp_path):
    """That picture is the base model's, bit for bit; at every other scale the token is read as it was learned."""
    base, folder = draw(pipe)[0], tmp_path / "adapter"
    rows = {"clip_l": torch.full((2, 20), 0.7), "clip_g": torch.full((2, 28), -0.4)}
    kind = {"kind": "token", "token": "sks", "vectors": 2, "base_model": "tiny"}
    header = AdapterHeader(format_version=1, heads={}, trained_steps=7, resolution=64, **kind)
    save_adapter(folder, pipe.unet, header, rows=rows)
    load_adapter(pipe, folder)
    learned = draw(pipe)[0]
    assert distance(learned, base) > 20
    swept = draw(pipe, [Request(PROMPT, 11, scale) for scale in (0.0, 1.0, 0.0, 0.5)])
    for picture, expected in zip(swept, (base, learned, base, learned), strict=True):
        np.testing.assert_array_equal(picture, expected)


def test_the_work_is_planned_scale_by_scale():
    """Batches hold neighbours of one scale, whatever the order of the requests."""
    requests = [Request("x", seed, scale) for seed in range(3) for scale in (0.0, 1.0)]
    assert plan(requests, 2) == [[0, 2], [4], [1, 3], [5]]
    assert plan([Request("x", seed) for seed in range(3)], 2) == [[0, 1], [2]]


def test_the_own_scale_comes_back_after_an_error(pipe, adapter_folder):
    """Also where somebody stops asking for pictures in the middle."""
    adapter = load_adapter(pipe, adapter_folder, scale=0.7)
    pictures = generate(pipe, [Request("sks", 1, 0.2), Request("sks", 1, 0.3)], QUICK)
    next(pictures)
    assert adapter.scale == 0.2
    pictures.close()
    assert adapter.scale == 0.7


def test_a_scale_needs_an_adapter_and_a_number(pipe):
    with pytest.raises(ConfigError, match="no adapter is loaded that could have it"):
        generate(pipe, [Request("x", 1, 0.5)], QUICK)
    with pytest.raises(ConfigError, match="A scale must be a finite number, not nan"):
        Request("x", 1, float("nan"))


# --- runs -----------------------------------------------------------------------------------------------------


def test_the_newest_finished_run_is_found(tmp_path):
    """By its adapter's time, not by its name; runs without an adapter do not count."""
    runs = tmp_path / "runs"
    with pytest.raises(AdapterError, match=r"There is no finished run under .*coeffdiff train --images"):
        find_newest_run(runs)
    (runs / "begun").mkdir(parents=True)
    (runs / "begun/config.yaml").touch()
    with pytest.raises(AdapterError, match=r"No run under .* has finished yet \(.*begun\).*--resume"):
        find_newest_run(runs)
    for age, name in enumerate(("b", "c", "a")):
        file = runs / name / "adapter/coeff.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))
    assert find_newest_run(runs) == runs / "b"


def test_recipes_are_plain_json(pipe):
    """So that any program may read them."""
    json.dumps(recipe(pipe, Request("x", 0), QUICK))


def test_a_prompt_that_is_no_text_is_refused():
    """A byte that is no UTF-8 reaches Python as half of a surrogate pair, which no tokenizer takes."""
    with pytest.raises(ConfigError, match=r"The prompt 'a \\udcff' is not valid text; it must be UTF-8"):
        fill_prompt("a \udcff", [])
    with pytest.raises(ConfigError, match="The negative prompt is not valid text"):
        Options(negative_prompt="\udcff")
