"""Whether adapters can be merged, and how the base model of the merged one is opened."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.method.adapter_header import OWN_VAE, AdapterHeader, BaseHeader
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE, same_run
from coeffdiff.method.coefficients import Mixes


@dataclass(frozen=True)
class Part:
    """An adapter to merge. alphas, lora: by key, as its files hold them."""

    folder: Path
    header: AdapterHeader
    scale: float
    alphas: dict[str, Tensor]
    lora: dict[str, Tensor]


def check_parts(parts: Sequence[Part], base_model: str | None) -> None:
    """Raises: AdapterError for a part that cannot be merged; AdapterMismatch for two of different models."""
    mixing: dict[Mixes, Path] = {part.header.mixes: part.folder for part in parts if part.header.heads}
    if len(mixing) > 1:
        raise AdapterError(
            f"{mixing['maps']} mixes attention maps and {mixing['values']} mixes values, which do not add up to one "
            "alpha; load them together instead."
        )
    start, first = parts[0].folder, parts[0].header
    heads: dict[str, tuple[int, Path]] = {}
    for one, other in itertools.combinations(parts, 2):
        _check_words(one, other)
    for part in parts:
        _check_alone(part)
        folder, header = part.folder, part.header
        if header.family != first.family:
            raise AdapterMismatch(
                f"{start} was trained on {first.base_family.a_label} model and {folder} on "
                f"{header.base_family.a_label} one; such adapters cannot be merged or used together."
            )
        if not base_model and header.base_model != first.base_model:
            raise AdapterMismatch(
                f"{start} was trained on {first.base_model} and {folder} on {header.base_model}. If they share an "
                "architecture, pass --model with the one that the merged adapter is for."
            )
        for layer, count in header.heads.items():
            found, where = heads.setdefault(layer, (count, folder))
            if found != count:
                raise AdapterMismatch(
                    f"{where} has {found} heads in {layer} and {folder} has {count}: they were trained on models of "
                    "different architecture."
                )


def _check_words(one: Part, other: Part) -> None:
    """Raises: AdapterError if one word would call both subjects; steps of one run share theirs."""
    words = {token.lower() for token in one.header.tokens}
    shared = [token for token in other.header.tokens if token.lower() in words]
    if shared and not same_run(one.folder, other.folder):
        raise AdapterError(
            f"{one.folder} and {other.folder} both use the token {shared[0]!r}; a prompt could not tell them apart in "
            "the merged adapter. Train one of them with another --token."
        )


def _check_alone(part: Part) -> None:
    """Raises: AdapterError for a scale, DoRA or file that cannot be merged."""
    folder, header = part.folder, part.header
    if not math.isfinite(part.scale) or part.scale == 0:
        raise AdapterError(f"The scale of {folder} must be a finite number other than 0, not {part.scale:g}.")
    if header.lora and header.lora.dora:
        raise AdapterError(
            f"{folder} is a DoRA, whose change depends on the base model's weights and adds up with no other; "
            "load it beside the other adapters instead."
        )
    if header.vectors:
        raise AdapterError(
            f"{folder} has a learned token, which cannot be merged; load the adapters together instead."
        )
    unknown = sorted({file.name for file in folder.glob("*.safetensors")} - {COEFF_FILE, LORA_FILE})
    if unknown:
        raise AdapterError(
            f"{folder} also holds {unknown[0]}, which cannot be merged; load the adapters together instead."
        )


def common_base(parts: Sequence[Part], base_model: str | None, vae: str | None) -> BaseHeader | None:
    """How to open the base model for all of them. Raises: AdapterMismatch if their VAEs differ."""
    known = [(part.folder, part.header.base) for part in parts if part.header.base]
    for folder, other in known[1:]:
        start, one = known[0]
        if vae is None and one.vae != other.vae:
            raise AdapterMismatch(
                f"{start} was trained with {one.described_vae} and {folder} with {other.described_vae}; say which one "
                f"the merged adapter is for: --vae {one.vae or OWN_VAE} or --vae {other.vae or OWN_VAE} ({OWN_VAE} is "
                "the base model's own)."
            )
    if not known:
        return None if vae in (None, OWN_VAE) else BaseHeader(vae=vae)
    first = known[0][1]
    chosen = first.vae if vae is None else None if vae == OWN_VAE else vae
    # Fingerprints are recorded only where all agree; those of another model or VAE are unknown
    agree = {
        name: fingerprint
        for name, fingerprint in first.networks.items()
        if not base_model
        and all(other.networks.get(name) == fingerprint for _, other in known)
        and (name != "vae" or chosen == first.vae)
    }
    alike = all(other.quantize == first.quantize for _, other in known)
    quantize = first.quantize if alike else None
    return first.model_copy(update={"vae": chosen, "networks": agree, "quantize": quantize})
