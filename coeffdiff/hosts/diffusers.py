"""Adapters of diffusers pipelines: checked, loaded as a whole, saved."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.hosts.applied_adapter import Adapter, adapters_on
from coeffdiff.hosts.guard import unwatch, unwrapped, watch
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.hosts.lora.file import check_lora
from coeffdiff.hosts.lora.layers import load_lora, remove_lora, save_lora
from coeffdiff.hosts.pipeline_guard import enter, leave
from coeffdiff.hosts.text_encoders import (
    Encoders,
    EncodersPart,
    encoders_for,
    put_on,
    take_off,
    tensors_on,
)
from coeffdiff.hosts.token.learned_token import TokenPart, add_token, names_on, remove_token
from coeffdiff.hosts.unet import attention_layers, coefficients_of, eject, inject
from coeffdiff.method.adapter_file import (
    alphas_of,
    pack_coefficients,
    read_coefficients,
    read_lora,
    read_rows,
    rows_of,
    save_rows,
)
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import (
    COEFF_FILE,
    EMBEDS_FILE,
    LORA_FILE,
    same_adapter,
    same_run,
)
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.method.families import family_of_unet
from coeffdiff.method.networks import UNET, network_of, of_network
from coeffdiff.utils.atomic import atomic_write


@torch.inference_mode(False)  # what is loaded inside of inference mode may be used outside
def load_adapter(
    pipe: Any,
    path: str | Path,
    scale: float | None = None,
    *,
    backend: str = "auto",
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Adapter:
    """Apply an adapter (alpha, LoRA and learned token) to a StableDiffusionXLPipeline or StableDiffusionPipeline.

    Args:
        pipe: anything with a `unet` of the adapter's family; for an adapter that was trained on the text encoders also
            with these, for a learned token with their tokenizers as well.
        path: a run folder, an adapter folder, a checkpoint, a file in one of them, or a step of a run: runs/a@200.
            As a string also a repository of the Hub: user/repo, user/repo@revision. A path that exists wins.
        scale: how strongly it is applied; by default what the adapter recommends.
        backend: of mixed attention; see attention.choose_backend. All adapters of a layer are mixed by one backend, so
            what one of them names holds for all.
        revision, subfolder, token, cache_dir, local_files_only: of the repository, as diffusers names them; see
            hub.resolve_adapter.
    Returns: the applied adapter. Several may be loaded, of any kinds; they add up: on each layer
        coeff = I + sum of scale_i * alpha_i, and to each weight the sum of scale_i * LoRA_i. Those that mix values
        have a coeff of their own, and mixed maps meet mixed values.
    Raises: AdapterError if the files are missing, damaged or hostile, or the token is taken by a loaded adapter;
        AdapterMismatch if they are sound but belong to another architecture; ConfigError for a backend that is not
        there, or not the one that a loaded adapter names. The pipeline is then as before.
    """
    folder = resolve_adapter(
        path,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    header, alphas = read_coefficients(folder)
    rows = read_rows(folder, header)
    unet = unwrapped(pipe.unet)
    check_architecture(unet, header, folder)
    encoders = encoders_for(pipe, header, folder)
    lora = read_lora(folder, header, partial(check_shapes_of_lora, unet, encoders, header, folder))
    others = adapters_on(unet)
    for other in others.values():
        check_apart((folder, header), (other.path, other.header))
    name = _free_name(pipe, unet, encoders)
    adapter = Adapter(pipe, name, folder, header, encoders)
    try:
        if own := of_network(alphas, UNET):
            named = list(of_network(header.heads, UNET))
            layers = inject(unet, name, layers=named, form=header.form, backend=backend, mixes=header.mixes)
            fill_alphas(layers, own)
            for coefficients in layers.values():
                coefficients.requires_grad_(False)
        if header.lora:
            own = {key: tensor for key, tensor in lora.items() if network_of(key) == UNET}
            kind = header.lora.model_dump(exclude={"encoders"})
            load_lora(unet, own, name, **kind, origin=str(folder / LORA_FILE))
        if encoders:
            put_on(encoders, name, header, alphas, lora, folder)
            watch(unet, f"encoders {name}", EncodersPart(pipe, encoders, str(folder)))
        for number, token_name in enumerate(adapter.token_names):
            word, token_rows = header.named[number].token, rows_of(rows, number)
            add_token(pipe, word, token_rows, token_name, origin=str(folder / EMBEDS_FILE))
            watch(unet, f"token {token_name}", TokenPart(pipe, token_name, str(folder)))
        others[name] = adapter
        enter(pipe)
        adapter.set_scale(header.recommended_scale if scale is None else scale)
        adapter.verify()
    except BaseException:
        _take_back(pipe, unet, encoders, adapter)
        raise
    return adapter


def _free_name(pipe: Any, unet: nn.Module, encoders: Encoders) -> str:
    """A name for an adapter that neither coeffdiff nor PEFT uses on these networks, nor an adapter of another UNet with
    which this one shares its text encoders."""
    lora = {name for one in (unet, *encoders.values()) for name in getattr(one, "peft_config", {})}
    taken = {*adapters_on(unet), *lora, *names_on(pipe)}
    return next(f"coeffdiff_{n}" for n in range(len(taken) + 1) if f"coeffdiff_{n}" not in taken)


def _take_back(pipe: Any, unet: nn.Module, encoders: Encoders, adapter: Adapter) -> None:
    """All that load_adapter may have put on so far."""
    take_off(encoders, adapter.name)
    unwatch(unet, f"encoders {adapter.name}")
    eject(unet, adapter.name)
    remove_lora(unet, adapter.name)
    for token_name in adapter.token_names:
        unwatch(unet, f"token {token_name}")
        remove_token(pipe, token_name)
    others = adapters_on(unet)
    others.pop(adapter.name, None)
    if not others:
        leave(pipe, unet)


def check_shapes_of_lora(
    unet: nn.Module,
    encoders: Encoders,
    header: AdapterHeader,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises: AdapterError or AdapterMismatch unless these networks, with weights or without, have a LoRA's layers.

    shapes: of the adapter's LoRA, see read_lora_shapes.
    """
    lora, origin = header.lora, str(folder / LORA_FILE)
    assert lora is not None
    check_lora(unet, shapes, rank=lora.rank, dora=lora.dora, origin=origin, encoders=encoders)


