"""The base model as an adapter's run opened it: its VAE, configs and variant; and what has changed since.

An adapter's header records all that; for older adapters the run's config.yaml beside them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from coeffdiff.config.fields import SDXL_BASE
from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import AdapterMismatch, CoeffDiffError, ConfigError, ModelError
from coeffdiff.method.adapter_header import OWN_VAE, WIDE, AdapterHeader, BaseHeader
from coeffdiff.method.number_formats import Quantized
from coeffdiff.models.architecture import missing_networks
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.fingerprints import LABELS, changed, fingerprints
from coeffdiff.models.source import Backbone, Source


@dataclass(frozen=True)
class Trained:
    """An adapter's folder and header, and how its run opened the base model."""

    folder: Path
    header: AdapterHeader

    @property
    def base(self) -> BaseHeader | None:
        """How its run opened the base model; None for an older adapter without its run."""
        if self.header.base is not None:
            return self.header.base
        config = self.folder.parent / "config.yaml"
        try:
            model = load_settings(config).model if config.is_file() else None
        except CoeffDiffError:  # written by another version
            model = None
        if model is None:
            return None
        return BaseHeader(vae=model.vae, config=model.config, variant=model.variant, quantize=model.quantize)


@dataclass(frozen=True)
class Asked:
    """The base model, configs and VAE that the user names; None: the adapter's. vae: a folder, a hub id or OWN_VAE;
    quantize: int8, fp8, nf4 or WIDE."""

    model: str | None = None
    config: str | None = None
    vae: str | None = None
    quantize: str | None = None


def model_for(adapters: Sequence[Trained], asked: Asked) -> ModelSettings:
    """The base model for these adapters, loaded together, as settings.

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
        quantize=_quantized(first, asked),
    )


def _quantized(first: BaseHeader, asked: Asked) -> Any:
    """As the user says, else as the first adapter's run had it. Raises: ConfigError for another word."""
    if asked.quantize is None:
        return first.quantize
    if asked.quantize not in (*get_args(Quantized), WIDE):
        raise ConfigError(f"quantize is {', '.join(get_args(Quantized))} or {WIDE}, not {asked.quantize!r}.")
    return None if asked.quantize == WIDE else asked.quantize


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
    """Find and check the base model for these adapters, without loading weights.

    Raises: ModelError if it, its configs or its VAE are missing, or if the VAE is not the one of training;
        AdapterMismatch if the adapters were trained with different VAEs and none is asked for.
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
    """A VAE beside the model shapes the run's pictures as much as the adapter does. Raises: ModelError."""
    before = adapter.base.networks if adapter.base else {}
    if base.vae and "vae" in before and changed(_vae_alone(before), fingerprints(base, dtype), exactly=False):
        place = where(base.vae[0])
        raise ModelError(
            f"The VAE {place} is another than when {adapter.folder} was trained: was {before['vae']}, now "
            f"{fingerprints(base, dtype)['vae']}. Put it back, or pass --vae {place} to draw with it all the same, "
            f"or --vae {OWN_VAE} for the base model's own."
        )


def _with_variant(base: Backbone, variant: str | None) -> Backbone:
    """The variant of the run's files where all of them are here; otherwise the base model as it is."""
    if (base.file and not base.unet_alone) or variant == base.variant or variant == "auto":
        return base
    chosen = replace(base, variant=variant)
    try:
        here = not missing_networks(chosen, torch.float32)
    except ModelError:
        return base
    return chosen if here else base


def differences(adapters: Sequence[Trained], base: Backbone, dtype: torch.dtype) -> list[str]:
    """A line for each adapter whose base model has other weights than in training. No error: the pictures differ."""
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
    """How pictures of this size and precision differ from the run's own validation pictures, in a line or none.

    size: width and height in pixels.  size, precision: None where the user has chosen it, and so needs no hint.
    """
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
    """The base model's part of a picture's recipe."""
    vae = where(base.vae[0]) if base.vae else None
    configs = {"model_config": where(base.source)} if base.file else {}
    quantized = {"quantize": base.quantize} if base.quantize else {}
    return {"model": base.name, "vae": vae, "variant": base.variant} | configs | quantized


def where(source: Source) -> str:
    """A source's hub id, or its absolute path."""
    return str(source.folder) if Path(source.name).expanduser().is_dir() else source.name
