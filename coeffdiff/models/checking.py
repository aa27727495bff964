"""Checks that a model is SDXL: of its configs, and of the header of a single file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import ModelError
from coeffdiff.models.not_sdxl import (
    LARGEST_HEADER,
    PICKLE,
    foreign_bytes,
    foreign_model,
    is_unet_alone,
    other_task,
)
from coeffdiff.models.scaled_fp8 import is_scaled, unreadable
from coeffdiff.models.source import CONFIG_FILES, FILE_PREFIXES, INDEX, NETWORKS, PICKLES, TOKENIZERS, Source


def check_configs(source: Source) -> None:
    """Raises: ModelError unless a folder is an SDXL pipeline that can be trained, naming what it is instead."""
    files = source.here()
    if INDEX not in files:
        raise ModelError(f"{source.name} {_what_else(source)}")
    index = read_json(source, INDEX)
    kind = index.get("_class_name")
    if not str(kind).startswith("StableDiffusionXL"):
        raise ModelError(f"{source.name} is a {kind}, not SDXL; pass --model with an SDXL model.")
    for network, (expected, _, _) in NETWORKS.items():
        entry = index.get(network)
        own = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if own != expected:
            raise ModelError(
                f"{source.name} has {'no' if own is None else f'a {own} as'} {network}, where SDXL's base has a "
                f"{expected}; it may be a refiner or another derivative, so pass --model with a base model."
            )
    for file in CONFIG_FILES:
        if file not in files:
            raise ModelError(f"{source.name} is incomplete: {file} is missing.")
    for tokenizer in TOKENIZERS:
        if not files.intersection((f"{tokenizer}/vocab.json", f"{tokenizer}/tokenizer.json")):
            raise ModelError(f"{source.name} is incomplete: {tokenizer}/ holds no vocabulary.")

    unet = read_json(source, "unet/config.json")
    if unet.get("addition_embed_type") != "text_time":
        raise ModelError(f"The UNet of {source.name} has no size and crop conditioning, so it is not SDXL's.")
    if unet.get("in_channels") != 4 or unet.get("out_channels") != 4:
        raise ModelError(f"{source.name} {other_task(unet.get('in_channels'), unet.get('out_channels'))}.")
    widths = [
        read_json(source, f"{network}/config.json").get("hidden_size")
        for network in ("text_encoder", "text_encoder_2")
    ]
    if not all(isinstance(width, int) for width in widths) or sum(widths) != unet.get("cross_attention_dim"):  # type: ignore[arg-type]
        raise ModelError(
            f"The text encoders of {source.name} are {widths[0]} and {widths[1]} wide, which does not add up to "
            f"the {unet.get('cross_attention_dim')} that its UNet takes."
        )
    scheduler = read_json(source, "scheduler/scheduler_config.json")
    prediction_type_in(str(scheduler.get("_class_name")), scheduler, source.name)


def _what_else(source: Source) -> str:
    """What a folder without model_index.json is, and what to do: the end of a sentence."""
    files = source.here()
    if files.intersection(
        (
            "coeff.safetensors",
            "adapter/coeff.safetensors",
            "pytorch_lora_weights.safetensors",
            "adapter_config.json",
        )
    ):
        return "is an adapter or a run, not a base model; pass --model with the model that it was trained on."
    singles = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    hint = f"; to use its single file, pass {source.folder / singles[0]}" if singles else ""
    return f"holds no {INDEX}, so it is not a diffusers pipeline folder{hint}."


def refuse_quantized(path: Path) -> None:
    """Raises: ModelError for a quantized file of a folder: the libraries read those, and would drop their scales."""
    header = header_of(path)
    reason = unreadable(header)
    if not reason and is_scaled(header):
        reason = "is scaled fp8, which is read from single files only; pass the model in float16, bfloat16 or float32"
    if reason:
        raise ModelError(f"{path} {reason}.")


def check_single_file(path: Path, model: ModelSettings) -> bool:
    """Whether a file is a UNet alone, and not a whole SDXL checkpoint in the original layout; from its header.

    Raises: ModelError if it is neither, or a UNet alone without model.config, which has the other networks.
    """
    if path.suffix.lower() in PICKLES:
        raise ModelError(f"{path} {PICKLE}.")
    try:
        foreign = foreign_bytes(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    if foreign:
        raise ModelError(f"{path} {foreign}.")
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path} is not a model: a folder, a .safetensors file or a hub id is expected.")
    header = header_of(path)
    if foreign := foreign_model(header) or unreadable(header):
        raise ModelError(f"{path} {foreign}.")
    keys = [key for key in header if key != "__metadata__"]
    missing = [
        part for part, prefix in FILE_PREFIXES.items() if not any(key.startswith(prefix) for key in keys)
    ]
    if not missing or (missing == ["VAE"] and model.vae):
        return False
    if is_unet_alone(header):
        if model.config:
            return True
        what = (
            "is a UNet alone, without text encoders and VAE; pass model.config with a diffusers folder of an SDXL "
            "model (--set model.config=FOLDER) to take it as that folder's UNet"
        )
    elif len(missing) == len(FILE_PREFIXES):
        what = f"is no SDXL checkpoint in the original layout (its first tensor is {min(keys, default='missing')})"
    else:
        hint = "; pass model.vae with one" if missing == ["VAE"] else "; pass --model with a whole one"
        what = f"is no complete SDXL checkpoint: {' and '.join(missing)} missing{hint}"
    raise ModelError(f"{path} {what}.")


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, data_offsets; and __metadata__.

    Raises: ModelError if the file is shorter than its header says, or is something else.
    """
    try:
        with path.open("rb") as file:
            total = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(8)
            if start.startswith(b"version "):
                raise ModelError(
                    f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder."
                )
            size = int.from_bytes(start, "little")
            if not 2 <= size <= LARGEST_HEADER:
                raise ValueError("no safetensors header")
            header = json.loads(file.read(size))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        end = 8 + size + max(ends, default=0)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"{path} is damaged, or no safetensors file; download or copy it again.") from error
    if total < end:
        raise ModelError(f"{path} is cut off: {total:,} of {end:,} bytes; download or copy it again.")
    return header


def read_json(source: Source, file: str) -> dict[str, Any]:
    """A config of a model. Raises: ModelError if it is missing or damaged."""
    path = source.folder / file
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # includes bytes that are no UTF-8
        raise ModelError(f"{path} is damaged: it is not valid JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise ModelError(f"{path} is damaged: it holds a {type(tree).__name__}, not a config.")
    return tree


def prediction_type_in(scheduler: str, config: Any, name: str) -> Literal["epsilon", "v_prediction"]:
    """What a scheduler's config says that the UNet predicts. Raises: ModelError for anything else.

    scheduler: name of its class. name: of the model.
    """
    kind = config.get("prediction_type", "epsilon")
    if scheduler.startswith("EDM"):  # Playground 2.5: its UNet is preconditioned in another way
        raise ModelError(f"{name} was trained in the EDM formulation ({scheduler}), which is not supported.")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"{name} predicts {kind!r}, but only epsilon and v_prediction are supported.")
    return kind
