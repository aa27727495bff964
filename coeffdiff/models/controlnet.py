"""A ControlNet beside the base model: found on this machine or the hub, checked against the UNet, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coeffdiff.errors import ModelError
from coeffdiff.method.families import family_of_unet
from coeffdiff.models.checking import header_of, read_json
from coeffdiff.models.files import fetch_file, files_of, variant_choices
from coeffdiff.models.finding import from_hub, hub_id
from coeffdiff.models.hub_errors import loading_errors
from coeffdiff.models.source import Source
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.own_memory import own_memory

if TYPE_CHECKING:
    import torch

_CONFIG, _STEM = "config.json", "diffusion_pytorch_model"
# What must be equal for its residuals to fit into the UNet
_SHAPE = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "cross_attention_dim",
    "addition_embed_type",
)


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet that was found and fits, not loaded yet. name: hub id or absolute path."""

    name: str
    source: Source
    variant: str | None
    files: tuple[str, ...]


def find_controlnet(name: str, unet: Mapping[str, Any], *, half: bool) -> ControlNet:
    """A folder in diffusers' layout, or a hub id, of which at most the config is downloaded.

    Args:
        unet: the config of the UNet that it is to steer.
        half: prefer the fp16 variant.
    Raises: ModelError, if there is none, it is none, or it belongs to another model.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"--controlnet {name} is a file; pass a hub id or a folder with {_CONFIG} and weights."
        )
    if path.is_dir():
        source = Source(str(path.resolve()), path.resolve())
    else:
        source = from_hub(
            hub_id(name), [_CONFIG], [_CONFIG], lambda cached: bool(_chosen(cached.here(), half))
        )
    if _CONFIG not in source.here():
        raise ModelError(
            f"--controlnet {name} holds no {_CONFIG}, so it is no ControlNet in diffusers' layout."
        )
    _check_config(name, read_json(source, _CONFIG), unet)
    chosen = _chosen(source.here(), half) or _chosen(source.here() | source.remote, half)
    if not chosen:
        raise ModelError(f"--controlnet {name} is incomplete: {_STEM}.safetensors is missing.")
    return ControlNet(source.name, source, *chosen)


def load_controlnet(found: ControlNet, dtype: torch.dtype) -> Any:
    """The network on the CPU, in eval mode, frozen. Raises: ModelError for damaged files, the cache or the network."""
    fetch_file(found.source, found.files)
    for file in found.files:
        if file.endswith(".safetensors"):
            header_of(found.source.folder / file)
    with quiet_libraries(), loading_errors(f"The ControlNet {found.name}"):
        from diffusers import ControlNetModel

        network, report = ControlNetModel.from_pretrained(
            str(found.source.folder),
            variant=found.variant,
            use_safetensors=True,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
        )
    if odd := sorted([*report["missing_keys"], *report["unexpected_keys"]]):
        raise ModelError(
            f"The ControlNet {found.name} does not fit its config: {len(odd)} tensors, such as {odd[0]}."
        )
    return own_memory(network).requires_grad_(False).eval()


def _chosen(files: set[str], half: bool) -> tuple[str | None, tuple[str, ...]] | None:
    """Variant and files of its weights, or None."""
    found = ((variant, files_of(files, "", _STEM, variant)) for variant in variant_choices("auto", half))
    return next(((variant, tuple(chosen)) for variant, chosen in found if chosen), None)


def _check_config(name: str, config: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Raises: ModelError unless it is a ControlNet for a UNet of this shape."""
    kind = config.get("_class_name")
    if kind != "ControlNetModel":
        raise ModelError(f"--controlnet {name} is a {kind}, and a ControlNetModel is wanted.")
    for key in _SHAPE:
        own, wanted = config.get(key), unet.get(key)
        if (list(own) if isinstance(own, list | tuple) else own) != (
            list(wanted) if isinstance(wanted, list | tuple) else wanted
        ):
            raise ModelError(
                f"--controlnet {name} belongs to another model: its {key} is {own}, and the base model's is {wanted}. "
                f"Take one that was made for {family_of_unet(unet).label}."
            )
