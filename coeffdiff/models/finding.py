"""Find a base model from a hub id, a folder or a single file, and check it before weights are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from coeffdiff.config.fields import SDXL_BASE
from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import ModelError
from coeffdiff.method.adapter_paths import COEFF_FILE
from coeffdiff.method.families import SD15, SDXL, Family
from coeffdiff.models.architecture import vae_config_of
from coeffdiff.models.checking import check_configs, check_single_file, read_json, refuse_quantized
from coeffdiff.models.files import files_of, joined_path, source_of, variant_choices, weights_of
from coeffdiff.models.hub_errors import hub_access_errors
from coeffdiff.models.source import (
    CONFIG_SETTING,
    ENCODER_WEIGHTS,
    INDEX,
    PICKLES,
    SMALL_FILES,
    VAE,
    VAE_SETTING,
    Backbone,
    Source,
    config_files,
    networks_of,
)
from coeffdiff.pocket import POCKET, shipped
from coeffdiff.utils.hub import HUB_ID, HUB_SECONDS, within_seconds

# Of a model in transformers' layout, beside its weights: configs, tokenizers, chat templates
_TRANSFORMERS_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def find_backbone(model: ModelSettings) -> Backbone:
    """Resolve the settings' model and check what can be checked without reading weights.

    The hub is asked only for an id that the cache cannot serve, and given up after some seconds.

    Raises: ModelError, if there is no such model, it is of no family that is known, it is damaged, or it is not
        available offline.
    """
    path = Path(model.name).expanduser()
    if model.name == POCKET:  # a folder of that name in the working directory is ./pocket
        backbone = Backbone(POCKET, "folder", Source(POCKET, shipped(POCKET)), None)
    elif path.is_dir():
        name = str(path.resolve())
        backbone = Backbone(name, "folder", Source(name, path.resolve()), model.variant or None)
    elif path.exists():
        family, alone = check_single_file(path, model)
        name = str(path.resolve())
        configs = _configs_for(path, model.config, family)
        backbone = Backbone(name, "file", configs, None, path.resolve(), family=family)
        if alone:
            backbone = replace(backbone, unet_alone=True, variant=model.variant or None)
    else:
        repo = hub_id(model.name)
        variant = model.variant or None
        source = from_hub(repo, [INDEX], SMALL_FILES, lambda cached: _is_here(cached, variant, not model.vae))
        backbone = Backbone(repo, "hub", source, variant)
    family = check_configs(backbone.source)
    if backbone.file and backbone.family is not family:
        raise ModelError(
            f"{backbone.file} is {backbone.family.a_label} model, and {backbone.source.name}, which is to give its "
            f"configs, is {family.a_label} model; pass {CONFIG_SETTING} with a diffusers folder of "
            f"{backbone.family.a_label} model."
        )
    backbone = replace(backbone, family=family, quantize=model.quantize)
    if model.vae:
        backbone = replace(backbone, vae=_find_vae(model.vae))
        _check_vae(backbone)
    latents = vae_config_of(backbone).get("latent_channels", 4)
    if latents != 4:
        raise ModelError(
            f"The VAE of {model.vae or backbone.name} has {latents} latent channels, but {family.label}'s UNet "
            f"takes 4; pass {VAE_SETTING} with a VAE for {family.label}."
        )
    for network in backbone.networks:
        if not backbone.in_file(network):
            _, files = weights_of(backbone, network, half=True)
            source, _ = source_of(backbone, network)
            for file in sorted(source.here().intersection(files)):
                if file.endswith(".safetensors"):
                    refuse_quantized(source.folder / file)
    return backbone


def _check_vae(backbone: Backbone) -> None:
    """Raises: ModelError for a VAE of another family, which scales its latents otherwise: pictures would be wrong."""
    usual = 0.18215  # of an AutoencoderKL whose config says nothing
    before = read_json(backbone.source, "vae/config.json").get("scaling_factor", usual)
    now = vae_config_of(backbone).get("scaling_factor", usual)
    if now != before:
        assert backbone.vae is not None
        raise ModelError(
            f"The VAE {backbone.vae[0].name} scales latents by {now}, that of {backbone.source.name} by {before}, "
            f"so it belongs to another family of models; pass {VAE_SETTING} with a VAE for {backbone.family.label}."
        )


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


def from_hub(
    repo: str,
    markers: list[str],
    small: list[str],
    is_here: Callable[[Source], bool],
    read: Sequence[str] = ("*.json", "*.txt"),
) -> Source:
    """A repository of the hub with its small files in the cache; asks the network only if is_here says no.

    Args:
        markers: files of which the repository must have one.
        read: patterns of what is read of it beside weights in safetensors, for the sentence without a network.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    for marker in markers:
        cached = try_to_load_from_cache(repo, marker)
        if isinstance(cached, str):
            folder = Path(cached).parents[marker.count("/")]
            source = Source(repo, folder, repo)
            if is_here(source):
                return source
    with hub_access_errors(repo, read):
        info = within_seconds(HUB_SECONDS, lambda: HfApi().model_info(repo, timeout=HUB_SECONDS / 2))
    remote = frozenset(file.rfilename for file in info.siblings or ())
    if COEFF_FILE in remote and not remote.intersection(markers):
        raise ModelError(
            f"{repo} on the hub is an adapter, not a base model; pass --model with the model that it was trained on."
        )
    if not remote.intersection(markers):
        raise ModelError(
            f"{repo} on the hub has no {' or '.join(markers)}, so it is not in diffusers' layout; if it holds a "
            "single .safetensors file of a model, download that and pass its path."
        )
    with hub_access_errors(repo, read):
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
    if path.is_file():
        raise ModelError(f"{name} is a file; pass the folder with its config.json and weights, or a hub id.")
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"{name} is neither a folder here nor a hub id of the form owner/name.")
    read = [*_TRANSFORMERS_FILES, "*.bin"]
    source = from_hub(
        name, ["config.json"], _TRANSFORMERS_FILES, lambda s: bool(_encoder_weights(s.here())), read
    )
    if source.remote:
        weights = _encoder_weights(source.remote)
        if not weights:
            raise ModelError(f"{name} on the hub has no {' or '.join(ENCODER_WEIGHTS)}.")
        from huggingface_hub import snapshot_download

        with hub_access_errors(name, read):
            snapshot_download(name, allow_patterns=[*_TRANSFORMERS_FILES, *weights])
    return source.folder


