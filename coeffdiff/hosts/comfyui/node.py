"""The node "Load coeffdiff adapter": its inputs and outputs. What it does is loading.py's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from comfy_api.v0_0_2 import ComfyExtension, io

import coeffdiff
from coeffdiff.errors import CoeffDiffError
from coeffdiff.hosts.comfyui.folders import chosen, fingerprint, names, register_folder
from coeffdiff.hosts.comfyui.loading import apply_adapter

_PATH = "A run or adapter folder anywhere on this machine, or a step of a run (/runs/ohwx@200). Takes the list's place."


class LoadCoeffdiffAdapter(io.ComfyNode):
    """MODEL and CLIP with an adapter: alpha, LoRA or DoRA, and the learned token."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="LoadCoeffdiffAdapter",
            display_name="Load coeffdiff adapter",
            category="loaders",
            description="Applies a Coeff-Tuning adapter to SDXL. Several nodes in a row add up.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Needed by adapters with a learned token or LoRA on the text encoders.",
                ),
                io.Combo.Input("adapter", options=names(), tooltip="Folders in models/coeffdiff."),
                _strength("strength", "Of the whole adapter; 0 leaves model and CLIP untouched."),
                _strength("strength_alpha", "Of alpha alone, times strength."),
                _strength("strength_lora", "Of the LoRA alone, times strength."),
                io.String.Input("path", default="", optional=True, tooltip=_PATH),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, adapter: str, path: str = "") -> bool | str:
        """True, or one sentence before anything runs. Inputs that other nodes give are None here."""
        if adapter is None or path is None:
            return True
        try:
            chosen(adapter, path)
        except CoeffDiffError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, adapter: str, path: str = "", **_: Any) -> str:
        """ComfyUI runs the node again when this changes, or an input that another node gives and that is None here."""
        if adapter is None or path is None:
            return ""
        return fingerprint(chosen(adapter, path))

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: str,
        strength: float,
        strength_alpha: float,
        strength_lora: float,
        clip: Any = None,
        path: str = "",
    ) -> Any:
        if strength == 0:
            return io.NodeOutput(model, clip)
        folder = chosen(adapter, path)
        return io.NodeOutput(*apply_adapter(model, clip, folder, strength, strength_alpha, strength_lora))


class CoeffdiffExtension(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        register_folder()
        logging.info(
            f"coeffdiff {coeffdiff.__version__}: the node and its package are in {Path(__file__).parents[2]}."
        )
        return [LoadCoeffdiffAdapter]


def _strength(name: str, tooltip: str) -> Any:
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=tooltip)
