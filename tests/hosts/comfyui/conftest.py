"""A small and a narrow SDXL in diffusers and in ComfyUI, and adapters for them.

The tests inside ComfyUI are skipped unless the environment variable COMFYUI names its folder;
scripts/test_comfyui.sh fetches one.
"""

from __future__ import annotations

import pytest
import torch

from comfyui_host import comfyui_folder, put_on_path


@pytest.fixture(scope="session")
def on_path():
    put_on_path(comfyui_folder())


@pytest.fixture(scope="session")
def small(on_path):
    from comfyui_twins import Twins

    from narrow_sdxl import SMALL

    return Twins(SMALL)


@pytest.fixture(scope="module")
def narrow(on_path):
    from comfyui_twins import Twins

    from narrow_sdxl import NARROW

    return Twins(NARROW)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def texts(small):
    """texts(): ComfyUI's CLIP and a pipeline of diffusers with the same two small text encoders, random weights."""
    from comfyui_texts import text_twins

    return text_twins(comfyui_folder(), small.unet)


@pytest.fixture(scope="session")
def make_rows(texts):
    """make_rows(vectors, seed): rows of a learned token for both encoders."""

    def rows(vectors, seed):
        draw = torch.Generator().manual_seed(seed)
        widths = {part: getattr(texts[0].cond_stage_model, part).transformer.get_input_embeddings().weight.shape[1]
                  for part in ("clip_l", "clip_g")}  # fmt: skip
        return {part: 0.02 * torch.randn(vectors, width, generator=draw) for part, width in widths.items()}

    return rows
