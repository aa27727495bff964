"""SDXL from a hub id, a folder or a single file: found and checked early, loaded in one shape; its use is elsewhere."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from coeffdiff.config import SDXL_BASE, ModelSettings
from coeffdiff.console import quiet_libraries
from coeffdiff.errors import ModelError
from coeffdiff.foreign import (
    CONTROL_KEYS,
    LARGEST_HEADER,
    PICKLE,
    foreign_bytes,
    foreign_model,
    is_unet_alone,
    other_task,
)
from coeffdiff.pocket import POCKET, shipped
from coeffdiff.scaled import is_beside, is_scaled, unreadable
from coeffdiff.scaled import read as read_scaled
from coeffdiff.shortage import is_shortage

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline

Part = Literal["text", "vae", "unet"]
T = TypeVar("T")

INDEX = "model_index.json"
NETWORKS: dict[str, tuple[str, str, Part]] = {  # folder -> class, stem of the weights' file names, part
    "text_encoder": ("CLIPTextModel", "model", "text"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "model", "text"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model", "vae"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model", "unet"),
}
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_CONFIG_FILES = (*(f"{name}/config.json" for name in NETWORKS), "scheduler/scheduler_config.json")
_SMALL_FILES = [  # all that is no weights, and little more than a megabyte
    INDEX,
    *(
        f"{folder}/*.{ending}"
        for folder in (*NETWORKS, *_TOKENIZERS, "scheduler")
        for ending in ("json", "txt")
    ),
]
# The four networks in a single file, by the prefixes of their tensors' names.
_FILE_PREFIXES = {
    "UNet": "model.diffusion_model.",
    "VAE": "first_stage_model.",
    "first text encoder": "conditioner.embedders.0.transformer.",
    "second text encoder": "conditioner.embedders.1.model.",
}
_IN_FILE = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "first text encoder",
    "text_encoder_2": "second text encoder",
}
_ENCODER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers unpickles tensors alone
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The longest wait for a first answer. Looking a name up has no time limit of its own where packets are dropped.
_HUB_SECONDS = 10.0
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class Source:
    """Files of a model: a local folder or, with a repo, the place in the hub's cache where they are or will be."""

    name: str
    folder: Path
    repo: str | None = None
    remote: frozenset[str] = frozenset()  # what the hub holds, where it had to be asked

    def here(self) -> set[str]:
        """Files on this machine, as paths with / relative to the folder, two levels deep."""
        found = (*self.folder.glob("*"), *self.folder.glob("*/*"))
        return {path.relative_to(self.folder).as_posix() for path in found if path.is_file()}


@dataclass(frozen=True)
class Backbone:
    """Where a base model comes from: resolved and checked, configs at hand, no weights loaded yet.

    name: what to write down: hub id, or absolute path.
    source: the pipeline's files; for a single file, of its configs and tokenizers only.
    variant: as in the settings ("auto", a variant, or None for files without one).
    vae: another VAE's files and the folder in them ("" or "vae"), if there is one.
    unet_alone: the file holds only a UNet; the source then gives the other networks too.
    """

    name: str
    kind: Literal["hub", "folder", "file"]
    source: Source
    variant: str | None = "auto"
    file: Path | None = None
    vae: tuple[Source, str] | None = None
    unet_alone: bool = False

    def in_file(self, network: str) -> bool:
        """Whether a network's weights are read from the single file."""
        if self.file is None or (network == "vae" and self.vae is not None):
            return False
        return network == "unet" or not self.unet_alone