def check_apart(one: tuple[Path, AdapterHeader], other: tuple[Path, AdapterHeader]) -> None:
    """Raises: AdapterError if two adapters cannot be loaded together: one given twice, or two of one token."""
    (folder, header), (path, before) = one, other
    shared = [token for token in header.tokens if token.lower() in map(str.lower, before.tokens)]
    of_one_run = same_run(folder, path)
    if same_adapter(folder, path) or (of_one_run and header.trained_steps == before.trained_steps):
        where = f"{folder} is" if str(folder) == str(path) else f"{folder} and {path} are"
        raise AdapterError(
            f"{where} the same adapter, given twice; once is enough, with another scale if it is to be stronger "
            "(DIR:SCALE at the command line, set_scale in Python)."
        )
    if shared and of_one_run:
        raise AdapterError(
            f"{folder} and {path} are two steps of one run, with one token, {shared[0]!r}; load one at a time. "
            "coeffdiff sample --checkpoints draws all of them side by side."
        )
    if shared:
        raise AdapterError(
            f"{folder} and {path} both use the token {shared[0]!r}; a prompt could not tell them apart. "
            "Train one of them with another --token."
        )


def loaded_adapters(pipe: Any) -> list[Adapter]:
    """The adapters that load_adapter put on this pipeline, in order."""
    return list(adapters_on(unwrapped(pipe.unet)).values())


def save_adapter(
    folder: Path,
    unet: nn.Module,
    header: AdapterHeader,
    extras: Mapping[str, bytes] | None = None,
    name: str = "default",
    rows: Mapping[str, Tensor] | None = None,
    encoders: Encoders | None = None,
) -> None:
    """Write the adapter folder, atomically.

    extras: further files by name, such as the model card and its pictures.
    rows: of the learned token, if the header has one.
    encoders: the text encoders that it is on as well, if the header names any.
    """
    with atomic_write(folder, durable=True) as temporary:
        write_adapter(temporary, unet, header, extras, name, rows, encoders)


def write_adapter(
    folder: Path,
    unet: nn.Module,
    header: AdapterHeader,
    extras: Mapping[str, bytes] | None = None,
    name: str = "default",
    rows: Mapping[str, Tensor] | None = None,
    encoders: Encoders | None = None,
) -> None:
    """save_adapter without the atomic write, into a new folder that is a part of another atomic write."""
    folder.mkdir()
    text_alphas, text_lora = tensors_on(encoders or {}, header, name)
    alphas = alphas_of(coefficients_of(unet, name)) | text_alphas
    (folder / COEFF_FILE).write_bytes(pack_coefficients(alphas, header))
    if header.lora:
        save_lora(unet, folder, name, text_lora)
    if header.vectors:
        save_rows(folder, rows or {})
    for file, extra in (extras or {}).items():
        (folder / file).write_bytes(extra)


@torch.no_grad()
def fill_alphas(layers: dict[str, Coefficients], alphas: dict[str, Tensor]) -> None:
    """Copy alphas into their layers. Raises: AdapterError if one of either side has no counterpart."""
    unmatched = {f"{layer}.alpha" for layer in layers} ^ set(alphas)
    if unmatched:
        raise AdapterError(f"{sorted(unmatched)[0]} has no counterpart ({len(unmatched)} in all).")
    for layer, coefficients in layers.items():
        coefficients.alpha.copy_(alphas[f"{layer}.alpha"])


def check_architecture(unet: nn.Module, header: AdapterHeader, folder: Path) -> None:
    """Raises: AdapterMismatch unless the UNet, with weights or without, is of the header's family and has its layers
    with as many heads."""
    own_family, wanted = family_of_unet(unwrapped(unet).config), header.base_family
    if own_family is not wanted:
        raise AdapterMismatch(
            f"{folder} is an adapter for {wanted.label}, trained on {header.base_model}, and this UNet is "
            f"{own_family.label}'s or of its kind; use it with {wanted.a_label} model."
        )
    layers = attention_layers(unet)
    for name, heads in of_network(header.heads, UNET).items():
        own = layers[name].heads if name in layers else None
        if own != heads:
            there = f"this UNet has {own} heads there" if own else "this UNet has no such layer"
            raise AdapterMismatch(
                f"{folder} has {heads} x {heads} coefficients for {name}, but {there}. The adapter was trained on "
                f"{header.base_model}; use that, or a fine-tune of it, as the model."
            )
