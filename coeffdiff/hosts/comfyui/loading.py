"""An adapter onto a MODEL and a CLIP of ComfyUI: read, checked, applied as a whole or not at all."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from coeffdiff.errors import AdapterError
from coeffdiff.hosts.comfyui.alpha import KEY, AlphaWrapper, Deviations
from coeffdiff.hosts.comfyui.encoders import Encoders
from coeffdiff.hosts.comfyui.layers import Layers, Slot
from coeffdiff.hosts.comfyui.lora import add_lora
from coeffdiff.hosts.comfyui.token import add_token
from coeffdiff.method.adapter_file import read_coefficients, read_lora, read_rows, rows_of
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import EMBEDS_FILE, LORA_FILE, find_adapter
from coeffdiff.method.coefficients import deviation_of
from coeffdiff.method.lora_layout import check_lora_shapes
from coeffdiff.method.networks import UNET, network_of


def apply_adapter(
    model: Any,
    clip: Any,
    path: str | Path,
    strength: float = 1.0,
    strength_alpha: float = 1.0,
    strength_lora: float = 1.0,
) -> tuple[Any, Any]:
    """Apply an adapter to clones of ComfyUI's MODEL (a ModelPatcher) and CLIP; what was given stays as it is.

    Args:
        clip: may be None for an adapter without a learned token and without LoRA on the text encoders.
        path: a run folder, an adapter folder, a file in one of them, or a step of a run (RUN@200).
        strength: of the whole adapter; at 0 model and clip come back untouched. A learned token has no strength.
        strength_alpha, strength_lora: of its two parts, times `strength`.
    Raises: AdapterError for files that are missing, damaged or hostile, AdapterMismatch for another base model.
    """
    if strength == 0:
        return model, clip
    folder = find_adapter(path)
    header, alphas = read_coefficients(folder)
    rows = read_rows(folder, header)
    layers = Layers(model)
    layers.check_family(header, folder)
    encoders = Encoders(clip)
    encoders.check(header, folder)
    tensors = read_lora(folder, header, partial(_check_lora, layers, encoders, header, folder))
    changed, applied = model.clone(), []
    if alphas and (scale := strength * strength_alpha):
        found = deviations(layers, header, alphas, folder, scale)
        _wrap(changed, AlphaWrapper(found))
        applied.append(f"alpha in {len(found)} of {len(header.heads)} attention layers x {scale:g}")
    if header.lora and (scale := strength * strength_lora):
        origin, of_unet = str(folder / LORA_FILE), {k: t for k, t in tensors.items() if network_of(k) == UNET}
        added = add_lora(changed, layers, of_unet, header.lora, scale, origin)
        if of_text := {key: tensor for key, tensor in tensors.items() if network_of(key) != UNET}:
            clip = clip.clone()
            added += add_lora(clip.patcher, encoders, of_text, header.lora, scale, origin)
        applied.append(f"{'DoRA' if header.lora.dora else 'LoRA'} in {added} weights x {scale:g}")
    for number, subject in enumerate(header.named if rows else ()):
        clip = add_token(clip, subject.token, rows_of(rows, number), str(folder / EMBEDS_FILE))
        applied.append(f"the learned token {subject.token!r} ({header.vectors} vectors)")
    logging.info(f"coeffdiff: {folder}: {', '.join(applied) or 'nothing, at these strengths'}.")
    _advise(header)
    return changed, clip


def deviations(
    layers: Layers, header: AdapterHeader, alphas: dict[str, Tensor], folder: Path, scale: float
) -> dict[Slot, Deviations]:
    """What an adapter adds to the identity at `scale`, by slot. Raises: AdapterError unless each layer has its own."""
    found: dict[Slot, Deviations] = {}
    for layer, heads in header.heads.items():
        deviation = scale * deviation_of(alphas[f"{layer}.alpha"], header.form)
        slot = layers.slot(layer, heads, folder)
        found[slot] = Deviations(maps=deviation) if header.mixes == "maps" else Deviations(values=deviation)
    if len(found) != len(header.heads):
        raise AdapterError(
            f"{folder}: ComfyUI has {len(found)} places for {len(header.heads)} attention layers. Nothing was "
            "applied, since half an adapter would be another one."
        )
    return found


def _check_lora(layers: Layers, encoders: Encoders, header: AdapterHeader, folder: Path, shapes: Any) -> None:
    assert header.lora is not None
    check_lora_shapes(
        lambda module: (layers if network_of(module) == UNET else encoders).linear_size(module),
        shapes,
        rank=header.lora.rank,
        dora=header.lora.dora,
        origin=str(folder / LORA_FILE),
    )


def _wrap(model: Any, wrapper: AlphaWrapper) -> None:
    """Our one wrapper on a model of ours; the alphas of adapters before it add up."""
    for other in model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY):
        wrapper = other.plus(wrapper)
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper)


def _advise(header: AdapterHeader) -> None:
    """What a graph needs beside this node to draw as coeffdiff does."""
    if header.recommended_scale != 1:
        logging.info(f"coeffdiff: this adapter recommends the strength {header.recommended_scale:g}.")
    if header.base and header.base.vae:
        logging.info(
            f"coeffdiff: this adapter was trained with {header.base.described_vae}; load it in ComfyUI too."
        )