def find_backbone(model: ModelSettings) -> Backbone:
    """Resolve the settings' model and check what can be checked without reading weights.

    The network is asked only for a hub id that the cache cannot serve, and answers or is given up within seconds.

    Raises: ModelError, if there is no such model, it is not SDXL, it is damaged, or it cannot be had offline.
    """
    path = Path(model.name).expanduser()
    if model.name == POCKET:  # a folder of that name in the working directory is ./pocket
        backbone = Backbone(POCKET, "folder", Source(POCKET, shipped(POCKET)), None)
    elif path.is_dir():
        name = str(path.resolve())
        backbone = Backbone(name, "folder", Source(name, path.resolve()), model.variant or None)
    elif path.exists():
        alone = _check_single_file(path, model)
        name = str(path.resolve())
        backbone = Backbone(name, "file", _configs_for(path, model.config), None, path.resolve())
        if alone:
            backbone = replace(backbone, unet_alone=True, variant=model.variant or None)
    else:
        repo = _hub_id(model.name)
        variant = model.variant or None
        source = _from_hub(repo, [INDEX], _SMALL_FILES, lambda found: _is_here(found, variant, not model.vae))
        backbone = Backbone(repo, "hub", source, variant)
    _check_configs(backbone.source)
    if model.vae:
        backbone = replace(backbone, vae=_find_vae(model.vae))
    latents = _vae_config(backbone).get("latent_channels", 4)
    if latents != 4:
        raise ModelError(
            f"The VAE of {model.vae or backbone.name} has {latents} latent channels, but SDXL's UNet takes 4; "
            "pass model.vae with a VAE for SDXL."
        )
    for network in NETWORKS:
        if not backbone.in_file(network):
            _, files = _weights(backbone, network, half=True)
            source, _ = place_of(backbone, network)
            for file in sorted(source.here().intersection(files)):
                if file.endswith(".safetensors"):
                    _refuse_quantized(source.folder / file)
    return backbone


def load_pipeline(
    backbone: Backbone, *, dtype: torch.dtype, parts: Collection[Part] | None = None
) -> StableDiffusionXLPipeline:
    """The pipeline on CPU, in eval mode, frozen (requires_grad False), downloading what the cache lacks.

    Text encoders and UNet are in dtype. The VAE is in float32 if its config has force_upcast, as SDXL's has (in
    half precision it gives NaN and black pictures), else in dtype.

    Args:
        parts: only these networks are loaded and the others are None, so that training can encode first and load
            the UNet when the text encoders have left memory. Tokenizers and scheduler always come along.
    Raises: ModelError, in one sentence, for whatever is wrong with the files, the cache or the network.
    """
    wanted = set(parts) if parts is not None else {"text", "vae", "unet"}
    names = [name for name, (_, _, part) in NETWORKS.items() if part in wanted]
    from_file = [name for name in names if backbone.in_file(name)]
    from_folder = [name for name in names if name not in from_file]

    import torch

    # One variant for the whole model, the VAE included although it may be computed in float32.
    chosen = {name: _weights(backbone, name, half=dtype != torch.float32) for name in from_folder}
    needed: dict[Source, set[str]] = {}
    for name, (_, files) in chosen.items():
        needed.setdefault(place_of(backbone, name)[0], set()).update(files)
    for source, together in needed.items():
        _fetch(source, together)

    with quiet_libraries():
        import diffusers

        networks: dict[str, Any] = dict.fromkeys(NETWORKS)
        for name, (variant, files) in chosen.items():
            networks[name] = _load_network(backbone, name, variant, files, _dtype(backbone, name, dtype))
        for name in from_file:
            networks[name] = _load_from_single_file(backbone, name, _dtype(backbone, name, dtype))
        for network in networks.values():
            if network is not None:
                _own_memory(network)
                network.requires_grad_(False).eval()
        with said(f"{backbone.name}: its tokenizers or scheduler"):
            pipe = diffusers.StableDiffusionXLPipeline(
                **networks,
                **_load_tokenizers(backbone.source),
                scheduler=_load_scheduler(backbone),
                force_zeros_for_empty_prompt=_json(backbone.source, INDEX).get(
                    "force_zeros_for_empty_prompt", True
                ),
                # Otherwise diffusers changes the pictures wherever a watermarking package happens to be installed.
                add_watermarker=False,
            )
        # Where the UNet or the VAE is left out, diffusers takes SDXL's own.
        pipe.default_sample_size = native_resolution(backbone) // vae_factor(backbone)
        pipe.vae_scale_factor = vae_factor(backbone)
        return pipe


def fingerprint_of(network: Any) -> str:
    """A hash of what decides what a network computes: its weights, their dtype and, of diffusers' networks, the config
    (that of transformers' grows with its version)."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    config = network.config if isinstance(network.config, dict) else {}
    digest.update(repr(sorted((k, v) for k, v in config.items() if not k.startswith("_"))).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_files(backbone: Backbone, network: str, dtype: torch.dtype) -> list[tuple[Path, str]]:
    """The safetensors files that load_pipeline(dtype=dtype) would read for a network, each with the prefix that the
    names of its tensors have in there; nothing where some would have to be downloaded first."""
    import torch

    source, _ = place_of(backbone, network)
    if backbone.file and backbone.in_file(network):
        return [(backbone.file, prefix_in_file(backbone, network))]
    _, files = _weights(backbone, network, half=dtype != torch.float32)
    here = source.here().issuperset(files)
    return [(source.folder / file, "") for file in files if here and file.endswith(".safetensors")]


def prefix_in_file(backbone: Backbone, network: str) -> str:
    """What the names of a network's tensors begin with in the single file; of a UNet alone nothing or the usual."""
    prefix = _FILE_PREFIXES[_IN_FILE[network]]
    assert backbone.file is not None
    usual = any(name.startswith(prefix) for name in header_of(backbone.file))
    return prefix if usual or not backbone.unet_alone else ""


