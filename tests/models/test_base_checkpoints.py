"""Single files as people have them: what is no SDXL base, a UNet alone, scaled fp8, and what headers tell beforehand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_base_models import edit, equal, find, original_layout, sentence, weights
from test_opening import call, preview, same_pixels, sample, train

from coeffdiff.errors import ModelError
from coeffdiff.method.adapter_file import read_header
from coeffdiff.models.fingerprints import changed, fingerprints
from coeffdiff.models.headers import refuse_unfit
from coeffdiff.models.loading import load_pipeline
from coeffdiff.pocket.model import build_pipeline, save_random
from coeffdiff.utils.png import read_recipe

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_random("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(built_pipeline):
    return original_layout(built_pipeline)


def write(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def bare(checkpoint):
    """As in ComfyUI's diffusion_models."""
    return {k.removeprefix(UNET): w for k, w in checkpoint.items() if k.startswith(UNET)}


# --- what is no SDXL base ----------------------------------------------------------------------------------------


def one(*names):
    return {name: torch.zeros(1) for name in names}


FOREIGN = {
    "kohya's LoRA": (one("lora_unet_down_blocks_1.lora_down.weight"), "is a LoRA, not a base model"),
    "diffusers' LoRA": (one("unet.down_blocks.1.attentions.0.to_q.lora_A.weight"), "is a LoRA"),
    "LyCORIS": (one("lycoris_unet_input_blocks_4.hada_w1_a"), "is a LoRA"),
    "an adapter": (one("down_blocks.1.attentions.0.transformer_blocks.0.attn1.alpha"), "is an adapter"),
    "an IP-Adapter": (one("image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"), "is an IP-Adapter"),
    "a ControlNet": (one("control_model.input_blocks.0.0.weight"), "is a ControlNet"),
    "an embedding": (one("clip_l", "clip_g"), "is a textual inversion embedding"),
    "a VAE": (
        one("encoder.conv_in.weight", "decoder.conv_in.weight"),
        "is a VAE alone; pass it as model.vae",
    ),
    "the original's VAE": (one("first_stage_model.encoder.conv_in.weight"), "is a VAE alone"),
    "a text encoder": (one("text_model.embeddings.token_embedding.weight"), "is a text encoder alone"),
    "Flux": (
        one("double_blocks.0.img_attn.qkv.weight"),
        "is Flux or a model of its family, neither SDXL nor",
    ),
    "Flux in one file": (one(f"{UNET}double_blocks.0.img_attn.qkv.weight", "vae.decoder.x"), "is Flux"),
    "SD3": (one(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"), "is Stable Diffusion 3, neither SDXL nor"),
    "PixArt": (
        one("adaln_single.linear.weight", "caption_projection.x"),
        "is PixArt or a model of its family",
    ),
    "SD 1.5 without a VAE": (
        one(f"{UNET}input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x"),
        "is no complete Stable Diffusion 1.5 checkpoint: VAE missing; pass model.vae",
    ),
    "SD 2.1": (one("cond_stage_model.model.transformer.x"), "is a Stable Diffusion 2 checkpoint, neither"),
    "the UNet of SD 2.1": (
        {
            "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
            "input_blocks.1.1.proj_in.weight": torch.zeros(320, 320),
        },
        "holds the UNet of Stable Diffusion 2, neither",
    ),
    "the refiner": (one("conditioner.embedders.0.model.transformer.x"), "is SDXL's refiner, not its base"),
    "the refiner's UNet": (
        {
            "input_blocks.0.0.weight": torch.zeros(384, 4, 3, 3),
            "label_emb.0.0.weight": torch.zeros(1536, 2560, dtype=torch.float8_e4m3fn),
        },
        "holds the UNet of SDXL's refiner",
    ),
    "CosXL": (one("edm_vpred.sigma_max", f"{UNET}input_blocks.0.0.weight"), "in the EDM formulation"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_models_are_named(kind, tmp_path):
    """Told from names in the header; each sentence says what to do."""
    tensors, words = FOREIGN[kind]
    text = sentence(find, write(tmp_path / "model.safetensors", tensors))
    assert words in text and "pass" in text


def test_strays_of_other_models_in_a_whole_checkpoint_are_no_matter(checkpoint, saved, tmp_path):
    """Merging tools leave them behind; nothing reads them."""
    strays = one("cond_stage_model.transformer.text_model.embeddings.position_ids", "control_model.x")
    file = write(tmp_path / "model.safetensors", {**checkpoint, **strays, **one("alphas_cumprod")})
    refuse_unfit(find(file, config=str(saved)), torch.float32)


def test_formats_are_told_by_their_bytes(tmp_path):
    """GGUF and pickles, also where somebody has renamed them; and no safetensors file is taken for one."""
    for name in ("model.gguf", "model.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
        assert "is a GGUF file, whose quantized weights are not read; pass" in sentence(find, tmp_path / name)
    for start in (b"PK\x03\x04\0\0\x08\x08", b"\x80\x02}q\0(X\x05"):
        (tmp_path / "model.safetensors").write_bytes(start + bytes(100))
        assert "is a pickle, which can run any code" in sentence(find, tmp_path / "model.safetensors")
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(0x280).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "is no SDXL or Stable Diffusion 1.5 checkpoint" in sentence(find, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("channels", "kind"),
    [(9, "an inpainting model"), (8, "an instruct-pix2pix model"), (5, "a model for another task")],
)
def test_models_for_another_task_are_named_from_the_header(checkpoint, saved, tmp_path, channels, kind):
    """One file, a UNet alone under either name, a folder's config."""
    words = f"is {kind}"
    first = torch.zeros(12, channels, 3, 3)
    files = (
        {**checkpoint, f"{UNET}input_blocks.0.0.weight": first},
        {**bare(checkpoint), "input_blocks.0.0.weight": first},
    )
    for tensors in files:
        text = sentence(find, write(tmp_path / "model.safetensors", tensors), config=str(saved))
        assert words in text and f"its UNet maps {channels} channels to 4, where" in text and "pass" in text
    folder = Path(shutil.copytree(saved, tmp_path / "folder"))
    edit(folder / "unet/config.json", in_channels=channels)
    assert f"{folder} {words}" in sentence(find, folder)


# --- a UNet alone ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other():
    """Another model, so that a network tells where it came from."""
    return build_pipeline("tiny", seed=7)


@pytest.fixture
def place(saved, tmp_path, monkeypatch):
    """A working directory with a model and a photo."""
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "photos").mkdir()
    Image.radial_gradient("L").resize((70, 64)).convert("RGB").save(tmp_path / "photos/0.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


LAYOUTS = {
    "as ComfyUI has it": lambda pipe: bare(original_layout(pipe)),
    "with the prefix": lambda pipe: {UNET + k: w for k, w in bare(original_layout(pipe)).items()},
    "as diffusers names it": lambda pipe: dict(pipe.unet.state_dict()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_alone_is_taken_as_that_of_the_configs_folder(
    saved, other, built_pipeline, tmp_path, layout, dtype
):
    """Its own weights, the folder's other networks, and fingerprints that say so; without model.config refused."""
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    file = write(tmp_path / "unet.safetensors", LAYOUTS[layout](other) | marks)
    assert "is a UNet alone, without text encoders and VAE; pass model.config (train: " in sentence(
        find, file
    )
    found = find(file, config=str(saved))
    pipe = load_pipeline(found, dtype=dtype)
    rest = ("text_encoder", "text_encoder_2", "vae")
    expected = weights(built_pipeline, rest) | weights(other, ("unet",))
    assert equal(weights(pipe), {k: w if k.startswith("vae") else w.to(dtype) for k, w in expected.items()})
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert changed(fingerprints(find(saved), dtype), fingerprints(found, dtype)) == ["unet", "scheduler"]
    vae = load_pipeline(find(file, config=str(saved), vae=str(saved)), dtype=dtype, parts=["vae"]).vae
    assert equal(dict(vae.state_dict()), dict(built_pipeline.vae.state_dict()))


def test_a_unet_alone_is_trained_sampled_and_evaluated(place, other, vit, clip):
    """The adapter's header remembers the folder, so that sample needs no option and draws the run's own pictures;
    another UNet in the file is told."""
    write(Path("unet.safetensors"), bare(original_layout(other)))
    train("--set", "model.config=model", model="unet.safetensors")
    header = read_header(Path("run/adapter"))
    assert header.base and header.base.config == str(Path("model").resolve())
    assert header.base_model == str(Path("unet.safetensors").resolve())
    sample()
    assert same_pixels()
    assert read_recipe(preview())["model_config"] == str(Path("model").resolve())
    judges = ("--dino", vit, "--clip", clip, "--limit", "1", "-n", "1")
    result = call("evaluate", "run", "--steps", "2", "--drift-pictures", "0", "--output", "scores", *judges)
    assert result.exit_code == 0, result.output
    write(Path("unet.safetensors"), bare(original_layout(build_pipeline("tiny", seed=8))))
    assert "the UNet of" in sample().output


def test_the_configs_folder_of_a_unet_alone_needs_the_other_networks(saved, checkpoint, tmp_path):
    file = write(tmp_path / "unet.safetensors", bare(checkpoint))
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    load_pipeline(find(file, config=str(folder)), dtype=torch.float32)
    (folder / "text_encoder/model.safetensors").unlink()
    text = sentence(find, file, config=str(folder))
    assert "is a UNet alone, and model.config is to have the other networks" in text
    assert "text_encoder/model.safetensors is missing" in text


def test_a_single_file_without_vae_takes_another(saved, checkpoint, built_pipeline, tmp_path):
    held = {k: w for k, w in checkpoint.items() if not k.startswith("first_stage_model.")}
    file = write(tmp_path / "model.safetensors", held)
    assert (
        "VAE missing; pass model.vae (train: --set model.vae=VAE; sample, evaluate: --vae VAE) with one."
        in sentence(find, file, config=str(saved))
    )
    pipe = load_pipeline(find(file, config=str(saved), vae=str(saved)), dtype=torch.float32)
    assert equal(weights(pipe), weights(built_pipeline))


# --- scaled fp8 --------------------------------------------------------------------------------------------------


def scaled(tensors, *, per_row=False, kind=torch.float8_e4m3fn):
    """Every matrix in fp8 beside its scale, as ComfyUI writes it; and what each weight now is, in float32."""
    stored, meant = dict(tensors), {}
    for name, weight in tensors.items():
        if not name.endswith(".weight") or weight.ndim != 2 or "embedding" in name:
            continue
        largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max().reshape(1)
        scale = largest.clamp_min(1e-8) / torch.finfo(kind).max
        stored[name] = (weight / scale).to(kind)
        stored[name.removesuffix("weight") + "scale_weight"] = scale
        stored[name.removesuffix("weight") + "scale_input"] = torch.ones(1)
        meant[name] = stored[name].float() * scale
    marker = f"{UNET}scaled_fp8" if any(name.startswith(UNET) for name in tensors) else "scaled_fp8"
    return stored | {marker: torch.zeros(2, dtype=kind)}, {**tensors, **meant}


@pytest.mark.parametrize(("per_row", "kind"), [(False, torch.float8_e4m3fn), (True, torch.float8_e5m2)])
def test_scaled_fp8_is_weight_times_scale(checkpoint, saved, tmp_path, capfd, per_row, kind):
    """All networks of one file: what a file of the products themselves gives, to the bit, in float32 and rounded once
    to bfloat16; and within fp8's rounding of the model that it was made from."""
    stored, meant = scaled(checkpoint, per_row=per_row, kind=kind)
    assert sum(w.dtype == kind for w in stored.values()) > 50
    assert all(
        any(k.startswith(part) and k.endswith("scale_weight") for k in stored) for part in (UNET, "cond")
    )
    file = write(tmp_path / "scaled.safetensors", stored)
    plain = write(tmp_path / "plain.safetensors", meant)
    exact = weights(load_pipeline(find(plain, config=str(saved)), dtype=torch.float32))
    for dtype in (torch.float32, torch.bfloat16):
        pipe = load_pipeline(find(file, config=str(saved)), dtype=dtype)
        expected = {k: w if k.startswith("vae") else w.to(dtype) for k, w in exact.items()}
        assert equal(weights(pipe), expected)
    original = load_pipeline(find(saved), dtype=torch.float32)
    half_step = (
        torch.finfo(kind).eps / 2
    )  # relative; a matrix's or row's largest weight is the format's largest
    for name, weight in weights(original).items():
        error = (exact[name] - weight).abs().max()
        assert error <= half_step * weight.abs().max(), name
    assert capfd.readouterr() == ("", "")


def test_scaled_fp8_of_a_unet_alone(other, saved, tmp_path):
    """ComfyUI's usual file; the fingerprint tells it from the same weights with other scales."""
    stored, meant = scaled(bare(original_layout(other)))
    file = write(tmp_path / "scaled.safetensors", stored)
    plain = write(tmp_path / "plain.safetensors", meant)
    pipes = [load_pipeline(find(f, config=str(saved)), dtype=torch.float32) for f in (file, plain)]
    assert equal(*map(weights, pipes))
    before = fingerprints(find(file, config=str(saved)), torch.float32)
    doubled = {k: w * 2 if k.endswith("scale_weight") else w for k, w in stored.items()}
    write(file, doubled)
    assert changed(before, fingerprints(find(file, config=str(saved)), torch.float32)) == ["unet"]


WEIGHT = f"{UNET}input_blocks.4.1.proj_in.weight"
OTHER_WAYS = {
    "a scale for no weight": ({f"{UNET}input_blocks.99.scale_weight": torch.ones(1)}, "belongs to no weight"),
    "a scale of a fused matrix": (
        {f"{UNET}attn.in_proj_scale_weight": torch.ones(1)},
        "belongs to no weight",
    ),
    "blocks": (
        {WEIGHT.removesuffix("weight") + "scale_weight": torch.ones(2, 2)},
        "where one number, or one for each row, is expected",
    ),
    "ComfyUI's newer way": ({f"{UNET}x.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "it holds"),
    "bitsandbytes": ({f"{WEIGHT}.absmax": torch.ones(4)}, "is quantized in a way that is not read"),
    "whole numbers": ({WEIGHT: torch.zeros(32, 32, dtype=torch.int8)}, "proj_in.weight is I8"),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_ways_of_quantizing_are_named_before_weights_are_read(checkpoint, saved, tmp_path, way):
    extra, words = OTHER_WAYS[way]
    text = sentence(find, write(tmp_path / "model.safetensors", {**checkpoint, **extra}), config=str(saved))
    assert words in text and "pass the same model in float16, bfloat16 or float32" in text


def test_scaled_fp8_in_a_folder_is_refused(saved, tmp_path):
    """The libraries would drop the scales of text encoders and VAE without a word."""
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    file = folder / "text_encoder/model.safetensors"
    write(file, scaled(load_file(file))[0])
    assert "is scaled fp8, which is read from single files only" in sentence(find, folder)


# --- what headers tell -------------------------------------------------------------------------------------------


def without(prefix):
    return lambda held: {k: w for k, w in held.items() if not k.startswith(prefix)}


def resized(name, *shape):
    return lambda held: held | {name: torch.zeros(shape)}


CLIP, OPEN_CLIP = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
FILES = {  # what is done to the single file's tensors -> words of the sentence
    "no bias": (without(f"{UNET}out.2.bias"), "lacks 1 tensor that its config needs, such as conv_out.bias"),
    "no embedding": (without(f"{UNET}label_emb.0.2."), "The unet of"),
    "a block more": (
        lambda held: held | {f"{UNET}input_blocks.8.1.extra.weight": torch.zeros(2, 2)},
        "has no place for",
    ),
    "a wider layer": (resized(f"{UNET}out.2.weight", 4, 13, 3, 3), "conv_out.weight of shape 4 x 13 x 3 x 3"),
    "no decoder": (without("first_stage_model.decoder.conv_in"), "The vae of"),
    "a wide VAE": (resized("first_stage_model.quant_conv.bias", 9), "quant_conv.bias of shape 9,"),
    "no norm": (without(f"{OPEN_CLIP}ln_final"), "The text_encoder_2 of"),
    "no projection": (without(f"{OPEN_CLIP}text_projection"), "such as text_projection.weight"),
    "no position": (without(f"{CLIP}embeddings.position"), "The text_encoder of"),
    "no first encoder": (without("conditioner.embedders.0."), "first text encoder missing; pass"),
    "no VAE": (without("first_stage_model."), "VAE missing; pass model.vae"),
}


def shards(cut):
    """The UNet in several files, of which cut(folder) takes something."""

    def damage(folder):
        unet = folder / "unet"
        (unet / "diffusion_pytorch_model.safetensors").unlink()
        build_pipeline("tiny").unet.save_pretrained(unet, max_shard_size="2MB")
        cut(unet)

    return damage


def tensors(file, change):
    return lambda folder: write(folder / file, change(load_file(folder / file)), {"format": "pt"})


def forget(unet):
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    tree = json.loads(index.read_text())
    first = min(tree["weight_map"].values())
    tree["weight_map"] = dict.fromkeys(tree["weight_map"], first)
    index.write_text(json.dumps(tree))


def lie(folder):
    """A header whose sizes do not fit its shapes."""
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["encoder.conv_in.bias"]["shape"][0] += 1
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
FOLDERS = {
    "no bias": (tensors(UNET_FILE, without("conv_out.bias")), "lacks 1 tensor"),
    "more than the config": (
        lambda folder: edit(folder / "unet/config.json", transformer_layers_per_block=[1, 1, 1]),
        "tensors that its config has no place for",
    ),
    "less than the config": (
        lambda folder: edit(folder / "unet/config.json", transformer_layers_per_block=[1, 1, 3]),
        "tensors that its config needs",
    ),
    "another width": (
        lambda folder: edit(folder / "unet/config.json", block_out_channels=[12, 32, 28]),
        "shape",
    ),
    "inpainting weights": (
        tensors(UNET_FILE, resized("conv_in.weight", 12, 9, 3, 3)),
        "is an inpainting model: its UNet maps 9 channels to 4",
    ),
    "a VAE's hole": (tensors(VAE_FILE, without("decoder.mid_block.attentions.0.to_q")), "The vae of"),
    "a text encoder's hole": (
        tensors("text_encoder_2/model.safetensors", without("text_projection")),
        "such as text_projection.weight",
    ),
    "a text encoder of other shape": (
        tensors("text_encoder/model.safetensors", resized("final_layer_norm.bias", 3)),
        "final_layer_norm.bias of shape 3,",
    ),
    "sizes that lie": (lie, "cannot be loaded"),
    "an index that names one file": (shards(forget), "tensors that its config needs"),
    "an index without names": (
        shards(lambda unet: (unet / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")),
        "index.json is damaged",
    ),
    "an index of brackets": (
        shards(
            lambda unet: (unet / "diffusion_pytorch_model.safetensors.index.json").write_text("[" * 100_000)
        ),
        "index.json is damaged",
    ),
}


def told(command, model, *more):
    """The one sentence that a command ends in."""
    subject = ["--images", "photos", "--token", "ohwx", "--class-word", "ball", "--set", "output=run"]
    result = call(command, "--model", str(model), *subject, "--set", "training.steps=1", *more)
    assert result.exit_code == 2, result.output
    assert not Path("run").exists()
    return result.output.strip().splitlines()[-1]  # after a line on reading photos


@pytest.mark.parametrize(
    "damage", [f"file: {name}" for name in FILES] + [f"folder: {name}" for name in FOLDERS]
)
def test_check_refuses_what_train_refuses_in_the_same_words(place, checkpoint, damage):
    """From headers alone, before anything is loaded or written; and it is true: loading is refused too."""
    kind, _, name = damage.partition(": ")
    more = ("--set", "model.config=model") if kind == "file" else ()
    if kind == "file":
        change, words = FILES[name]
        model = write(Path("single.safetensors"), change(checkpoint))
    else:
        change, words = FOLDERS[name]
        model = Path(shutil.copytree("model", "damaged"))
        change(model)
    texts = [told(command, model, *more) for command in ("check", "train")]
    assert words in texts[0] and texts[0] == texts[1], texts
    config = str(place / "model") if kind == "file" else None
    with pytest.raises(ModelError):
        load_pipeline(find(model, config=config), dtype=torch.float32)


def test_headers_of_good_models_pass(saved, other, checkpoint, built_pipeline, tmp_path):
    """Folders in the layouts of older libraries, several files, single files, scaled ones, a UNet alone, other VAEs:
    whatever loads is not refused."""
    older = Path(shutil.copytree(saved, tmp_path / "older"))
    for network in ("text_encoder", "text_encoder_2"):
        held = load_file(older / network / "model.safetensors")
        held = {k if k.startswith("text_") else f"text_model.{k}": w for k, w in held.items()}
        held["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        write(older / network / "model.safetensors", held, {"format": "pt"})
    held = load_file(older / VAE_FILE)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        held = {k.replace(f"attentions.0.{new}", f"attentions.0.{old}"): w for k, w in held.items()}
    write(older / VAE_FILE, held, {"format": "pt"})
    several = Path(shutil.copytree(saved, tmp_path / "several"))
    shards(lambda unet: None)(several)
    stored, _ = scaled(checkpoint)
    stored |= {"v_pred": torch.tensor([]), f"{OPEN_CLIP}logit_scale": torch.tensor(4.6)}
    config = str(saved)
    good = [
        find(saved),
        find(saved, vae=str(older / "vae")),
        find(older),
        find(several),
        find(write(tmp_path / "single.safetensors", checkpoint), config=config),
        find(write(tmp_path / "scaled.safetensors", stored), config=config),
        *(
            find(write(tmp_path / f"{i}.safetensors", layout(other)), config=config)
            for i, layout in enumerate(LAYOUTS.values())
        ),
    ]
    for base in good:
        refuse_unfit(base, torch.float32)
    for base in good[1:4]:
        assert equal(weights(load_pipeline(base, dtype=torch.float32)), weights(built_pipeline))
