"""Stable Diffusion 1.5 as people have it: a folder, a single file, a UNet alone; and what is refused beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_stand_in import Repo
from safetensors.torch import save_file
from test_base_models import edit, find, sentence, unet_name, vae_name, vae_value

from coeffdiff.method.families import SD15, SDXL
from coeffdiff.models.architecture import native_resolution, unet_parameters
from coeffdiff.models.fingerprints import changed, fingerprints
from coeffdiff.models.headers import refuse_unfit
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.source import Backbone, Source
from coeffdiff.models.subject_token import token_findings
from coeffdiff.pocket.model import build_pipeline, parameter_count, save_random
from coeffdiff.pocket.sizes import unet_config

NETWORKS = ("text_encoder", "vae", "unet")
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline("sd15-micro")


@pytest.fixture(scope="module")
def checkpoint(pipe):
    """The pipeline's weights under the names that Stable Diffusion 1.5 first came in, strays of training included."""

    def name_in_unet(key: str) -> str:
        name = unet_name(key)  # of SDXL, where attention comes before each upsampling
        return (
            name.replace("blocks.2.2.", "blocks.2.1.") if key.startswith("up_blocks.0.upsamplers") else name
        )

    text = {k.removeprefix("text_model."): w for k, w in pipe.text_encoder.state_dict().items()}
    held = {
        **{UNET + name_in_unet(k): w for k, w in pipe.unet.state_dict().items()},
        **{f"first_stage_model.{vae_name(k)}": vae_value(k, w) for k, w in pipe.vae.state_dict().items()},
        **{f"cond_stage_model.transformer.text_model.{k}": w for k, w in text.items()},
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.num_updates": torch.zeros(1),
    }
    return {name: weight.contiguous() for name, weight in held.items()}


def assert_equal(loaded, pipe):
    for network in NETWORKS:
        one, other = (getattr(p, network).state_dict() for p in (loaded, pipe))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), network


def test_a_folder_becomes_its_own_kind_of_pipeline(sd15_folder, pipe, tmp_path):
    """A safety checker and an index that asks for one are no matter: neither is loaded."""
    folder = Path(shutil.copytree(sd15_folder, tmp_path / "model"))
    (folder / "safety_checker").mkdir()
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    extractor = ["transformers", "CLIPImageProcessor"]
    edit(
        folder / "model_index.json",
        safety_checker=checker,
        feature_extractor=extractor,
        requires_safety_checker=True,
    )
    base = find(folder)
    assert base.family is SD15 and native_resolution(base) == 64
    assert list(base.networks) == list(NETWORKS)
    loaded = load_pipeline(base, dtype=torch.float32)
    assert type(loaded).__name__ == "StableDiffusionPipeline" and loaded.safety_checker is None
    assert type(loaded.scheduler).__name__ == "PNDMScheduler"
    assert_equal(loaded, pipe)


def test_a_single_file_and_a_unet_alone_take_their_configs_from_a_folder(
    checkpoint, sd15_folder, pipe, tmp_path
):
    """Bit for bit the folder's weights; fingerprints agree, so an adapter of one knows the other."""
    bare = {k.removeprefix(UNET): w for k, w in checkpoint.items() if k.startswith(UNET)}
    before = fingerprints(find(sd15_folder), torch.float32)
    for name, tensors in (("whole", checkpoint), ("unet", bare)):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        base = find(file, config=str(sd15_folder))
        assert (base.family, base.unet_alone) == (SD15, name == "unet")
        refuse_unfit(base, torch.float32)
        assert_equal(load_pipeline(base, dtype=torch.float32), pipe)
        assert changed(before, fingerprints(base, torch.float32)) == []


