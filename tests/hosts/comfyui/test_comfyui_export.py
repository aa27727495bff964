"""What `coeffdiff export` writes, through ComfyUI's own loaders of LoRA files and embeddings."""

from __future__ import annotations

import logging

import pytest
import torch
from comfyui_twins import relative

from coeffdiff.hosts.kohya import export_kohya
from comfyui_host import comfyui_folder

pytestmark = pytest.mark.skipif(comfyui_folder() is None, reason="COMFYUI names no ComfyUI")


@pytest.mark.parametrize("how", [{"rank": 5, "lora_alpha": 2.0}, {"rank": 3, "lora_alpha": 3.0}], ids=str)
def test_the_stock_lora_loader_takes_every_key(small, make, how, tmp_path, caplog):
    """As many patches as modules, no line about keys left over, and the picture of the LoRA in diffusers to 1e-5."""
    import comfy.sd
    import comfy.utils

    path = make(kind="lora", **how)
    file = export_kohya(path, tmp_path / "mine.safetensors").lora
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    with caplog.at_level(logging.WARNING):
        model, _ = comfy.sd.load_lora_for_models(small.model, None, tensors, 1.0, 0.0)
    assert "not loaded" not in caplog.text
    assert 3 * len(model.patches) == len(tensors) > 0
    wanted = small.diffusers(path)
    difference = relative(small.comfyui(model), wanted)
    print(f"kohya file through the stock loader, {how}: {difference:.1e} relative")
    assert difference < 1e-5
    assert relative(wanted, small.diffusers()) > 0.02


def test_the_embedding_file_is_the_learned_token(small, texts, make_rows, tmp_path, monkeypatch):
    """embedding:ohwx in ComfyUI reads as the learned word does in diffusers, the pooled text too."""
    from coeffdiff.hosts.diffusers import load_adapter
    from narrow_sdxl import make_adapter

    clip, pipe = texts
    path = make_adapter(tmp_path / "a", small.unet, kind="coeff+lora+token", rows=make_rows(2, seed=1))
    done = export_kohya(path, tmp_path / "mine.safetensors")
    for part in (clip.tokenizer.clip_l, clip.tokenizer.clip_g):
        monkeypatch.setattr(part, "embedding_directory", [str(done.embeddings[0].parent)])
    with torch.inference_mode():
        tokens = clip.tokenize("a photo of embedding:ohwx in the snow")
        made, made_pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    adapter = load_adapter(pipe, path)
    with torch.no_grad():
        wanted, _, pooled, _ = pipe.encode_prompt(
            "a photo of ohwx in the snow", do_classifier_free_guidance=False
        )
    adapter.remove()
    assert relative(made, wanted) < 1e-5 and relative(made_pooled, pooled) < 1e-5
