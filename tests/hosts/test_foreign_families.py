"""What hosts refuse of adapters for another family than theirs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from coeffdiff.errors import AdapterMismatch
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader


def test_comfyuis_node_refuses_an_adapter_for_stable_diffusion(monkeypatch):
    """Before it looks at the model that is connected; stand-ins for ComfyUI's modules are all that the check imports."""
    names = ("comfy", "comfy.model_base", "comfy.utils")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in names[1:]:
        monkeypatch.setattr(
            sys.modules["comfy"], name.removeprefix("comfy."), sys.modules[name], raising=False
        )
    place = "coeffdiff.hosts.comfyui.layers"
    monkeypatch.delitem(sys.modules, place, raising=False)
    from coeffdiff.hosts.comfyui.layers import Layers

    monkeypatch.delitem(sys.modules, place)  # it knows the stand-ins
    monkeypatch.delattr("coeffdiff.hosts.comfyui.layers")
    header = AdapterHeader(
        format_version=4,
        kind="lora",
        family="sd15",
        base_model="me/sd",
        token="sks",
        trained_steps=1,
        resolution=512,
        lora=LoraHeader(rank=2, alpha=2.0),
    )
    with pytest.raises(
        AdapterMismatch, match=r"is an adapter for Stable Diffusion 1\.5, and this node applies"
    ):
        Layers.check_family(object.__new__(Layers), header, Path("runs/a"))
