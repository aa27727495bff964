"""Find an SDXL model from a hub id, a folder or a single file, and check it before weights are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from coeffdiff.config.fields import SDXL_BASE
from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import ModelError
from coeffdiff.method.adapter_paths import COEFF_FILE
from coeffdiff.models.architecture import vae_config_of
from coeffdiff.models.checking import check_configs, check_single_file, read_json, refuse_quantized
from coeffdiff.models.files import files_of, joined_path, source_of, variant_choices, weights_of
from coeffdiff.models.hub_errors import hub_access_errors
from coeffdiff.models.source import (
    CONFIG_FILES,
    ENCODER_WEIGHTS,
    INDEX,
    NETWORKS,
    PICKLES,
    SMALL_FILES,
    Backbone,
    Source,
)
from coeffdiff.pocket import POCKET, shipped
from coeffdiff.utils.hub import HUB_ID, HUB_SECONDS, within_seconds


def find_backbone(model: ModelSettings) -> Backbone:
    """Resolve the settings' model and check what can be checked without reading weights.

    The hub is asked only for an id that the cache cannot serve, and given up after some seconds.

    Raises: ModelError, if there is no such model, it is not SDXL, it is damaged, or it is not available offline.
    """
    path = Path(model.name).expanduser()
    if model.name == POCKET:  # a folder of that name in the working directory is ./pocket
        backbone = Backbone(POCKET, "folder", Source(POCKET, shipped(POCKET)), None)
    elif path.is_dir():
        name = str(path.resolve())
        backbone = Backbone(name, "folder", Source(name, path.resolve()), model.variant or None)
    elif path.exists():
        alone = check_single_file(path, model)
        name = str(path.resolve())
        backbone = Backbone(name, "file", _configs_for(path, model.config), None, path.resolve())
        if alone:
            backbone = replace(backbone, unet_alone=True, variant=model.variant or None)
    else:
        repo = hub_id(model.name)
        variant = model.variant or None
        source = from_hub(repo, [INDEX], SMALL_FILES, lambda cached: _is_here(cached, variant, not model.vae))
        backbone = Backbone(repo, "hub", source, variant)
    backbone = replace(backbone, quantize=model.quantize)
    check_configs(backbone.source)
    if model.vae:
        backbone = replace(backbone, vae=_find_vae(model.vae))
    latents = vae_config_of(backbone).get("latent_channels", 4)
    if latents != 4:
        raise ModelError(
            f"The VAE of {model.vae or backbone.name} has {latents} latent channels, but SDXL's UNet takes 4; "
            "pass model.vae with a VAE for SDXL."
        )
    for network in NETWORKS:
        if not backbone.in_file(network):
            _, files = weights_of(backbone, network, half=True)
            source, _ = source_of(backbone, network)
            for file in sorted(source.here().intersection(files)):
                if file.endswith(".safetensors"):
                    refuse_quantized(source.folder / file)
    return backbone


def hub_id(name: str) -> str:
    """The name, if it can be one on the hub. Raises: ModelError, saying what the name looks like instead."""
    on_hub = re.fullmatch(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+).*", name)
    if on_hub:
        raise ModelError(f"{name} is an address; pass the hub id alone: {on_hub[1]}.")
    if name.endswith((".safetensors", *PICKLES)) or not HUB_ID.fullmatch(name):
        if Path(name).is_absolute() or name.startswith((".", "~")) or re.search(r"[/\\]", name):
            raise ModelError(f"There is no model folder or file {name} (looked in {Path.cwd()}).")
        raise ModelError(
            f"{name} is neither a folder or file here nor a hub id of the form owner/name; "
            f"the usual base model is {SDXL_BASE}."
        )
    return name


def from_hub(repo: str, markers: list[str], small: list[str], is_here: Callable[[Source], bool]) -> Source:
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
    with hub_access_errors(repo):
        info = within_seconds(HUB_SECONDS, lambda: HfApi().model_info(repo, timeout=HUB_SECONDS / 2))
    remote = frozenset(file.rfilename for file in info.siblings or ())
    if COEFF_FILE in remote and not remote.intersection(markers):
        raise ModelError(
            f"{repo} on the hub is an adapter, not a base model; pass it as --adapter, and --model with what it was "
            "trained on."
        )
    if not remote.intersection(markers):
        raise ModelError(
            f"{repo} on the hub has no {' or '.join(markers)}, so it is not in diffusers' layout; if it holds a "
            "single .safetensors file of an SDXL model, download that and pass its path."
        )
    with hub_access_errors(repo):
        # Without a revision, so that the cache also learns what "main" is, and can serve it offline.
        folder = Path(snapshot_download(repo, allow_patterns=small))
    return Source(repo, folder, repo, remote)


def encoder_folder(name: str) -> Path:
    """The folder of a model in transformers' layout: one here, or the hub's cache, downloaded first if necessary.

    So transformers itself never turns to the network, where it would try for a minute.

    Raises: ModelError, within seconds, if it is nowhere.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"{name} is neither a folder here nor a hub id of the form owner/name.")
    source = from_hub(
        name, ["config.json"], ["*.json", "*.txt"], lambda s: not s.here().isdisjoint(ENCODER_WEIGHTS)
    )
    if source.remote:
        weights = next((file for file in ENCODER_WEIGHTS if file in source.remote), None)
        if weights is None:
            raise ModelError(f"{name} on the hub has no {' or '.join(ENCODER_WEIGHTS)}.")
        from huggingface_hub import snapshot_download

        with hub_access_errors(name):
            snapshot_download(name, allow_patterns=["*.json", "*.txt", weights])
    return source.folder


def _is_here(source: Source, variant: str | None, with_vae: bool) -> bool:
    """Whether the cache can serve the whole pipeline in some variant that the settings allow."""
    files = source.here()
    networks = [name for name in NETWORKS if with_vae or name != "vae"]
    return files.issuperset((INDEX, *CONFIG_FILES)) and all(
        any(
            files_of(files, name, NETWORKS[name][1], choice) for choice in variant_choices(variant, half=True)
        )
        for name in networks
    )


def _configs_for(file: Path, config: str | None) -> Source:
    """Configs and tokenizers for a single file: model.config, or the cached SDXL base. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    name = config or SDXL_BASE
    if config is not None and Path(config).expanduser().is_dir():
        return Source(config, Path(config).expanduser().resolve())
    cached = try_to_load_from_cache(name, INDEX) if HUB_ID.fullmatch(name) else None
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
    if not HUB_ID.fullmatch(name):
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
        source = from_hub(
            hub_id(name),
            ["config.json", "vae/config.json"],
            ["config.json", "vae/*.json"],
            lambda cached: any(
                files_of(cached.here(), subfolder, stem, choice)
                for subfolder in ("", "vae")
                for choice in (None, "fp16")
            ),
        )
    files = source.here()
    subfolder = next((sub for sub in ("", "vae") if joined_path(sub, "config.json") in files), None)
    if subfolder is None:
        raise ModelError(f"model.vae {name} holds neither config.json nor vae/config.json.")
    kind = read_json(source, joined_path(subfolder, "config.json")).get("_class_name")
    if kind != "AutoencoderKL":
        raise ModelError(f"model.vae {name} is a {kind}, but SDXL takes an AutoencoderKL.")
    return source, subfolder
