"""Which of a model's files are read: variants, shards, downloads."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from coeffdiff.errors import ModelError
from coeffdiff.models.checking import header_of
from coeffdiff.models.hub_errors import hub_access_errors
from coeffdiff.models.source import Backbone, Source

if TYPE_CHECKING:
    import torch


def weight_files(backbone: Backbone, network: str, dtype: torch.dtype) -> list[tuple[Path, str]]:
    """The safetensors files that load_pipeline(dtype=dtype) would read for a network, each with the prefix that the
    names of its tensors have in there; nothing where some would have to be downloaded first."""
    import torch

    source, _ = source_of(backbone, network)
    if backbone.file and backbone.in_file(network):
        return [(backbone.file, prefix_in_file(backbone, network))]
    _, files = weights_of(backbone, network, half=dtype != torch.float32)
    here = source.here().issuperset(files)
    return [(source.folder / file, "") for file in files if here and file.endswith(".safetensors")]


def prefix_in_file(backbone: Backbone, network: str) -> str:
    """The prefix of a network's tensors in the single file; a UNet alone may have none."""
    prefix = backbone.networks[network].prefix
    assert backbone.file is not None
    usual = any(name.startswith(prefix) for name in header_of(backbone.file))
    return prefix if usual or not backbone.unet_alone else ""


def chosen_variant(backbone: Backbone, dtype: torch.dtype) -> str | None:
    """The variant that load_pipeline takes; None: files without one, or a single file; "auto": networks differ."""
    import torch

    own = [
        name
        for name in backbone.networks
        if not backbone.in_file(name) and not (name == "vae" and backbone.vae)
    ]
    variants = {weights_of(backbone, name, half=dtype != torch.float32)[0] for name in own}
    return variants.pop() if len(variants) == 1 else "auto" if variants else None


def joined_path(subfolder: str, file: str) -> str:
    """The path of a file in a subfolder, which may be empty."""
    return f"{subfolder}/{file}" if subfolder else file


def variant_choices(variant: str | None, half: bool) -> list[str | None]:
    """Variants to try, in order."""
    if variant != "auto":
        return [variant]
    return ["fp16", None] if half else [None, "fp16"]


def files_of(files: Collection[str], subfolder: str, stem: str, variant: str | None) -> list[str]:
    """The safetensors files of one network in one variant, with the index if there are several; else nothing."""
    middle = f".{variant}" if variant else ""
    single = joined_path(subfolder, f"{stem}{middle}.safetensors")
    if single in files:
        return [single]
    index = joined_path(subfolder, f"{stem}.safetensors.index{middle}.json")
    shards = re.compile(
        re.escape(joined_path(subfolder, stem + middle)) + r"-(\d{5})-of-(\d{5})\.safetensors"
    )
    parts = sorted(file for file in files if shards.fullmatch(file))
    if index not in files or not parts or len(parts) != int(shards.fullmatch(parts[0])[2]):  # type: ignore[index]
        return []
    return [index, *parts]


def source_of(backbone: Backbone, network: str) -> tuple[Source, str]:
    """Where a network's files come from, and their subfolder there."""
    return backbone.vae if network == "vae" and backbone.vae else (backbone.source, network)


def weights_of(backbone: Backbone, network: str, *, half: bool) -> tuple[str | None, list[str]]:
    """The variant and the files of one network. Files on this machine are preferred to downloads.

    Raises: ModelError, naming the variants that are there instead.
    """
    source, subfolder = source_of(backbone, network)
    if backbone.unet_alone and source is backbone.source:
        try:
            return weights_of(replace(backbone, file=None, unet_alone=False), network, half=half)
        except ModelError as error:
            raise ModelError(
                f"{backbone.file} is a UNet alone, and model.config is to have the other networks: {error}"
            ) from error
    stem = backbone.networks[network].stem
    # The settings' variant speaks of the model, not of another VAE.
    choices = variant_choices("auto" if source is not backbone.source else backbone.variant, half)
    everything = source.here() | source.remote
    for files in (source.here(), everything):
        for variant in choices:
            chosen = files_of(files, subfolder, stem, variant)
            if chosen:
                return variant, chosen
    label = joined_path(subfolder, stem)
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


def fetch_file(source: Source, files: Collection[str]) -> None:
    """Download those of these files that the cache lacks, with the hub's own progress bars."""
    if source.repo is None or source.here().issuperset(files):
        return
    from huggingface_hub import snapshot_download

    with hub_access_errors(source.repo):
        # The commit that the configs are from.
        snapshot_download(source.repo, revision=source.folder.name, allow_patterns=sorted(files))