def config_of(backbone: Backbone, network: str) -> dict[str, Any]:
    """A network's config, as its file says it."""
    source, subfolder = place_of(backbone, network)
    return _json(source, _joined(subfolder, "config.json"))


def scheduler_config(backbone: Backbone) -> dict[str, Any]:
    """The scheduler's config, with what a single file says of itself."""
    config = _json(backbone.source, "scheduler/scheduler_config.json")
    return config | (_predicts(header_of(backbone.file)) if backbone.file is not None else {})


def prediction_type(pipe: Any) -> Literal["epsilon", "v_prediction"]:
    """What the UNet was trained to predict, from the scheduler's config. Raises: ModelError for anything else."""
    return _prediction_type(type(pipe.scheduler).__name__, pipe.scheduler.config, "This model")


def chosen_variant(backbone: Backbone, dtype: torch.dtype) -> str | None:
    """The variant that load_pipeline takes; None: files without one, or a single file; "auto": networks differ."""
    import torch

    own = [name for name in NETWORKS if not backbone.in_file(name) and not (name == "vae" and backbone.vae)]
    found = {_weights(backbone, name, half=dtype != torch.float32)[0] for name in own}
    return found.pop() if len(found) == 1 else "auto" if found else None


def unet_config(backbone: Backbone) -> dict[str, Any]:
    """The UNet's config as diffusers writes it."""
    return _json(backbone.source, "unet/config.json")


def unet_on_meta(backbone: Backbone) -> Any:
    """The UNet's shapes without its weights, from its config alone, to count and to check against."""
    with said(f"{backbone.name}: its UNet's config"):
        return _shapes(unet_config(backbone))


def _shapes(config: dict[str, Any]) -> Any:
    with quiet_libraries():
        import torch
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)


def network_on_meta(backbone: Backbone, network: str, dtype: torch.dtype) -> Any:
    """text_encoder, text_encoder_2, vae or unet as load_pipeline(dtype=dtype) would give it, without its weights."""
    with quiet_libraries(), said(f"{backbone.name}: the config of its {network}"):
        import diffusers
        import torch
        import transformers

        source, subfolder = place_of(backbone, network)
        config = _json(source, _joined(subfolder, "config.json"))
        name = NETWORKS[network][0]
        with torch.device("meta"):
            if name.startswith("CLIP"):
                built = getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(config))
            else:
                built = getattr(diffusers, name).from_config(config)
        return torch.nn.Module.to(built, _dtype(backbone, network, dtype)).eval()


def missing_networks(backbone: Backbone, dtype: torch.dtype) -> list[str]:
    """The networks whose weights load_pipeline would download first."""
    import torch

    names = [name for name in NETWORKS if not backbone.in_file(name)]
    chosen = {name: _weights(backbone, name, half=dtype != torch.float32)[1] for name in names}
    return [name for name, files in chosen.items() if not place_of(backbone, name)[0].here().issuperset(files)]


def bucket_step(backbone: Backbone, resolution: int) -> int:
    """What bucket sides are multiples of: 64 pixels, as SDXL was trained, or what the UNet's levels need if less."""
    levels = len(unet_config(backbone)["down_block_types"])
    return min(64, vae_factor(backbone) * 2 ** (levels - 1)) if resolution < 512 else 64


def unet_parameters(backbone: Backbone) -> int:
    """How many numbers the UNet holds; no weights are read. SDXL: 2,567,463,684."""
    with said(f"{backbone.name}: its UNet's config"):
        return _numbers(json.dumps(unet_config(backbone)))


@functools.cache  # a comparison asks for every cell
def _numbers(config: str) -> int:
    return sum(weight.numel() for weight in _shapes(json.loads(config)).parameters())


