"""Base models from a folder, the hub and a single file; what is refused, and in which words. Nothing leaves localhost."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_stand_in import Repo, point_at
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import ModelError
from coeffdiff.models.architecture import (
    native_resolution,
    prediction_type,
    unet_config,
    unet_parameters,
    vae_factor,
)
from coeffdiff.models.files import chosen_variant
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.loading import load_pipeline
from coeffdiff.pocket import shipped
from coeffdiff.pocket.model import build_pipeline, parameter_count, save_random, tokenizer_pair

NETWORKS = ("text_encoder", "text_encoder_2", "vae", "unet")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tiny model gains nothing from threads, and on a busy machine waiting for them takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    return build_pipeline("tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_random("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def saved_fp16(tmp_path_factory):
    return save_random(
        "tiny", tmp_path_factory.mktemp("models") / "half", dtype=torch.float16, variant="fp16"
    )


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """An empty cache, and a hub at a port where nobody listens."""
    point_at(monkeypatch, "http://127.0.0.1:9", str(tmp_path / "cache"))


def find(name, **settings):
    return find_backbone(ModelSettings(name=str(name), **settings))


def weights(pipe, networks=NETWORKS):
    return {f"{n}.{k}": w for n in networks for k, w in getattr(pipe, n).state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(w, other[k]) for k, w in one.items())


def sentence(call, *arguments, **keywords):
    """The message of the ModelError: one line, ending in a full stop, with no traceback's words in it."""
    with pytest.raises(ModelError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and "Traceback" not in text, text
    return text


def refused(name, **settings):
    return sentence(lambda: load_pipeline(find(name, **settings), dtype=torch.float32))


def edit(file, **changes):
    tree = json.loads(file.read_text())
    tree.update(changes)
    file.write_text(json.dumps(tree))


# --- a folder --------------------------------------------------------------------------------------------------


def test_a_folder_loads_whole_frozen_and_in_one_shape(saved, tiny):
    """Weights are those saved; eval mode, on CPU, nothing trainable; the name is the absolute path."""
    found = find(saved)
    assert (found.kind, found.name) == ("folder", str(saved.resolve()))
    pipe = load_pipeline(found, dtype=torch.float32)
    assert equal(weights(pipe), weights(tiny))
    for network in NETWORKS:
        module = getattr(pipe, network)
        assert not module.training
        assert not any(w.requires_grad or w.device.type != "cpu" for w in module.parameters())
    assert pipe.tokenizer("A cat 🦥").input_ids == tiny.tokenizer("A cat 🦥").input_ids
    assert pipe.tokenizer_2.pad_token == "!"
    assert pipe.watermark is None and pipe.config.force_zeros_for_empty_prompt


def test_the_same_weights_give_the_same_bits_wherever_they_come_from(saved, tiny):
    """A file maps tensors to unaligned memory, where kernels add in another order; the loaded ones are copied."""
    pipe = load_pipeline(find(saved), dtype=torch.float32)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, pooled = torch.ones(2, 77, 48), torch.ones(2, 36)
    conditions = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        one, other = (p.unet(latents, 500, text, added_cond_kwargs=conditions).sample for p in (tiny, pipe))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_vae_follows_its_own_force_upcast(folder, dtype):
    """force_upcast: float32 beside half-precision UNet and text encoders; without it, their precision."""
    pipe = load_pipeline(find(folder), dtype=dtype)
    assert (pipe.unet.dtype, pipe.text_encoder.dtype, pipe.text_encoder_2.dtype) == (dtype,) * 3
    assert pipe.vae.dtype == torch.float32
    edit(folder / "vae/config.json", force_upcast=False)
    assert load_pipeline(find(folder), dtype=dtype, parts=["vae"]).vae.dtype == dtype


def test_parts_load_alone(saved):
    """Text encoders first and the UNet later: the others are None, tokenizers and scheduler always there."""
    found = find(saved)
    for parts, names in (
        (["text"], {"text_encoder", "text_encoder_2"}),
        (["vae"], {"vae"}),
        (["unet"], {"unet"}),
        (["text", "vae"], {"text_encoder", "text_encoder_2", "vae"}),
    ):
        pipe = load_pipeline(found, dtype=torch.float32, parts=parts)
        assert {n for n in NETWORKS if getattr(pipe, n) is not None} == names
        assert pipe.tokenizer is not None and pipe.scheduler is not None
        assert (pipe.default_sample_size, pipe.vae_scale_factor) == (8, 8)


def test_configs_are_read_without_weights(saved):
    """64 px is 8 latents at a factor of 8; the UNet is counted on the meta device."""
    found = find(saved)
    assert unet_config(found)["block_out_channels"] == [12, 32, 24]
    assert (vae_factor(found), native_resolution(found)) == (8, 64)
    text_and_vae = sum(
        w.numel()
        for n in ("text_encoder", "text_encoder_2", "vae")
        for w in load_file(next((saved / n).glob("*.safetensors"))).values()
    )
    assert unet_parameters(found) + text_and_vae == parameter_count("tiny")


def test_prediction_types(folder):
    """epsilon and v_prediction; anything else, and the EDM formulation, is refused before loading."""
    assert prediction_type(load_pipeline(find(folder), dtype=torch.float32, parts=[])) == "epsilon"
    scheduler = folder / "scheduler/scheduler_config.json"
    edit(scheduler, prediction_type="v_prediction")
    assert prediction_type(load_pipeline(find(folder), dtype=torch.float32, parts=[])) == "v_prediction"
    edit(scheduler, prediction_type="sample")
    assert "predicts 'sample', but only epsilon and v_prediction are supported" in sentence(find, folder)
    edit(scheduler, prediction_type="epsilon", _class_name="EDMDPMSolverMultistepScheduler")
    assert "EDM formulation" in sentence(find, folder)


def test_the_layout_that_sdxl_was_published_in(saved, folder, tiny):
    """Older libraries wrote text_model. before every name, saved position_ids, and kept vocab.json and merges.txt."""
    for network in ("text_encoder", "text_encoder_2"):
        file = folder / network / "model.safetensors"
        held = {k if k.startswith("text_") else f"text_model.{k}": w for k, w in load_file(file).items()}
        held["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(held, file, metadata={"format": "pt"})
    vocabulary = tokenizer_pair()[0].get_vocab()
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
        tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        config = {**tokens, "pad_token": pad, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / name / "special_tokens_map.json").write_text(json.dumps({**tokens, "pad_token": pad}))
    pipe = load_pipeline(find(folder), dtype=torch.float32)
    assert equal(weights(pipe), weights(tiny))
    for name in ("tokenizer", "tokenizer_2"):
        ours, theirs = getattr(tiny, name), getattr(pipe, name)
        arguments = {"padding": "max_length", "max_length": 77, "truncation": True}
        for text in ("a Cat 🦥!", "x" * 99, ""):
            assert ours(text, **arguments).input_ids == theirs(text, **arguments).input_ids


def test_loading_says_nothing(saved, capfd):
    """No bars and no notes of the libraries between the program's own lines."""
    load_pipeline(find(saved), dtype=torch.bfloat16)
    assert capfd.readouterr() == ("", "")


# --- variants --------------------------------------------------------------------------------------------------


def marked(source, target, variant):
    """Add source's weights to target, under the variant's names and filled with its length, to tell them apart."""
    for file in source.rglob("*.safetensors"):
        name = file.name.split(".")[0] + (f".{variant}" if variant else "") + ".safetensors"
        marks = {k: torch.full_like(w, float(len(variant or ""))) for k, w in load_file(file).items()}
        save_file(marks, target / file.parent.name / name, metadata={"format": "pt"})


def mark(found, dtype, network="unet"):
    part = {"unet": "unet", "vae": "vae"}[network]
    return next(getattr(load_pipeline(found, dtype=dtype, parts=[part]), network).parameters()).mean().item()


def test_auto_takes_fp16_for_half_precision_and_plain_otherwise(saved, folder):
    """Plain files hold 0 and fp16 files 4; the VAE, computed in float32, takes the variant of the rest."""
    marked(saved, folder, None)
    marked(saved, folder, "fp16")
    found = find(folder)
    assert mark(found, torch.float32) == 0
    assert mark(found, torch.bfloat16) == mark(found, torch.float16) == 4
    assert (chosen_variant(found, torch.float32), chosen_variant(found, torch.bfloat16)) == (None, "fp16")
    assert mark(found, torch.float16, "vae") == 4


def test_auto_takes_what_is_there(saved_fp16, saved):
    """fp16 files alone also serve float32, and plain files alone half precision."""
    assert load_pipeline(find(saved_fp16), dtype=torch.float32).unet.dtype == torch.float32
    assert load_pipeline(find(saved), dtype=torch.float16).unet.dtype == torch.float16


def test_an_explicit_variant_is_taken_or_missed_in_one_sentence(saved, folder, saved_fp16):
    marked(saved, folder, "ema")
    assert mark(find(folder, variant="ema"), torch.float32) == 3
    assert "no text_encoder/model in variant bf16; it has ema, none: set model.variant" in sentence(
        find, folder, variant="bf16"
    )
    assert "in variant none; it has fp16" in sentence(find, saved_fp16, variant=None)


def test_several_files_load_and_a_missing_one_is_noticed(folder, tiny):
    """Sharded weights, in plain and fp16 names; without the second shard the model is incomplete."""
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    tiny.unet.save_pretrained(folder / "unet", max_shard_size="2MB")
    tiny.unet.save_pretrained(folder / "unet", max_shard_size="2MB", variant="fp16")
    shards = sorted(p.name for p in (folder / "unet").glob("*-of-*"))
    assert shards[0] == "diffusion_pytorch_model-00001-of-00002.safetensors" and len(shards) == 4
    for variant in (None, "fp16"):
        pipe = load_pipeline(find(folder), dtype=torch.float32)
        assert equal(weights(pipe), weights(tiny))
        (folder / "unet" / shards[2 if variant else 1]).unlink()
    assert "some of several files are missing" in sentence(find, folder)


# --- another VAE -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["vae alone", "pipeline"])
def test_another_vae_from_a_folder(saved, tmp_path, layout):
    """A VAE's own folder or a pipeline's; precision follows the new one's force_upcast."""
    other = save_random("tiny", tmp_path / "other", seed=7)
    edit(other / "vae/config.json", force_upcast=False)
    found = find(saved, vae=str(other / "vae" if layout == "vae alone" else other))
    pipe = load_pipeline(found, dtype=torch.bfloat16)
    expected = build_pipeline("tiny", seed=7, dtype=torch.bfloat16)
    assert equal(weights(pipe, ["vae"]), weights(expected, ["vae"]))
    assert equal(weights(pipe, ["unet"]), weights(build_pipeline("tiny", dtype=torch.bfloat16), ["unet"]))


def test_vaes_that_do_not_fit_are_refused(saved, folder, tmp_path):
    assert "holds neither config.json nor vae/config.json" in sentence(find, saved, vae=str(tmp_path))
    assert "is a UNet2DConditionModel, but base models take an AutoencoderKL" in sentence(
        find, saved, vae=str(saved / "unet")
    )
    edit(folder / "vae/config.json", latent_channels=16)
    assert "has 16 latent channels" in sentence(find, saved, vae=str(folder))
    (tmp_path / "vae.safetensors").write_bytes(b"")
    assert "is a file; pass a hub id or a folder" in sentence(
        find, saved, vae=str(tmp_path / "vae.safetensors")
    )
    assert "me/vae is no folder here and not complete in the cache" in sentence(find, saved, vae="me/vae")


# --- the model that ships ---------------------------------------------------------------------------------------


def test_pocket_is_in_the_package(tmp_path, monkeypatch):
    """Wherever one is, and even beside a folder of that name, which is ./pocket."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()
    backbone = find("pocket")
    assert backbone.name == "pocket" and backbone.source.folder == shipped("pocket")
    assert native_resolution(backbone) == 128 and vae_factor(backbone) == 8
    pipe = load_pipeline(backbone, dtype=torch.float32)
    assert {network.dtype for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {
        torch.float32
    }
    with pytest.raises(ModelError, match=r"model_index\.json"):
        find("./pocket")


def test_an_installation_without_the_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("coeffdiff.pocket.WEIGHTS", tmp_path)
    assert "lacks" in sentence(find, "pocket") and "install it again" in sentence(find, "pocket")


# --- names and folders that are no SDXL ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "There is no model folder or file ./nowhere"),
        ("/no/where/model.safetensors", "There is no model folder or file /no/where/model.safetensors"),
        ("a/b/c", "There is no model folder or file a/b/c"),
        ("sdxl", "neither a folder or file here nor a hub id of the form owner/name"),
        ("https://huggingface.co/me/model/tree/main", "pass the hub id alone: me/model."),
    ],
)
def test_names_that_lead_nowhere(name, words):
    assert words in sentence(find, name)


def unlink(file):
    return lambda folder: (folder / file).unlink()


def write(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def change(file, **changes):
    return lambda folder: edit(folder / file, **changes)


def cut(file, keep):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def drop_tensor(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    held = load_file(file)
    del held["conv_out.bias"]
    save_file(held, file, metadata={"format": "pt"})


def only_pickle(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")


def only_lora(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    save_file({"x": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unlink("model_index.json"), "holds no model_index.json, so it is not a diffusers pipeline folder."),
        (only_lora, "is an adapter or a run, not a base model"),
        (
            change("model_index.json", _class_name="StableDiffusionPipeline"),
            "takes more than a text (addition_embed_type: text_time), so it is not Stable Diffusion 1.5's",
        ),
        (
            change("model_index.json", _class_name="FluxPipeline"),
            "is a FluxPipeline, neither SDXL nor Stable",
        ),
        (change("model_index.json", text_encoder=[None, None]), "has no text_encoder, where SDXL's base has"),
        (
            change("model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
            "has a UNet3DConditionModel as unet",
        ),
        (change("unet/config.json", in_channels=9), "maps 9 channels to 4"),
        (change("unet/config.json", addition_embed_type=None), "no size and crop conditioning"),
        (change("unet/config.json", cross_attention_dim=1280), "which does not add up to the 1280"),
        (change("unet/config.json", block_out_channels=[12, 32, 28]), "The unet of"),
        (change("unet/config.json", layers_per_block="two"), "The unet of"),
        (
            change("unet/config.json", transformer_layers_per_block=[1, 1, 1]),
            "that its config has no place for",
        ),
        (change("unet/config.json", transformer_layers_per_block=[1, 1, 3]), "tensors that its config needs"),
        (change("vae/config.json", latent_channels=16), "has 16 latent channels"),
        (change("vae/config.json", block_out_channels=None), "names no block_out_channels"),
        (change("scheduler/scheduler_config.json", _class_name="AutoencoderKL"), "which is no scheduler"),
        (
            write("unet/config.json", b'{"in_channels": 4,'),
            "unet/config.json is damaged: it is not valid JSON",
        ),
        (write("vae/config.json", b"\xff\xfe\x00"), "vae/config.json is damaged: it is not valid JSON"),
        (write("vae/config.json", b"[" * 100_000), "vae/config.json is damaged: it is not valid JSON"),
        (write("model_index.json", b"[]"), "model_index.json is damaged: it holds a list"),
        (unlink("vae/config.json"), "is incomplete: vae/config.json is missing."),
        (unlink("tokenizer_2/tokenizer.json"), "is incomplete: tokenizer_2/ holds no vocabulary."),
        (write("tokenizer/tokenizer.json", b"{}"), "its tokenizers or scheduler cannot be loaded"),
        (unlink(UNET), "is incomplete: unet/diffusion_pytorch_model.safetensors is missing."),
        (only_pickle, "has its unet only as a pickle (.bin)"),
        (cut(UNET, 500_000), "diffusion_pytorch_model.safetensors is cut off: 500,000 of "),
        (cut(UNET, 100), "is damaged, or no safetensors file"),
        (cut(UNET, 0), "is damaged, or no safetensors file"),
        (write(UNET, b"version https://git-lfs.github.com/spec/v1\n"), "is a git-lfs pointer"),
        (write(UNET, b"\xff" * 8 + b"garbage"), "is damaged, or no safetensors file"),
        (write(UNET, b"\xa0\x86\x01" + b"\0" * 5 + b"[" * 100_000), "is damaged, or no safetensors file"),
        (write(UNET, b"\x02" + b"\0" * 7 + b"{}"), "The unet of"),
        (drop_tensor, "lacks 1 tensors that its config needs, such as conv_out.bias."),
    ],
)
def test_damaged_and_foreign_folders_are_one_sentence(folder, capfd, damage, words):
    damage(folder)
    assert words in refused(folder)
    assert capfd.readouterr() == ("", "")


def test_a_scheduler_that_needs_a_package_names_it(folder, monkeypatch):
    change("scheduler/scheduler_config.json", use_beta_sigmas=True)(folder)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scipy" else find_spec(name)
    )
    assert "needs scipy (pip install scipy)." in refused(folder)


def test_what_is_seen_in_configs_and_headers_is_said_before_loading(folder, monkeypatch):
    """A cut-off file is noticed by find_backbone, not after the photos were encoded."""
    cut("unet/diffusion_pytorch_model.safetensors", 500_000)(folder)
    assert "cut off" in sentence(find, folder)


def test_a_folder_with_a_single_file_points_at_it(tmp_path):
    (tmp_path / "sdxl.safetensors").write_bytes(b"")
    assert f"to use its single file, pass {tmp_path / 'sdxl.safetensors'}." in sentence(find, tmp_path)


# --- the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(hub, saved):
    """The hub on localhost, with me/tiny."""
    hub.repos["me/tiny"] = Repo()
    upload(hub, saved)
    return hub


def upload(hub, folder):
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    hub.repos["me/tiny"].commit(files)


def fetched(hub, ending):
    return {name for name in hub.fetched() if name.endswith(ending)}


def test_a_hub_model_is_fetched_once_and_only_what_is_needed(hub, tiny, monkeypatch):
    """Finding takes configs, loading the parts' weights; afterwards no network is needed at all."""
    found = find("me/tiny")
    assert (found.kind, found.name) == ("hub", "me/tiny")
    assert "unet/config.json" in fetched(hub, ".json") and not fetched(hub, ".safetensors")
    assert native_resolution(found) == 64
    load_pipeline(found, dtype=torch.float32, parts=["unet"])
    assert fetched(hub, ".safetensors") == {"unet/diffusion_pytorch_model.safetensors"}
    assert equal(weights(load_pipeline(found, dtype=torch.float32)), weights(tiny))

    def no_network(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    again = load_pipeline(find("me/tiny"), dtype=torch.float32)
    assert equal(weights(again), weights(tiny))


def test_half_precision_downloads_fp16_alone(hub, saved, tmp_path):
    """Both are on the hub; a half-precision UNet takes 2 bytes a number over the line, not 6."""
    both = Path(shutil.copytree(saved, tmp_path / "both"))
    marked(saved, both, "fp16")
    upload(hub, both)
    load_pipeline(find("me/tiny"), dtype=torch.float16, parts=["unet"])
    assert fetched(hub, ".safetensors") == {"unet/diffusion_pytorch_model.fp16.safetensors"}


def test_a_cache_with_configs_alone_asks_the_hub_again(hub):
    """As after an interrupted download: found online, and refused in one sentence offline."""
    find("me/tiny")
    hub.asked.clear()
    find("me/tiny")
    assert ("GET", "/api/models/me/tiny") in hub.asked
    del hub.repos["me/tiny"]
    assert "no public model me/tiny on the hub" in sentence(find, "me/tiny")


def test_another_vae_from_the_hub(hub, saved):
    pipe = load_pipeline(find(saved, vae="me/tiny"), dtype=torch.float32, parts=["vae"])
    assert equal(weights(pipe, ["vae"]), weights(build_pipeline("tiny"), ["vae"]))
    assert fetched(hub, ".safetensors") == {"vae/diffusion_pytorch_model.safetensors"}


def test_a_silent_network_is_given_up(hub, monkeypatch):
    """A server that takes the connection and never answers."""
    monkeypatch.setattr("coeffdiff.models.finding.HUB_SECONDS", 0.4)
    hub.delay = 3
    begun = time.monotonic()
    text = sentence(find, "me/tiny")
    assert time.monotonic() - begun < 2
    assert "the hub cannot be reached" in text


def test_no_network_is_one_sentence_with_what_to_do():
    """Nobody listens: said within a second, with the download command and the way out."""
    begun = time.monotonic()
    text = sentence(find, "stabilityai/stable-diffusion-xl-base-1.0")
    assert time.monotonic() - begun < 2
    assert "not complete in the cache" in text and "the hub cannot be reached (" in text
    assert "`hf download stabilityai/stable-diffusion-xl-base-1.0 --include" in text
    assert "'*.fp16.safetensors'" in text and "or pass a folder instead." in text


def test_offline_mode_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True, raising=False)
    assert "HF_HUB_OFFLINE is set" in sentence(find, "me/tiny")


def test_absent_and_gated_models_are_told_apart_from_no_network(hub):
    repo = hub.repos.pop("me/tiny")
    assert "no folder me/tiny here and no public model me/tiny on the hub" in sentence(find, "me/tiny")
    repo.gated, hub.repos["me/tiny"] = True, repo
    assert f"me/tiny is gated: accept its terms at {constants.ENDPOINT}/me/tiny and log in" in sentence(
        find, "me/tiny"
    )


def test_a_repository_in_another_layout_is_refused(hub, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "sdxl.safetensors").write_bytes(b"")
    upload(hub, tmp_path / "files")
    assert "has no model_index.json, so it is not in diffusers' layout" in sentence(find, "me/tiny")
    (tmp_path / "files" / "coeff.safetensors").write_bytes(b"")
    upload(hub, tmp_path / "files")
    assert "me/tiny on the hub is an adapter, not a base model; pass --model with" in sentence(
        find, "me/tiny"
    )


def test_a_full_disk_is_not_called_a_network_problem(hub, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "cannot be written to the cache" in sentence(find, "me/tiny")


# --- a single file ---------------------------------------------------------------------------------------------


def original_layout(pipe):
    """A pipeline's weights under the names and in the shapes of the checkpoints that SDXL first came in."""
    return {
        **{f"model.diffusion_model.{unet_name(k)}": w for k, w in pipe.unet.state_dict().items()},
        **{f"first_stage_model.{vae_name(k)}": vae_value(k, w) for k, w in pipe.vae.state_dict().items()},
        **{
            f"conditioner.embedders.0.transformer.text_model.{k}": w
            for k, w in pipe.text_encoder.state_dict().items()
        },
        **{f"conditioner.embedders.1.model.{k}": w for k, w in open_clip(pipe.text_encoder_2).items()},
    }


def renamed(name, *pairs):
    for old, new in pairs:
        name = re.sub(old, new, name)
    return name


def unet_name(name):
    """Blocks are numbered through: one for conv_in, then each resnet and each downsampler counts."""
    name = re.sub(
        r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{1 + 3 * int(m[1]) + int(m[2])}.0", name
    )
    name = re.sub(
        r"down_blocks\.(\d)\.attentions\.(\d)",
        lambda m: f"input_blocks.{1 + 3 * int(m[1]) + int(m[2])}.1",
        name,
    )
    name = re.sub(
        r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 + 3 * int(m[1])}.0.op", name
    )
    name = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0", name
    )
    name = re.sub(
        r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1", name
    )
    # Both up blocks that upsample have attention before it, so it is the third in its place.
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2", name)
    return renamed(
        name,
        (r"mid_block\.resnets\.0", "middle_block.0"),
        (r"mid_block\.attentions\.0", "middle_block.1"),
        (r"mid_block\.resnets\.1", "middle_block.2"),
        (r"(put_blocks\.\d+\.0|middle_block\.[02])\.norm1\.", r"\1.in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"(put_blocks\.\d+\.0|middle_block\.[02])\.norm2\.", r"\1.out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^add_embedding\.linear_1", "label_emb.0.0"),
        (r"^add_embedding\.linear_2", "label_emb.0.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
    )


def vae_name(name):
    """The decoder counts its levels from the picture, so from the other end."""
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}", name)
    return renamed(
        name,
        (r"encoder\.down_blocks\.(\d)", r"encoder.down.\1"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"\.resnets\.", ".block."),
        (r"samplers\.0\.", "sample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_(q|k|v)\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        (r"\.conv_norm_out\.", ".norm_out."),
    )


def vae_value(name, weight):
    """The original's attention projects with 1 x 1 convolutions."""
    return weight[:, :, None, None].clone() if ".attentions.0.to_" in name and weight.ndim == 2 else weight


def open_clip(encoder):
    """OpenCLIP keeps q, k and v in one matrix and multiplies the pooled state from the other side."""
    held = dict(encoder.state_dict())
    found = {
        "text_projection": held.pop("text_projection.weight").T.contiguous(),
        "positional_embedding": held.pop("text_model.embeddings.position_embedding.weight"),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(encoder.config.num_hidden_layers):
        attention = f"text_model.encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            rows = [held.pop(f"{attention}.{x}_proj.{kind}") for x in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(rows)
    for name, weight in held.items():
        name = renamed(
            name.removeprefix("text_model."),
            (r"^embeddings\.token_embedding", "token_embedding"),
            (r"^final_layer_norm", "ln_final"),
            (r"^encoder\.layers", "transformer.resblocks"),
            (r"self_attn\.out_proj", "attn.out_proj"),
            (r"layer_norm(\d)", r"ln_\1"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
        )
        found[name] = weight
    return found


@pytest.fixture(scope="module")
def checkpoint(tiny):
    return original_layout(tiny)


@pytest.fixture
def single(checkpoint, tmp_path):
    save_file(checkpoint, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_the_converter_leaves_no_diffusers_name(checkpoint):
    """Otherwise the loader would be tested on a renamed diffusers file. Names as in sd_xl_base_1.0.safetensors."""
    words = (
        "resnets",
        "down_blocks",
        "up_blocks",
        "mid_block",
        "embedding.linear",
        "samplers",
        "shortcut.weight_",
    )
    assert not [k for k in checkpoint if any(word in k for word in words)]
    for key in (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.7.1.transformer_blocks.1.norm2.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.bias",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.8.0.in_layers.0.weight",
        "model.diffusion_model.label_emb.0.2.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "first_stage_model.quant_conv.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight",
        "conditioner.embedders.1.model.token_embedding.weight",
        "conditioner.embedders.1.model.ln_final.weight",
        "conditioner.embedders.1.model.text_projection",
    ):
        assert key in checkpoint, key
    assert checkpoint["conditioner.embedders.1.model.text_projection"].shape == (28, 36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_file_loads_exactly(single, saved, tiny, capfd, dtype):
    """Every tensor of all four networks, in the precision asked for; the VAE in its own, and never rounded."""
    found = find(single, config=str(saved))
    assert (found.kind, found.name) == ("file", str(single.resolve()))
    pipe = load_pipeline(found, dtype=dtype)
    expected = {k: w if k.startswith("vae") else w.to(dtype) for k, w in weights(tiny).items()}
    assert equal(weights(pipe), expected)
    assert pipe.text_encoder.embeddings.position_ids.tolist() == [list(range(77))]
    ids = tiny.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    assert pipe.text_encoder_2.to(torch.float32)(ids).text_embeds.isfinite().all()
    assert not any(w.requires_grad for n in NETWORKS for w in getattr(pipe, n).parameters())
    assert capfd.readouterr() == ("", "")


def test_parts_and_another_vae_of_a_single_file(single, saved, tmp_path):
    other = save_random("tiny", tmp_path / "other", seed=7)
    found = find(single, config=str(saved), vae=str(other))
    pipe = load_pipeline(found, dtype=torch.float32, parts=["text", "vae"])
    assert pipe.unet is None and pipe.text_encoder is not None
    assert equal(weights(pipe, ["vae"]), weights(build_pipeline("tiny", seed=7), ["vae"]))
    alone = load_pipeline(found, dtype=torch.float32, parts=["unet"])
    assert alone.vae is None and alone.text_encoder_2 is None and alone.unet is not None


def test_a_single_files_configs_come_from_the_cache_or_not_at_all(single, saved, tmp_path, monkeypatch, hub):
    """The hub is up and holds them, and is not asked: no silent download. Cached ones are used."""
    assert "of stabilityai/stable-diffusion-xl-base-1.0 are not in the cache: run `hf download" in sentence(
        find, single
    )
    assert "model.config me/tiny is neither a folder nor in the cache" in sentence(
        find, single, config="me/tiny"
    )
    assert "is neither a folder nor a hub id" in sentence(find, single, config="./nowhere")
    assert hub.asked == []
    find("me/tiny")
    hub.asked.clear()
    assert unet_parameters(find(single, config="me/tiny")) > 0
    load_pipeline(find(single, config="me/tiny"), dtype=torch.float32)
    assert hub.asked == []
    cached = Path(constants.HF_HUB_CACHE)
    shutil.copytree(
        cached / "models--me--tiny",
        cached / "models--stabilityai--stable-diffusion-xl-base-1.0",
        symlinks=True,
    )
    load_pipeline(find(single), dtype=torch.float32, parts=["unet"])
    assert hub.asked == []


@pytest.mark.parametrize(
    ("extra", "metadata", "expected"),
    [
        ({}, {}, ("epsilon", False)),
        ({"v_pred": torch.tensor([])}, {}, ("v_prediction", False)),
        ({"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, {}, ("v_prediction", True)),
        ({}, {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
    ],
)
def test_a_single_file_says_itself_that_it_predicts_v(checkpoint, saved, tmp_path, extra, metadata, expected):
    """Its configs are borrowed from an epsilon model and would silently be wrong."""
    save_file({**checkpoint, **extra}, tmp_path / "v.safetensors", metadata=metadata)
    pipe = load_pipeline(
        find(tmp_path / "v.safetensors", config=str(saved)), dtype=torch.float32, parts=["unet"]
    )
    assert (prediction_type(pipe), pipe.scheduler.config.rescale_betas_zero_snr) == expected


def without(prefix):
    return lambda held: {k: w for k, w in held.items() if not k.startswith(prefix)}


def moved(old, new):
    return lambda held: {k.replace(old, new): w for k, w in held.items()}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: {"lora_unet_down.lora_down.weight": torch.zeros(1)}, "is a LoRA, not a base model"),
        (
            lambda _: {"double_blocks.0.x": torch.zeros(1)},
            "no SDXL or Stable Diffusion 1.5 checkpoint in the original layout (its first tensor is double",
        ),
        (lambda _: {}, "its first tensor is missing"),
        (
            moved("conditioner.embedders.0.transformer", "cond_stage_model"),
            "is no complete SDXL checkpoint: first text encoder missing",
        ),
        (moved("conditioner.embedders.0.transformer", "conditioner.embedders.0.model"), "is SDXL's refiner"),
        (without("first_stage_model."), "is no complete SDXL checkpoint: VAE missing"),
        (without("conditioner."), "first text encoder and second text encoder missing"),
        (without("model.diffusion_model.out.2.bias"), "lacks tensors that the config needs"),
        (without("first_stage_model.decoder.conv_in"), "The vae of"),
        (without("conditioner.embedders.1.model.ln_final"), "The text_encoder_2 of"),
        (moved("output_blocks.8.0.in_layers.0.", "output_blocks.9.0.in_layers.0."), "The unet of"),
    ],
)
def test_damaged_and_foreign_single_files_are_one_sentence(checkpoint, saved, tmp_path, capfd, damage, words):
    save_file({k: w.contiguous() for k, w in damage(checkpoint).items()}, tmp_path / "bad.safetensors")
    assert words in refused(tmp_path / "bad.safetensors", config=str(saved))
    assert capfd.readouterr() == ("", "")


def test_configs_of_another_model_are_noticed(single, folder):
    """Too large, too small, of other widths: never a model with noise or holes in it."""
    edit(folder / "unet/config.json", transformer_layers_per_block=[1, 1, 1])
    assert "tensors where the config has place for" in refused(single, config=str(folder))
    edit(folder / "unet/config.json", transformer_layers_per_block=[1, 1, 3])
    assert "lacks" in refused(single, config=str(folder))
    edit(folder / "unet/config.json", transformer_layers_per_block=[1, 1, 2], block_out_channels=[12, 32, 28])
    assert "cannot be loaded" in refused(single, config=str(folder))


def test_files_that_are_not_read(tmp_path, single, saved):
    for name in ("model.ckpt", "model.pt", "model.BIN"):
        (tmp_path / name).write_bytes(b"\x80\x04")
        assert "is a pickle, which can run any code when it is opened" in sentence(find, tmp_path / name)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    assert "is not a model: a folder, a .safetensors file or a hub id" in sentence(
        find, tmp_path / "photo.png"
    )
    single.write_bytes(single.read_bytes()[:-1000])
    assert "is cut off" in sentence(find, single, config=str(saved))
