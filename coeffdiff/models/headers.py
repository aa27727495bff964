"""Whether a base model's files hold what its configs need, from their headers alone: nothing is downloaded or read.

The networks are built without memory from their configs; names and shapes in the headers go through the same
conversions as the tensors will when they are loaded. What this refuses, loading would refuse later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coeffdiff.errors import ModelError
from coeffdiff.method.families import Family
from coeffdiff.models.architecture import config_of, layout_on_meta, vae_config_of
from coeffdiff.models.checking import header_of
from coeffdiff.models.files import prefix_in_file, source_of, weight_files
from coeffdiff.models.foreign import other_task
from coeffdiff.models.hub_errors import loading_errors
from coeffdiff.models.loading import names_in_file
from coeffdiff.models.source import UNET, Backbone
from coeffdiff.utils.console import quiet_libraries

Shapes = dict[str, tuple[int, ...]]


def refuse_unfit(base: Backbone, dtype: torch.dtype) -> None:
    """Check the files that load_pipeline(dtype=dtype) would take, as far as they are on this machine.

    Raises: ModelError, naming a tensor that is missing, of another shape, or without a place.
    """
    for network in base.networks:
        source, _ = source_of(base, network)
        in_file = base.in_file(network)
        whose = f"{base.file} with the configs of {base.source.name}" if in_file else source.name
        what = f"The {network} of {whose}"
        files = [path for path, _ in weight_files(base, network, dtype)]
        if not files:
            continue
        if network == "vae":
            vae_config_of(base)  # says what is damaged in it
        needed = layout_on_meta(base, network)
        with loading_errors(what):
            held = _in_single_file(base, network, needed) if in_file else _in_folder(files, needed)
        _compare(
            what,
            network,
            held,
            _shapes(needed),
            "; another model.config may fit" if in_file else "",
            base.family,
        )
        if in_file and network == "unet" and len(names := names_in_file(base, network)) != len(held):
            raise ModelError(
                f"{what} holds {len(names)} tensors where the config has place for {len(held)}; another model.config "
                "may fit."
            )


def _compare(what: str, network: str, held: Shapes, needed: Shapes, hint: str, family: Family) -> None:
    if missing := sorted(needed.keys() - held.keys()):
        raise ModelError(f"{what} lacks {_count(missing)} that its config needs, such as {missing[0]}{hint}.")
    if network == "unet" and (extra := sorted(held.keys() - needed.keys())):
        raise ModelError(
            f"{what} holds {_count(extra)} that its config has no place for, such as {extra[0]}{hint}."
        )
    for name, shape in needed.items():
        if held[name] == shape:
            continue
        if (
            network == "unet"
            and name == "conv_in.weight"
            and held[name][:1] == shape[:1]
            and len(held[name]) == 4
        ):
            raise ModelError(f"{what} {other_task(held[name][1], needed['conv_out.weight'][0], family)}.")
        raise ModelError(
            f"{what} has {name} of shape {_by(held[name])}, where its config makes {_by(shape)}{hint}."
        )


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _shapes(network: torch.nn.Module) -> Shapes:
    return _without_wrapper({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})


def _without_wrapper(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' versions differ in whether text_model. comes before every name, and read both."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def _in_folder(files: list[Path], needed: Any) -> Shapes:
    held: dict[str, Any] = {}
    for path in _listed(files):
        _open(path)
        held |= {k: tuple(v["shape"]) for k, v in header_of(path).items() if k != "__metadata__"}
    if len(files) == 1 and hasattr(
        needed, "_fix_state_dict_keys_on_load"
    ):  # diffusers' older names of attention
        needed._fix_state_dict_keys_on_load(held)
    return _without_wrapper(held)


def _listed(files: list[Path]) -> list[Path]:
    """Of several files those that their index names, which the libraries read."""
    if len(files) == 1:
        return files
    stem, _, variant = files[0].name.partition("-0")[0].partition(".")
    index = files[0].with_name(f"{stem}.safetensors.index{'.' if variant else ''}{variant}.json")
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged; download or copy it again.") from error
    if absent := sorted(listed - {path.name for path in files}):
        raise ModelError(f"{index} names {absent[0]}, which is not there; download or copy it again.")
    return [path for path in files if path.name in listed]


def _open(path: Path) -> None:
    """The library's own look at the header, which knows more than ours: sizes against shapes, and data types."""
    from safetensors import safe_open

    with safe_open(path, framework="pt"):
        pass


def _in_single_file(base: Backbone, network: str, needed: Any) -> Shapes:
    """The shapes in the single file, under the names that diffusers converts them to."""
    with quiet_libraries():
        from diffusers.loaders import single_file_utils as convert

    assert base.file is not None
    _open(base.file)
    header, prefix = header_of(base.file), prefix_in_file(base, network)
    names = names_in_file(base, network)
    added = "" if prefix or network != "unet" or "conv_in.weight" in names else UNET.prefix
    tensors = {added + name: torch.empty(header[name]["shape"], device="meta") for name in names}
    config = config_of(base, network)
    try:
        if network == "vae":
            converted = convert.convert_ldm_vae_checkpoint(tensors, config)
        elif network == "text_encoder":
            converted = convert.convert_ldm_clip_checkpoint(tensors)
        elif network == "text_encoder_2":
            converted = convert.convert_open_clip_checkpoint(needed, tensors, prefix=prefix)
        elif "conv_in.weight" in tensors:  # a UNet alone as diffusers names it
            converted = tensors
        else:
            converted = convert.convert_ldm_unet_checkpoint(tensors, config)
    except KeyError as error:
        raise ModelError(
            f"The {network} of {base.file} lacks tensors that its config needs, such as {error.args[0]}; another "
            "model.config may fit."
        ) from error
    return _without_wrapper({name: tuple(tensor.shape) for name, tensor in converted.items()})