def vae_factor(backbone: Backbone) -> int:
    """Pixels of a picture's side for one of the latent's; 8 in SDXL."""
    return 2 ** (len(_vae_config(backbone)["block_out_channels"]) - 1)


def native_resolution(backbone: Backbone) -> int:
    """Side in pixels of the square pictures that the UNet was made for; 1024 in SDXL."""
    side = unet_config(backbone).get("sample_size") or 128
    return (max(side) if isinstance(side, list) else side) * vae_factor(backbone)


# --- finding ---------------------------------------------------------------------------------------------------


def _hub_id(name: str) -> str:
    """The name, if it can be one on the hub. Raises: ModelError, saying what the name looks like instead."""
    on_hub = re.fullmatch(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+).*", name)
    if on_hub:
        raise ModelError(f"{name} is an address; pass the hub id alone: {on_hub[1]}.")
    if name.endswith((".safetensors", *_PICKLES)) or not _HUB_ID.fullmatch(name):
        if Path(name).is_absolute() or name.startswith((".", "~")) or re.search(r"[/\\]", name):
            raise ModelError(f"There is no model folder or file {name} (looked in {Path.cwd()}).")
        raise ModelError(
            f"{name} is neither a folder or file here nor a hub id of the form owner/name; "
            f"the usual base model is {SDXL_BASE}."
        )
    return name


def _from_hub(repo: str, markers: list[str], small: list[str], is_here: Callable[[Source], bool]) -> Source:
    """A repository of the hub with its small files in the cache; asks the network only if is_here says no.

    markers: files of which the repository must have one.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    for marker in markers:
        cached = try_to_load_from_cache(repo, marker)
        if isinstance(cached, str):
            folder = Path(cached).parents[marker.count("/")]
            source = Source(repo, folder, repo)
            if is_here(source):
                return source
    with _hub_said(repo):
        info = _within(_HUB_SECONDS, lambda: HfApi().model_info(repo, timeout=_HUB_SECONDS / 2))
    remote = frozenset(file.rfilename for file in info.siblings or ())
    if not remote.intersection(markers):
        raise ModelError(
            f"{repo} on the hub has no {' or '.join(markers)}, so it is not in diffusers' layout; if it holds a "
            "single .safetensors file of an SDXL model, download that and pass its path."
        )
    with _hub_said(repo):
        # Without a revision, so that the cache also learns what "main" is, and can serve it offline.
        folder = Path(snapshot_download(repo, allow_patterns=small))
    return Source(repo, folder, repo, remote)


def encoder_folder(name: str) -> Path:
    """Where a model in transformers' layout lies: a folder, or the hub's cache, which is filled if it has to be.

    Asked for once, so that transformers itself never turns to the network, where it would try for a minute.

    Raises: ModelError, within seconds, if it cannot be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name} is neither a folder here nor a hub id of the form owner/name.")
    found = _from_hub(
        name, ["config.json"], ["*.json", "*.txt"], lambda s: not s.here().isdisjoint(_ENCODER_WEIGHTS)
    )
    if found.remote:
        weights = next((file for file in _ENCODER_WEIGHTS if file in found.remote), None)
        if weights is None:
            raise ModelError(f"{name} on the hub has no {' or '.join(_ENCODER_WEIGHTS)}.")
        from huggingface_hub import snapshot_download

        with _hub_said(name):
            snapshot_download(name, allow_patterns=["*.json", "*.txt", weights])
    return found.folder


def _is_here(source: Source, variant: str | None, with_vae: bool) -> bool:
    """Whether the cache can serve the whole pipeline in some variant that the settings allow."""
    files = source.here()
    networks = [name for name in NETWORKS if with_vae or name != "vae"]
    return files.issuperset((INDEX, *_CONFIG_FILES)) and all(
        any(_files_of(files, name, NETWORKS[name][1], choice) for choice in _choices(variant, half=True))
        for name in networks
    )


def _configs_for(file: Path, config: str | None) -> Source:
    """Local configs and tokenizers for a single file: model.config, or the cached SDXL base. Never the network."""
    from huggingface_hub import try_to_load_from_cache

    name = config or SDXL_BASE
    if config is not None and Path(config).expanduser().is_dir():
        return Source(config, Path(config).expanduser().resolve())
    cached = try_to_load_from_cache(name, INDEX) if _HUB_ID.fullmatch(name) else None
    if isinstance(cached, str):
        return Source(name, Path(cached).parent)
    how = (
        f"run `hf download {name} --include '*.json' --include '*.txt'` once (a few MB), or pass model.config "
        "with a diffusers folder of an SDXL model"
    )
    if config is None:
        raise ModelError(
            f"{file} is a single file, which holds no configs or tokenizers, and those of {name} are not in the "
            f"cache: {how}."
        )
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"model.config {config} is neither a folder nor a hub id of the form owner/name.")
    raise ModelError(f"model.config {config} is neither a folder nor in the cache: {how}.")


