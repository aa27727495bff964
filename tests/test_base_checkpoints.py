"""Single files as people have them: what is no SDXL base, a UNet alone, scaled fp8, and what headers tell beforehand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coeffdiff.pocket.model import save_random
from tests.test_backbone import edit, find, original_layout, sentence

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
    "Flux": (one("double_blocks.0.img_attn.qkv.weight"), "is Flux or a model of its family, not SDXL"),
    "Flux in one file": (one(f"{UNET}double_blocks.0.img_attn.qkv.weight", "vae.decoder.x"), "is Flux"),
    "SD3": (one(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"), "is Stable Diffusion 3, not SDXL"),
    "SD 1.5": (
        one(f"{UNET}input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x"),
        "is a Stable Diffusion 1 or 2 checkpoint, not SDXL",
    ),
    "SD 2.1": (one("cond_stage_model.model.transformer.x"), "is a Stable Diffusion 1 or 2 checkpoint"),
    "the UNet of SD 1.5": (
        {"input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)},
        "holds the UNet of Stable Diffusion 1 or 2, not SDXL",
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
    assert "is no SDXL checkpoint" in sentence(find, tmp_path / "model.safetensors")


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
