"""Stable Diffusion 1.5 from photos to pictures: one run, and what is made of its adapter here and in diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import test_loop
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from test_loop import assert_same, settings_for

from coeffdiff import load_adapter
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import AdapterMismatch, ModelError
from coeffdiff.hosts.kohya import export_kohya
from coeffdiff.hosts.merging import merge_adapters
from coeffdiff.hosts.unet import alpha_off
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import EMBEDS_FILE, LORA_FILE
from coeffdiff.models.controlnet import find_controlnet
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.opening import Asked
from coeffdiff.models.pipelines import make_pipeline
from coeffdiff.pocket.model import build_pipeline
from coeffdiff.preflight.prediction import predict
from coeffdiff.preflight.texts import text_findings
from coeffdiff.sampling.drawing import draw
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.image_inputs import ImageOptions, pipeline_for, read_inputs
from coeffdiff.sampling.options import Options, Request
from coeffdiff.sampling.prompts import encode_prompts
from coeffdiff.sampling.selection import Selection
from coeffdiff.sampling.vae_precision import kept_precision
from coeffdiff.training import loop
from coeffdiff.training.resolve import resolve
from coeffdiff.training.resuming import settings_to_resume
from coeffdiff.training.run_folder import RunFolder

here = test_loop.here
PROMPT = "a photo of sks ball"
WHOLE = {"subject.learn_token": True, "prior.weight": 0.5, "training.checkpoint_every": 2}


def trained(model: Path, output: str, steps: int = 3, **values) -> None:
    loop.train(settings_for(model, output, **{"training.steps": steps, **values}))


@pytest.fixture(scope="module")
def runs(sd15_folder, tmp_path_factory):
    """Two runs: `whole` of alpha, LoRA and a learned token, with pictures; `plain` of alpha and LoRA."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        Path("photos").mkdir()
        for i in range(3):
            Image.radial_gradient("L").resize((80 + i, 64)).convert("RGB").save(f"photos/{i}.png")
        pictures = {"validation.prompts": [PROMPT], "validation.seeds": [7], "validation.steps": 2}
        trained(sd15_folder, "whole", **WHOLE, **pictures)
        trained(sd15_folder, "plain", **{"training.checkpoint_every": 2})
    return place


@pytest.fixture
def pipe():
    pipe = build_pipeline("sd15-micro")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, **how) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="pt", **how).images


def test_the_adapter_says_what_it_was_made_for(runs):
    """Format 4, which older versions refuse to read: they would take it for SDXL's."""
    header = read_header(runs / "whole/adapter")
    assert (header.family, header.format_version, header.kind) == ("sd15", 4, "coeff+lora+token")
    assert load_file(runs / "whole/adapter" / EMBEDS_FILE).keys() == {"clip_l"}
    assert len(header.heads) == 12 and set(header.heads.values()) == {4}
    with pytest.raises(ValidationError, match="another family"):
        AdapterHeader.model_validate(header.model_dump() | {"format_version": 3})
    card = (runs / "whole/adapter/README.md").read_text()
    assert (
        '"stable-diffusion"' in card and 'pipe.load_textual_inversion(state["clip_l"], token="sks")' in card
    )


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(runs, sd15_folder, monkeypatch):
    monkeypatch.chdir(runs)
    trained(sd15_folder, "again", 2, **WHOLE, **{"validation.prompts": []})
    run = RunFolder(Path("again"))
    loop.train(settings_to_resume(run, None, {"training.steps": 3}, []), resume=run)
    assert_same("again", "whole")