def _find_vae(name: str) -> tuple[Source, str]:
    """Another VAE's files and the folder in them. Raises: ModelError if it is not an AutoencoderKL."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"model.vae {name} is a file; pass a hub id or a folder with config.json and weights."
        )
    if path.is_dir():
        source = Source(name, path.resolve())
    else:
        stem = NETWORKS["vae"][1]
        source = _from_hub(
            _hub_id(name),
            ["config.json", "vae/config.json"],
            ["config.json", "vae/*.json"],
            lambda found: any(
                _files_of(found.here(), subfolder, stem, choice)
                for subfolder in ("", "vae")
                for choice in (None, "fp16")
            ),
        )
    files = source.here()
    subfolder = next((sub for sub in ("", "vae") if _joined(sub, "config.json") in files), None)
    if subfolder is None:
        raise ModelError(f"model.vae {name} holds neither config.json nor vae/config.json.")
    kind = _json(source, _joined(subfolder, "config.json")).get("_class_name")
    if kind != "AutoencoderKL":
        raise ModelError(f"model.vae {name} is a {kind}, but SDXL takes an AutoencoderKL.")
    return source, subfolder


# --- checking --------------------------------------------------------------------------------------------------


def _check_configs(source: Source) -> None:
    """That a folder is an SDXL pipeline that we can train. Raises: ModelError, naming what it is instead."""
    files = source.here()
    if INDEX not in files:
        raise ModelError(f"{source.name} {_what_else(source)}")
    index = _json(source, INDEX)
    kind = index.get("_class_name")
    if not str(kind).startswith("StableDiffusionXL"):
        raise ModelError(f"{source.name} is a {kind}, not SDXL; pass --model with an SDXL model.")
    for network, (expected, _, _) in NETWORKS.items():
        entry = index.get(network)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != expected:
            raise ModelError(
                f"{source.name} has {'no' if found is None else f'a {found} as'} {network}, where SDXL's base has a "
                f"{expected}; it may be a refiner or another derivative, so pass --model with a base model."
            )
    for file in _CONFIG_FILES:
        if file not in files:
            raise ModelError(f"{source.name} is incomplete: {file} is missing.")
    for tokenizer in _TOKENIZERS:
        if not files.intersection((f"{tokenizer}/vocab.json", f"{tokenizer}/tokenizer.json")):
            raise ModelError(f"{source.name} is incomplete: {tokenizer}/ holds no vocabulary.")

    unet = _json(source, "unet/config.json")
    if unet.get("addition_embed_type") != "text_time":
        raise ModelError(f"The UNet of {source.name} has no size and crop conditioning, so it is not SDXL's.")
    if unet.get("in_channels") != 4 or unet.get("out_channels") != 4:
        raise ModelError(f"{source.name} {other_task(unet.get('in_channels'), unet.get('out_channels'))}.")
    widths = [
        _json(source, f"{network}/config.json").get("hidden_size")
        for network in ("text_encoder", "text_encoder_2")
    ]
    if not all(isinstance(width, int) for width in widths) or sum(widths) != unet.get("cross_attention_dim"):  # type: ignore[arg-type]
        raise ModelError(
            f"The text encoders of {source.name} are {widths[0]} and {widths[1]} wide, which does not add up to "
            f"the {unet.get('cross_attention_dim')} that its UNet takes."
        )
    scheduler = _json(source, "scheduler/scheduler_config.json")
    _prediction_type(str(scheduler.get("_class_name")), scheduler, source.name)


def _what_else(source: Source) -> str:
    """What a folder without model_index.json is, and what to do."""
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


def _refuse_quantized(path: Path) -> None:
    """Of a folder's files, which the libraries read, and would drop the scales of."""
    header = header_of(path)
    found = unreadable(header)
    if not found and is_scaled(header):
        found = "is scaled fp8, which is read from single files only; pass the model in float16, bfloat16 or float32"
    if found:
        raise ModelError(f"{path} {found}.")


