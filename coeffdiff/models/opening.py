"""The base model as an adapter's run opened it: its VAE, its configs, its variant; and what has changed since.

An adapter's header says all that; of older adapters the run's config.yaml beside them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coeffdiff.config.fields import SDXL_BASE
from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import AdapterMismatch, CoeffDiffError, ModelError
from coeffdiff.method.adapter_header import OWN_VAE, AdapterHeader, BaseHeader
from coeffdiff.models.architecture import missing_networks
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.fingerprints import LABELS, changed, fingerprints
from coeffdiff.models.source import Backbone, Source


@dataclass(frozen=True)
class Trained:
    """An adapter that is to be used: where it is, what it says of itself, and how its base model was opened."""

    folder: Path
    header: AdapterHeader

    @property
    def base(self) -> BaseHeader | None:
        """None: an older adapter without its run."""
        if self.header.base is not None:
            return self.header.base
        config = self.folder.parent / "config.yaml"
        try:
            model = load_settings(config).model if config.is_file() else None
        except CoeffDiffError:  # a run of another version
            model = None
        if model is None:
            return None
        return BaseHeader(vae=model.vae, config=model.config, variant=model.variant)


@dataclass(frozen=True)
class Asked:
    """What a person says of the base model; None: as the adapter says. vae: a folder, a hub id or OWN_VAE."""

    model: str | None = None
    config: str | None = None
    vae: str | None = None


def model_for(adapters: Sequence[Trained], asked: Asked) -> ModelSettings:
    """Which base model these adapters, loaded together, are to be used on, as settings.

    Raises: AdapterMismatch if they were trained with different VAEs and none is asked for.
    """
    bases = [adapter.base for adapter in adapters]
    first = next((base for base in bases if base), None) or BaseHeader()
    name = asked.model or (adapters[0].header.base_model if adapters else SDXL_BASE)
    vae = first.vae if asked.vae is None else None if asked.vae == OWN_VAE else asked.vae
    if asked.vae is None:
        _refuse_two_vaes(adapters)
    return ModelSettings(
        name=name,
        config=asked.config or next((base.config for base in bases if base and base.config), None),
        vae=vae,
        variant=first.variant if first.variant not in (None, "auto", "fp16") and not asked.model else "auto",
    )


def _refuse_two_vaes(adapters: Sequence[Trained]) -> None:
    known = [(adapter, base) for adapter in adapters if (base := adapter.base)]
    for adapter, base in known[1:]:
        start, first = known[0]
        networks = first.networks, base.networks
        equal = "vae" in networks[0] and "vae" in networks[1] and not changed(*map(_vae_alone, networks))
        if first.vae != base.vae and not equal:
            raise AdapterMismatch(
                f"{start.folder} was trained with {first.described_vae} and {adapter.folder} with "
                f"{base.described_vae}; say which one is to draw: --vae {first.vae or OWN_VAE} or "
                f"--vae {base.vae or OWN_VAE} ({OWN_VAE} is the base model's own)."
            )


def _vae_alone(networks: dict[str, str]) -> dict[str, str]:
    return {"vae": networks["vae"]}


def open_base(adapters: Sequence[Trained], asked: Asked, dtype: torch.dtype) -> Backbone:
    """The base model for these adapters, found and checked, no weights loaded.

    Raises: ModelError if it, its configs or its VAE are not there, or if the VAE is another than in training.
    """
    model = model_for(adapters, asked)
    hints = [] if asked.model else ["pass --model if it has moved"]
    hints += [] if asked.config or not model.config else ["--model-config if its configs have"]
    if adapters and asked.vae is None and model.vae:
        _check_vae_is_there(adapters[0], model.vae)
    try:
        base = find_backbone(model)
    except ModelError as error:
        if not adapters or not hints:
            raise
        raise ModelError(f"{error} The adapter was trained on it; {', '.join(hints)}.") from None
    first = adapters[0].base if adapters else None
    if first and not asked.model:
        base = _with_variant(base, first.variant)
    if asked.vae is None:
        for adapter in adapters:
            _refuse_another_vae(adapter, base, dtype)
    return base


def _check_vae_is_there(adapter: Trained, vae: str) -> None:
    if Path(vae).is_absolute() and not Path(vae).is_dir():
        raise ModelError(
            f"{adapter.folder} was trained with the VAE {vae}, which is not there any more; pass --vae with where it "
            f"is now, or --vae {OWN_VAE} for the base model's own."
        )


def _refuse_another_vae(adapter: Trained, base: Backbone, dtype: torch.dtype) -> None:
    """Of a VAE beside the model, which makes the run's pictures as much as the adapter does."""
    before = adapter.base.networks if adapter.base else {}
    if base.vae and "vae" in before and changed(_vae_alone(before), fingerprints(base, dtype), exactly=False):
        place = where(base.vae[0])
        raise ModelError(
            f"The VAE {place} is another than when {adapter.folder} was trained: was {before['vae']}, now "
            f"{fingerprints(base, dtype)['vae']}. Put it back, or pass --vae {place} to draw with it all the same, "
            f"or --vae {OWN_VAE} for the base model's own."
        )


def _with_variant(base: Backbone, variant: str | None) -> Backbone:
    """The files that the run took, where they are all here; otherwise what would be taken anyway."""
    if (base.file and not base.unet_alone) or variant == base.variant or variant == "auto":
        return base
    chosen = replace(base, variant=variant)
    try:
        here = not missing_networks(chosen, torch.float32)
    except ModelError:
        return base
    return chosen if here else base


def differences(adapters: Sequence[Trained], base: Backbone, dtype: torch.dtype) -> list[str]:
    """A line for each adapter whose base model has other weights than in training; pictures are made all the same."""
    lines = []
    now = fingerprints(base, dtype) if any(adapter.base for adapter in adapters) else {}
    for adapter in adapters:
        before = adapter.base.networks if adapter.base else {}
        other = [f"the {LABELS[name]}" for name in changed(before, now, exactly=False)]
        if other:
            verb = "is" if len(other) == 1 else "are"
            lines.append(
                f"{' and '.join(other)} of {base.name} {verb} not what {adapter.folder} was trained with, so its "
                "pictures are other ones"
            )
    return lines


def unlike_previews(
    adapters: Sequence[Trained], size: tuple[int, int] | None, precision: str | None
) -> list[str]:
    """In what pictures of this size (width and height in pixels) and precision are not those that the run itself has
    shown; None for what the person has chosen, who then knows."""
    if not adapters or adapters[0].header.merged:
        return []
    first = adapters[0]
    side, trained_in = first.header.resolution, first.base.precision if first.base else None
    theirs, these, options = [], [], []
    if size and size != (side, side):
        theirs.append(f"{side} x {side} px")
        these.append(f"{size[0]} x {size[1]}")
        options.append(f"--width {side} --height {side}")
    if precision and trained_in and trained_in != precision:
        theirs.append(trained_in)
        these.append(precision)
        options.append(f"--precision {trained_in}")
    if not options:
        return []
    return [
        f"the run's own validation pictures were made at {', '.join(theirs)}, these are at {', '.join(these)}; pass "
        f"{' '.join(options)} for those of {first.folder}"
    ]


def recipe(base: Backbone) -> dict[str, Any]:
    """What a picture's recipe says of the base model."""
    vae = where(base.vae[0]) if base.vae else None
    configs = {"model_config": where(base.source)} if base.file else {}
    return {"model": base.name, "vae": vae, "variant": base.variant} | configs


def where(source: Source) -> str:
    """A hub id, or an absolute path."""
    return str(source.folder) if Path(source.name).expanduser().is_dir() else source.name