def test_pictures_are_those_of_the_run_and_of_diffusers(runs, pipe, sd15_folder, monkeypatch):
    """sample, the run's own validation picture, and load_adapter in a plain pipeline: the same pixels."""
    monkeypatch.chdir(runs)
    drawn = draw(
        [PROMPT],
        Selection([(Path("whole/adapter"), None)]),
        Options(steps=2, width=64, height=64),
        seeds=range(7, 8),
        output=Path("drawn"),
    )
    found = np.asarray(Image.open(drawn.files[0]))
    (preview,) = sorted(Path("whole/samples/step-000003").glob("001*.png"))
    assert np.array_equal(found, np.asarray(Image.open(preview)))
    load_adapter(pipe, "whole")
    theirs = picture(pipe, width=64, height=64, guidance_scale=5.0)
    assert np.abs(np.asarray(theirs[0].permute(1, 2, 0)) - found / 255).max() < 1 / 255


def test_img2img_inpainting_and_controlnet_share_the_adapter(runs, pipe):
    """Each draws another picture with the adapter on, and at scale 0 the base model's bit for bit."""
    image, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    for weight in control.controlnet_mid_block.parameters():
        torch.nn.init.constant_(weight, 0.1)
    kinds = {
        StableDiffusionImg2ImgPipeline: {"image": image, "strength": 1.0},
        StableDiffusionInpaintPipeline: {"image": image, "mask_image": mask, "width": 64, "height": 64},
        StableDiffusionControlNetPipeline: {"image": image, "controlnet": control},
    }
    for kind, how in kinds.items():
        more = {"controlnet": how.pop("controlnet")} if "controlnet" in how else {}
        other = kind(**pipe.components, **more, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        before = picture(other, **how)
        adapter = load_adapter(pipe, runs / "whole")
        assert (picture(other, **how) - before).abs().max() > 1e-3, kind
        adapter.set_scale(0)
        assert torch.equal(picture(other, **how), before), kind
        adapter.remove()


def test_pictures_begin_from_others(runs, pipe, tmp_path):
    """generate through each pipeline that `sample` makes for an init image, a mask and a ControlNet."""
    Image.new("RGB", (64, 64), "blue").save("a.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    control.save_pretrained("control")
    assert find_controlnet("control", pipe.unet.config, half=False)
    with pytest.raises(ModelError, match=r"was made for SDXL\."):
        find_controlnet("control", build_pipeline("micro").unet.config, half=False)
    load_adapter(pipe, runs / "plain")
    given = {"init_image": Path("a.png")}, {"init_image": Path("a.png"), "mask_image": Path("mask.png")}
    steered = {"controlnet": "control", "control_image": Path("a.png")}
    names = set()
    for asked in (*given, steered, given[0] | steered, given[1] | steered):
        inputs, options = read_inputs(ImageOptions(**asked), Options(steps=2), 64, 8)
        made = pipeline_for(pipe, inputs, copy.deepcopy(control) if "controlnet" in asked else None)
        names.add(type(made).__name__)
        ((_, image),) = generate(made, [Request(PROMPT, 1)], options, images=inputs)
        assert image.size == (64, 64)
    assert names == {
        f"StableDiffusion{task}Pipeline"
        for task in ("Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
    }


def test_a_float32_vae_beside_a_half_precision_unet_encodes_in_both(pipe):
    """diffusers' pipelines for images of Stable Diffusion give pictures in the UNet's dtype, and want latents in it."""
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    exact = pipe.vae.encode(pixels).latent_dist.mean
    with kept_precision(pipe.vae):
        latents = pipe.vae.encode(pixels.bfloat16()).latent_dist.mean
        assert latents.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    torch.testing.assert_close(latents.float(), exact, rtol=0.02, atol=0.02)
    assert pipe.vae.encode(pixels).latent_dist.mean.dtype == torch.float32


def test_plain_diffusers_reads_lora_and_token(runs, pipe):
    """load_lora_weights gives the pictures of the LoRA part, load_textual_inversion its embeddings."""
    adapter = load_adapter(pipe, runs / "plain")
    with alpha_off(pipe.unet):
        ours = picture(pipe)
    adapter.remove()
    pipe.load_lora_weights(runs / "plain/adapter", weight_name=LORA_FILE)
    assert torch.equal(picture(pipe), ours)
    pipe.unload_lora_weights()

    adapter = load_adapter(pipe, runs / "whole")
    ours = encode_prompts(pipe, [PROMPT])[PROMPT].text
    adapter.remove()
    assert not torch.equal(encode_prompts(pipe, [PROMPT])[PROMPT].text, ours)
    rows = load_file(runs / "whole/adapter" / EMBEDS_FILE)["clip_l"]
    pipe.load_textual_inversion(rows, token="sks")
    assert torch.equal(encode_prompts(pipe, [PROMPT])[PROMPT].text, ours)


def test_other_tools_get_the_lora_under_kohyas_names(runs, pipe, tmp_path):
    """diffusers reads them back as the same LoRA."""
    export_kohya(runs / "plain", tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    first = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{first}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= names
    pipe.load_lora_weights(runs / "plain/adapter", weight_name=LORA_FILE)
    ours = picture(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(picture(pipe), ours, rtol=0, atol=1e-5)


def test_families_do_not_mix(runs, pipe, small_adapter, micro_pipeline, tmp_path, monkeypatch):
    """An adapter of one on a model of the other, either way, in Python, sample and merge: one sentence."""
    with pytest.raises(AdapterMismatch, match=r"for Stable Diffusion 1\.5, trained on .*this UNet is SDXL's"):
        load_adapter(micro_pipeline, runs / "whole")
    with pytest.raises(
        AdapterMismatch, match=r"adapter for SDXL, trained on me/tiny, and this UNet is Stable"
    ):
        load_adapter(pipe, small_adapter)
    with pytest.raises(AdapterMismatch, match="is an adapter for Stable Diffusion"):
        micro_pipeline.save_pretrained("sdxl")
        draw(["x"], Selection([(runs / "plain/adapter", None)]), asked=Asked(model="sdxl"))
    with pytest.raises(AdapterMismatch, match=r"a Stable Diffusion 1\.5 model and .* on an SDXL one; such"):
        merge_adapters([(runs / "plain", 1.0), (small_adapter, 1.0)], tmp_path / "merged", base_model="x")
    both = merge_adapters([(runs / "plain", 0.5), (runs / "plain/checkpoints/step-000002", 0.5)], Path("m"))
    assert (both.family, both.format_version) == ("sd15", 4)


def test_check_predicts_it(runs, sd15_folder, monkeypatch):
    """One text encoder, no pooled text: the UNet's call is counted as it is made."""
    monkeypatch.chdir(runs)
    base = find_backbone(settings_for(sd15_folder, "run").model)
    settings, chosen = resolve(
        settings_for(sd15_folder, "run", **{"subject.learn_token": True}), base, one_process()
    )
    assert chosen["training.resolution"] == 64
    photos = read_photos(Path("photos")).photos
    found = predict(settings, base, photos, torch.device("cpu"), process_bytes=0)
    assert 0 < found.peak_bytes < 2**30
    header = read_header(runs / "whole/adapter")
    trained = sum(h * h for h in header.heads.values()) + 20
    lora = sum(t.numel() for t in load_file(runs / "whole/adapter" / LORA_FILE).values())
    assert found.trained == trained + lora
    (line,) = text_findings([], [settings.subject], base, token_vectors=1)[:1]
    assert line.sentence == "sks is learned: it gets embeddings of its own, in the text encoder"


def test_a_pipeline_without_parts_is_of_its_family(sd15_folder):
    """Previews have no text encoders: make_pipeline leaves out what it is not given, safety checker included."""
    from coeffdiff.method.families import SD15, SDXL, family_of

    for family in (SD15, SDXL):
        empty = make_pipeline(family, {"scheduler": build_pipeline("sd15-micro").scheduler})
        assert family_of(empty) is family and empty.text_encoder is None
    assert json.loads((sd15_folder / "model_index.json").read_text())["requires_safety_checker"] is False


def one_process():
    from accelerate import PartialState

    return PartialState()