def _check_single_file(path: Path, model: ModelSettings) -> bool:
    """Whether it is a UNet alone, and not a whole SDXL checkpoint in the original layout, from its header alone.

    Raises: ModelError if it is neither, or a UNet alone without model.config, which has the other networks.
    """
    if path.suffix.lower() in _PICKLES:
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
        part for part, prefix in _FILE_PREFIXES.items() if not any(key.startswith(prefix) for key in keys)
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
    elif len(missing) == len(_FILE_PREFIXES):
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




def _json(source: Source, file: str) -> dict[str, Any]:
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


def _prediction_type(scheduler: str, config: Any, name: str) -> Literal["epsilon", "v_prediction"]:
    kind = config.get("prediction_type", "epsilon")
    if scheduler.startswith("EDM"):  # Playground 2.5: its UNet is preconditioned in another way
        raise ModelError(f"{name} was trained in the EDM formulation ({scheduler}), which is not supported.")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"{name} predicts {kind!r}, but only epsilon and v_prediction are supported.")
    return kind


# --- choosing files --------------------------------------------------------------------------------------------


def _joined(subfolder: str, file: str) -> str:
    return f"{subfolder}/{file}" if subfolder else file


def _choices(variant: str | None, half: bool) -> list[str | None]:
    """Variants to try, in order."""
    if variant != "auto":
        return [variant]
    return ["fp16", None] if half else [None, "fp16"]


def _files_of(files: Collection[str], subfolder: str, stem: str, variant: str | None) -> list[str]:
    """The safetensors files of one network in one variant, with the index if there are several; else nothing."""
    middle = f".{variant}" if variant else ""
    single = _joined(subfolder, f"{stem}{middle}.safetensors")
    if single in files:
        return [single]
    index = _joined(subfolder, f"{stem}.safetensors.index{middle}.json")
    shards = re.compile(re.escape(_joined(subfolder, stem + middle)) + r"-(\d{5})-of-(\d{5})\.safetensors")
    found = sorted(file for file in files if shards.fullmatch(file))
    if index not in files or not found or len(found) != int(shards.fullmatch(found[0])[2]):  # type: ignore[index]
        return []
    return [index, *found]


def place_of(backbone: Backbone, network: str) -> tuple[Source, str]:
    return backbone.vae if network == "vae" and backbone.vae else (backbone.source, network)




def _weights(backbone: Backbone, network: str, *, half: bool) -> tuple[str | None, list[str]]:
    """The variant and the files of one network. What is on this machine wins over what would be downloaded.

    Raises: ModelError, naming what is there instead.
    """
    source, subfolder = place_of(backbone, network)
    if backbone.unet_alone and source is backbone.source:
        try:
            return _weights(replace(backbone, file=None, unet_alone=False), network, half=half)
        except ModelError as error:
            raise ModelError(
                f"{backbone.file} is a UNet alone, and model.config is to have the other networks: {error}"
            ) from error
    stem = NETWORKS[network][1]
    # The settings' variant speaks of the model, not of another VAE.
    choices = _choices("auto" if source is not backbone.source else backbone.variant, half)
    everything = source.here() | source.remote
    for files in (source.here(), everything):
        for variant in choices:
            found = _files_of(files, subfolder, stem, variant)
            if found:
                return variant, found
    label = _joined(subfolder, stem)
    # Also shards of which some are missing: they are then named by the error as the variant they belong to.
    others = {
        match[1] or "none"
        for match in (
            re.fullmatch(re.escape(label) + r"(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors", f)
            for f in everything
        )
        if match
    }
    asked = {choice or "none" for choice in choices}
    if others & asked:
        raise ModelError(f"{source.name} is incomplete: of {label} some of several files are missing.")
    if others:
        raise ModelError(
            f"{source.name} has no {label} in variant {' or '.join(sorted(asked))}; it has "
            f"{', '.join(sorted(others))}: set model.variant to that (none: null)."
        )
    if any(file.startswith(label.rpartition("/")[0]) and file.endswith(".bin") for file in everything):
        raise ModelError(
            f"{source.name} has its {network} only as a pickle (.bin), which is not read; convert it to safetensors."
        )
    raise ModelError(f"{source.name} is incomplete: {label}.safetensors is missing.")