def test_a_file_and_configs_of_two_families_are_one_sentence(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "sd15.safetensors"
    save_file(checkpoint, file)
    sdxl = save_random("micro", tmp_path / "sdxl")
    text = sentence(find, file, config=str(sdxl))
    assert (
        f"is a Stable Diffusion 1.5 model, and {sdxl}, which is to give its configs, is an SDXL model" in text
    )
    assert "those of stable-diffusion-v1-5/stable-diffusion-v1-5 are not in the cache" in sentence(find, file)
    save_file({k: w for k, w in checkpoint.items() if k.startswith(UNET)}, file)
    assert "is a UNet alone, without text encoders and VAE; pass model.config" in sentence(find, file)


def test_from_the_hub_comes_what_is_needed(hub, sd15_folder, monkeypatch):
    """No safety checker; and the cache then serves it offline."""
    files = {
        p.relative_to(sd15_folder).as_posix(): p.read_bytes() for p in sd15_folder.rglob("*") if p.is_file()
    }
    unneeded = {f"safety_checker/{name}": b"{}" for name in ("config.json", "model.safetensors")}
    hub.repos["me/sd15"] = Repo()
    hub.repos["me/sd15"].commit(files | unneeded)
    base = find("me/sd15")
    assert base.family is SD15
    load_pipeline(base, dtype=torch.float32)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.repos.clear()
    again = find("me/sd15")
    assert again.source.remote == frozenset() and "safety_checker/config.json" not in again.source.here()


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline, neither"),
        ("model_index.json", {"_class_name": "PixArtAlphaPipeline"}, "is a PixArtAlphaPipeline, neither SDXL nor"),
        ("model_index.json", {"_class_name": "LatentConsistencyModelPipeline"}, "is a LatentConsistencyModelPip"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "has no text_encoder_2, where SDXL's"),
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model: its UNet maps 9 channels to 4, where"),
        ("unet/config.json", {"use_linear_projection": True}, "is Stable Diffusion 2, neither SDXL nor"),
        ("unet/config.json", {"class_embed_type": "projection"}, "takes more than a text (class_embed_type: proj"),
        ("unet/config.json", {"cross_attention_dim": 21}, "is 20 wide, which does not fit the 21 that its UNet"),
    ],
)  # fmt: skip
def test_models_of_other_kinds_are_named(sd15_folder, tmp_path, file, change, words):
    folder = Path(shutil.copytree(sd15_folder, tmp_path / "model"))
    edit(folder / file, **change)
    assert words in sentence(find, folder)


def test_a_vae_of_the_other_family_is_refused(sd15_folder, tmp_path):
    """Same networks, another scale of latents: its pictures would be wrong without a word."""
    vae = Path(shutil.copytree(sd15_folder / "vae", tmp_path / "vae"))
    assert find(sd15_folder, vae=str(vae)).vae
    edit(vae / "config.json", scaling_factor=0.13025)
    text = sentence(find, sd15_folder, vae=str(vae))
    assert "scales latents by 0.13025, that of" in text and "a VAE for Stable Diffusion 1.5." in text


def test_the_size_of_the_public_model(tmp_path):
    """859,520,964 numbers in the UNet and 123,060,480 in the text encoder, as published; 512 px where no size is named."""
    assert parameter_count("sd15") == 859_520_964 + 123_060_480 + 83_653_863
    config = unet_config("sd15") | {"sample_size": None}
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    (tmp_path / "vae/config.json").write_text(json.dumps({"block_out_channels": [128, 256, 512, 512]}))
    sizes = {
        family.name: native_resolution(Backbone("x", "folder", Source("x", tmp_path), family=family))
        for family in (SD15, SDXL)
    }
    assert sizes == {"sd15": 512, "sdxl": 1024}
    assert unet_parameters(Backbone("x", "folder", Source("x", tmp_path), family=SD15)) == 859_520_964


def test_a_token_is_read_by_one_tokenizer(pipe):
    """Of SDXL's, what it says of two text encoders stands for one here."""
    assert token_findings(pipe, "ohwx") == [
        "ohwx is read as 4 tokens, o + h + w + x, none of them a word that is known"
    ]
    (line,) = token_findings(pipe, "ohwx", learned=True)
    assert line == "ohwx is learned: it gets embeddings of its own, in the text encoder"