def _encoder_weights(files: Collection[str]) -> list[str]:
    """The weights among a repository's files, shards with their index; nothing if there are none."""
    return files_of(files, "", "model", None) or [file for file in ENCODER_WEIGHTS if file in files][:1]


def _is_here(source: Source, variant: str | None, with_vae: bool) -> bool:
    """Whether the cache can serve the whole pipeline in some variant that the settings allow."""
    files = source.here()
    kind = str(read_json(source, INDEX).get("_class_name"))
    family = SDXL if kind.startswith(SDXL.pipelines) else SD15
    networks = networks_of(family.name).items()
    return files.issuperset((INDEX, *config_files(family.name))) and all(
        any(files_of(files, name, one.stem, choice) for choice in variant_choices(variant, half=True))
        for name, one in networks
        if with_vae or name != "vae"
    )


def _configs_for(file: Path, config: str | None, family: Family) -> Source:
    """Configs and tokenizers for a single file: model.config, or the family's cached base. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    name = config or family.usual_base
    if config is not None and Path(config).expanduser().is_dir():
        return Source(config, Path(config).expanduser().resolve())
    cached = try_to_load_from_cache(name, INDEX) if HUB_ID.fullmatch(name) else None
    if isinstance(cached, str):
        return Source(name, Path(cached).parent)
    how = (
        f"run `hf download {name} --include '*.json' --include '*.txt'` once (a few MB), or pass "
        f"{CONFIG_SETTING} with a diffusers folder of {family.a_label} model"
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
        source = from_hub(
            hub_id(name),
            ["config.json", "vae/config.json"],
            ["config.json", "vae/*.json"],
            lambda cached: any(
                files_of(cached.here(), subfolder, VAE.stem, choice)
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
        raise ModelError(f"model.vae {name} is a {kind}, but base models take an AutoencoderKL.")
    return source, subfolder