def _fetch(source: Source, files: Collection[str]) -> None:
    """Download what of these files is not in the cache, with the hub's own progress bars."""
    if source.repo is None or source.here().issuperset(files):
        return
    from huggingface_hub import snapshot_download

    with _hub_said(source.repo):
        # The commit that the configs are from.
        snapshot_download(source.repo, revision=source.folder.name, allow_patterns=sorted(files))


# --- loading ---------------------------------------------------------------------------------------------------


def _vae_config(backbone: Backbone) -> dict[str, Any]:
    source, subfolder = place_of(backbone, "vae")
    config = _json(source, _joined(subfolder, "config.json"))
    if not isinstance(config.get("block_out_channels"), list):
        raise ModelError(f"The VAE config of {source.name} names no block_out_channels, so it is damaged.")
    divisors = [config.get("scaling_factor", 1.0), *(config.get("latents_std") or ())]
    if not all(isinstance(one, int | float) and 0 < one < math.inf for one in divisors):
        raise ModelError(
            f"The VAE config of {source.name} scales latents by {divisors[0]!r}, deviations {divisors[1:]!r}, where "
            "numbers above zero are expected (SDXL's scaling_factor is 0.13025); it is damaged."
        )
    return config


def _dtype(backbone: Backbone, network: str, dtype: torch.dtype) -> torch.dtype:
    import torch

    if network == "vae" and _vae_config(backbone).get("force_upcast", True):
        return torch.float32
    return dtype


def _load_network(
    backbone: Backbone, network: str, variant: str | None, files: list[str], dtype: torch.dtype
) -> Any:
    import diffusers
    import transformers

    source, subfolder = place_of(backbone, network)
    for file in files:
        if file.endswith(".safetensors"):
            header_of(source.folder / file)
    name = NETWORKS[network][0]
    kind = getattr(transformers if name.startswith("CLIP") else diffusers, name)
    what = f"The {network} of {source.name}"
    with said(what):
        loaded, report = kind.from_pretrained(
            str(source.folder / subfolder),
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
        )
    # Of several files diffusers looks for what is missing in their index, and leaves it without memory.
    unfilled = {name for name, weight in loaded.named_parameters() if weight.is_meta}
    missing = sorted(unfilled.union(report["missing_keys"]))
    if missing:  # the library fills them with noise and goes on
        raise ModelError(f"{what} lacks {len(missing)} tensors that its config needs, such as {missing[0]}.")
    extra = sorted(report["unexpected_keys"])
    # Then the config is of a smaller model, and the rest would be dropped without a word. Text encoders and VAEs may
    # hold leftovers of older libraries.
    if extra and network == "unet":
        raise ModelError(
            f"{what} holds {len(extra)} tensors that its config has no place for, such as {extra[0]}."
        )
    return loaded


def _load_from_single_file(backbone: Backbone, network: str, dtype: torch.dtype) -> Any:
    import transformers
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    assert backbone.file is not None
    configs = str(backbone.source.folder)
    what = f"The {network} of {backbone.file} with the configs of {backbone.source.name}"
    options: dict[str, Any] = {"config": configs, "local_files_only": True}
    file = _tensors_in_file(backbone, network, dtype) or str(backbone.file)
    filled = False
    # diffusers leaves what the file did not fill without memory, and then stumbles over it.
    with said(what), contextlib.suppress(NotImplementedError):
        if network == "vae":
            loaded = AutoencoderKL.from_single_file(file, subfolder=network, dtype=dtype, **options)
        elif network == "unet":
            loaded = UNet2DConditionModel.from_single_file(file, subfolder=network, dtype=dtype, **options)
        elif isinstance(file, dict):
            kind = getattr(transformers, NETWORKS[network][0])
            loaded = create_diffusers_clip_model_from_ldm(
                kind, file, subfolder=network, torch_dtype=dtype, **options
            )
        else:  # only the pipeline knows how to convert them
            others = dict.fromkeys((*NETWORKS, *_TOKENIZERS, "scheduler"))
            del others[network]
            pipe = StableDiffusionXLPipeline.from_single_file(file, dtype=dtype, **options, **others)
            loaded = getattr(pipe, network)
        filled = not any(weight.is_meta for weight in loaded.parameters())
    if not filled:
        raise ModelError(f"{what} lacks tensors that the config needs; another model.config may fit.")
    if network == "unet":
        held_here = len(names_in_file(backbone, network))
        taken = len(loaded.state_dict())
        if held_here != taken:  # what the config has no place for would be dropped without a word
            raise ModelError(
                f"{what} holds {held_here} tensors where the config has place for {taken}; another model.config may "
                "fit."
            )
    return loaded


