"""Checks that a model is one that can be trained: of its configs, and of the header of a single file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import ModelError
from coeffdiff.method.families import NAMED, SD15, SDXL, Family
from coeffdiff.models.foreign import (
    LARGEST_HEADER,
    NEITHER,
    PICKLE,
    family_of_file,
    foreign_bytes,
    foreign_model,
    is_unet_alone,
    other_task,
)
from coeffdiff.models.scaled_fp8 import is_scaled, unreadable
from coeffdiff.models.source import (
    CONFIG_SETTING,
    INDEX,
    PICKLES,
    VAE_SETTING,
    Source,
    config_files,
    networks_of,
)

# Of Stable Diffusion 1.5's pipelines in diffusers, those whose networks are the base model's
_TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
# In a UNet's config, what it takes beside text
_CONDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


def check_configs(source: Source) -> Family:
    """The family of a pipeline's folder. Raises: ModelError unless it can be trained, naming what it is instead."""
    files = source.here()
    if INDEX not in files:
        raise ModelError(f"{source.name} {_what_else(source)}")
    index = read_json(source, INDEX)
    family = _family_named(str(index.get("_class_name")), source.name)
    for name, network in networks_of(family.name).items():
        entry = index.get(name)
        own = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if own != network.kind:
            raise ModelError(
                f"{source.name} has {'no' if own is None else f'a {own} as'} {name}, where {family.label}'s base has a "
                f"{network.kind}; it may be a refiner or another derivative, so pass --model with a base model."
            )
    for file in config_files(family.name):
        if file not in files:
            raise ModelError(f"{source.name} is incomplete: {file} is missing.")
    for tokenizer in family.tokenizers:
        if not files.intersection((f"{tokenizer}/vocab.json", f"{tokenizer}/tokenizer.json")):
            raise ModelError(f"{source.name} is incomplete: {tokenizer}/ holds no vocabulary.")

    _check_unet(source, family)
    scheduler = read_json(source, "scheduler/scheduler_config.json")
    prediction_type_in(str(scheduler.get("_class_name")), scheduler, source.name)
    return family


def _family_named(kind: str, name: str) -> Family:
    """The family whose pipelines are of this class. Raises: ModelError, naming the class."""
    if kind.startswith(SDXL.pipelines):
        return SDXL
    if kind in {f"{SD15.pipelines}{task}Pipeline" for task in _TASKS}:
        return SD15
    raise ModelError(f"{name} is a {kind}, {NEITHER}.")


def _check_unet(source: Source, family: Family) -> None:
    """Raises: ModelError for a UNet of another model, or one that does not fit the text encoders."""
    unet = read_json(source, "unet/config.json")
    pooling = unet.get("addition_embed_type") == "text_time"
    if family.pools and not pooling:
        raise ModelError(f"The UNet of {source.name} has no size and crop conditioning, so it is not SDXL's.")
    if other := next((key for key in _CONDITIONS if not family.pools and unet.get(key)), None):
        raise ModelError(
            f"The UNet of {source.name} takes more than a text ({other}: {unet[other]}), so it is not "
            f"{family.label}'s; pass --model with a base model ({NAMED})."
        )
    if not family.pools and unet.get("use_linear_projection"):
        raise ModelError(f"{source.name} is Stable Diffusion 2, {NEITHER}.")
    if unet.get("in_channels") != 4 or unet.get("out_channels") != 4:
        what = other_task(unet.get("in_channels"), unet.get("out_channels"), family)
        raise ModelError(f"{source.name} {what}.")
    widths = [read_json(source, f"{one}/config.json").get("hidden_size") for one in family.text_networks]
    if not all(isinstance(width, int) for width in widths) or sum(widths) != unet.get("cross_attention_dim"):  # type: ignore[arg-type]
        several = len(widths) > 1
        raise ModelError(
            f"The text encoder{'s' * several} of {source.name} {'are' if several else 'is'} "
            f"{' and '.join(map(str, widths))} wide, which does not {'add up to' if several else 'fit'} "
            f"the {unet.get('cross_attention_dim')} that its UNet takes."
        )


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


def check_single_file(path: Path, model: ModelSettings) -> tuple[Family, bool]:
    """The family of a file, and whether it is a UNet alone, not a whole checkpoint in the original layout.

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
    keys, family = [key for key in header if key != "__metadata__"], family_of_file(header)
    parts = networks_of(family.name).values()
    missing = [part.called for part in parts if not any(key.startswith(part.prefix) for key in keys)]
    if not missing or (missing == ["VAE"] and model.vae):
        return family, False
    if is_unet_alone(header):
        if model.config:
            return family, True
        what = (
            "is a UNet alone, without text encoders and VAE; pass "
            f"{CONFIG_SETTING} with a diffusers folder of {family.a_label} model to take it as that folder's UNet"
        )
    elif len(missing) == len(parts):
        first = min(keys, default="missing")
        what = f"is no {NAMED} checkpoint in the original layout (its first tensor is {first})"
    else:
        hint = f"; pass {VAE_SETTING} with one" if missing == ["VAE"] else "; pass --model with a whole one"
        what = f"is no complete {family.label} checkpoint: {' and '.join(missing)} missing{hint}"
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
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
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
    except (ValueError, RecursionError) as error:  # includes bytes that are no UTF-8
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
