"""What the node refuses inside a real ComfyUI, in one sentence."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE
from comfyui_host import comfyui_folder

pytestmark = pytest.mark.skipif(comfyui_folder() is None, reason="COMFYUI names no ComfyUI")


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
    path = shutil.copytree(make(), tmp_path / "adapter")
    (path / file).write_bytes(b"damaged")
    with pytest.raises(AdapterError, match=f"{file} cannot be read; it is damaged or not a safetensors file"):
        small.with_adapters(path)