def names_in_file(backbone: Backbone, network: str, *, scales: bool = False) -> list[str]:
    """The tensors of a network in the single file, with their prefix; scales: also what scales them."""
    assert backbone.file is not None
    prefix = prefix_in_file(backbone, network)
    names = [name for name in header_of(backbone.file) if name.startswith(prefix)]
    own = [name for name in names if name.removeprefix(prefix) not in CONTROL_KEYS]
    return [name for name in own if scales or not is_beside(name)]


def _tensors_in_file(backbone: Backbone, network: str, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """What diffusers could not read by itself: scaled tensors, and a UNet alone, under the names of a whole checkpoint
    (or under diffusers' where it has those). None: it reads the file."""
    assert backbone.file is not None
    if not backbone.unet_alone and not is_scaled(names_in_file(backbone, network, scales=True)):
        return None
    names, prefix = names_in_file(backbone, network), prefix_in_file(backbone, network)
    added = "" if prefix or "conv_in.weight" in names else _FILE_PREFIXES["UNet"]
    return {added + name: tensor for name, tensor in read_scaled(backbone.file, names, dtype).items()}


def _own_memory(network: Any) -> None:
    """Copy, tensor by tensor, what is still mapped from a file.

    There tensors lie wherever the file put them, and CPU kernels add in another order over unaligned ones: the same
    weights out of two files would give different pictures. And a file that changes would change the model.
    """
    for weight in network.parameters():
        weight.data = weight.data.clone()


def _load_tokenizers(source: Source) -> dict[str, Any]:
    from transformers import CLIPTokenizer

    return {
        name: CLIPTokenizer.from_pretrained(str(source.folder / name), local_files_only=True)
        for name in _TOKENIZERS
    }


def _load_scheduler(backbone: Backbone) -> Any:
    import diffusers

    config = scheduler_config(backbone)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise ModelError(
            f"{backbone.source.name} names {config.get('_class_name')!r}, which is no scheduler of diffusers."
        )
    return kind.from_config(config)


def _predicts(header: dict[str, Any]) -> dict[str, Any]:
    """Scheduler settings that a single file states by itself; the configs it borrows are another model's.

    v-prediction models carry an empty tensor called v_pred, those with zero terminal SNR also one called ztsnr;
    training tools write modelspec.prediction_type.
    """
    metadata = header.get("__metadata__") or {}
    if "v_pred" not in header and metadata.get("modelspec.prediction_type") not in ("v", "v_prediction"):
        return {}
    found: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in header:
        found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return found


# --- sentences -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """One sentence for whatever a library raises over files that are not what it expected."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # there is no list of what three libraries may raise here
        if is_shortage(error):
            raise
        raise ModelError(f"{what} cannot be loaded: {_first_sentence(error)}.") from error




def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    short = re.split(r"\. |: \n|\n", text)[0].rstrip(".:")
    return short if len(short) <= 300 else short[:297] + "..."


@contextlib.contextmanager
def _hub_said(repo: str) -> Iterator[None]:
    """One sentence for whatever keeps a repository of the hub from us."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder {repo} here and no public model {repo} on the hub; check the spelling, or log in "
            "with `hf auth login` if it is private."
        ) from error
    except Exception as error:  # the HTTP library's own exceptions have changed their home more than once
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise ModelError(
                f"{repo} cannot be written to the cache {constants.HF_HUB_CACHE}: {error.strerror}; "
                "HF_HOME moves the cache to another disk."
            ) from error
        reason = (
            "HF_HUB_OFFLINE is set"
            if isinstance(error, errors.OfflineModeIsEnabled)
            else f"the hub cannot be reached ({_first_sentence(error)})"
        )
        weights = "*.fp16.safetensors" if repo == SDXL_BASE else "*.safetensors"  # else all precisions: 40 GB
        raise ModelError(
            f"{repo} is no folder here and not complete in the cache ({constants.HF_HUB_CACHE}), and {reason}. "
            f"On a machine with network run `hf download {repo} --include '*.json' --include '*.txt' "
            f"--include '{weights}'` and copy its cache, or pass a folder instead."
        ) from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """call()'s result. Raises: TimeoutError after so many seconds, and leaves the call to die with the process."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, call()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    succeeded, result = outcome
    if not succeeded:
        raise result
    return result
