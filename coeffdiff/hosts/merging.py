"""Several adapters as one: what load_adapter adds up when they are loaded together, written as one folder.

coeff = I + sum of scale_i * (coeff_i - I) on every layer, and LoRA's weight changes add up the same way. Maps and
values are never mixed by one coeff. No model is needed for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.hosts.lora_file import lora_pairs, write_lora
from coeffdiff.method.adapter_file import pack_coefficients, read_coefficients, read_lora
from coeffdiff.method.adapter_header import (
    OWN_VAE,
    AdapterHeader,
    BaseHeader,
    LoraHeader,
    MergedPart,
    format_for,
)
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE, find_adapter, same_adapter
from coeffdiff.method.coefficients import Mixes, deviation_of
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.writable import why_unwritable

_MOST_RANKS = 1024  # what LoraHeader allows
_MOST_PARTS = 100  # what AdapterHeader allows


def merge_adapters(
    adapters: Sequence[tuple[str | Path, float | None]],
    output: Path,
    base_model: str | None = None,
    vae: str | None = None,
) -> AdapterHeader:
    """Write the weighted sum of adapters as the adapter folder `output`.

    The sum of alphas is taken in float64 and exact up to one rounding to float32. LoRAs are laid side by side: the
    merged one has the sum of their ranks, so its product is the sum of theirs. The first adapter's token is the
    merged one's; all of them keep their own in the header's `merged`, and each word still calls its own subject.

    Args:
        adapters: run or adapter folders and scales; None is what an adapter recommends.
        base_model: what to write down as the base, needed where the adapters name different ones.
        vae: the same of the VAE; OWN_VAE is the base model's own.
    Returns: the header that was written; its recommended scale is 1.
    Raises: AdapterError for a damaged adapter, a DoRA, ranks beyond 1024, a scale that is 0 or no number, an output
        that holds something, or if one adapter mixes maps and another values; AdapterMismatch if they belong to
        different models.
    """
    if len(adapters) < 2:
        raise AdapterError("Merging takes at least two adapters, such as runs/a:0.7 runs/b:0.3.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AdapterError(f"{output} is not empty; name another --output. Nothing was changed.")
    if reason := why_unwritable(output.parent):  # where its temporary name will be
        raise AdapterError(f"The adapter {output} cannot be written: {reason}.")
    folders = [find_adapter(path) for path, _ in adapters]
    for one, other in itertools.combinations(folders, 2):
        if same_adapter(one, other):
            raise AdapterError(
                f"{one} and {other} are the same adapter, given twice; one with the sum of their scales does the same "
                "and needs no merging."
            )
    read = [read_coefficients(folder) for folder in folders]
    headers = [header for header, _ in read]
    scales = [
        header.recommended_scale if scale is None else scale
        for (_, scale), header in zip(adapters, headers, strict=True)
    ]
    loras = [read_lora(folder, header) for folder, header in zip(folders, headers, strict=True)]
    _check(folders, headers, scales, base_model)
    base = _common_base(folders, headers, base_model, vae)

    alphas: dict[str, Tensor] = {}
    heads: dict[str, int] = {}
    for (header, own), scale in zip(read, scales, strict=True):
        for layer, count in header.heads.items():
            deviation = scale * deviation_of(own[f"{layer}.alpha"].double(), header.form)
            alphas[f"{layer}.alpha"] = alphas.get(f"{layer}.alpha", 0) + deviation
            heads[layer] = count
    rank, tensors = _side_by_side(folders, headers, scales, loras)
    first = headers[0]
    parts = [part for header, scale in zip(headers, scales, strict=True) for part in _parts(header, scale)]
    if len(parts) > _MOST_PARTS:
        raise AdapterError(f"These are {len(parts)} adapters; at most {_MOST_PARTS} can be merged into one.")
    mixes: Mixes = next((header.mixes for header in headers if header.heads), "maps")
    merged = first.model_copy(
        update={
            "format_version": format_for(mixes, base.vae if base else None),
            "base": base,
            "kind": "+".join(["coeff"] * bool(heads) + ["lora"] * bool(rank)),
            "base_model": base_model or first.base_model,
            "form": "residual",
            "mixes": mixes,
            "heads": heads,
            "lora": LoraHeader(rank=rank, alpha=rank) if rank else None,
            "trained_steps": max(header.trained_steps for header in headers),
            "resolution": max(header.resolution for header in headers),
            "recommended_scale": 1.0,
            "merged": tuple(parts),
        }
    )
    narrow = {key: alpha.float().contiguous() for key, alpha in alphas.items()}
    if not all(tensor.isfinite().all() for tensor in (*narrow.values(), *tensors.values())):
        raise AdapterError("The sum is not finite; the scales are too large.")
    try:
        with atomic_write(output) as temporary:
            temporary.mkdir()
            (temporary / COEFF_FILE).write_bytes(pack_coefficients(narrow, merged))
            if rank:
                modules = sorted({key.rpartition(".lora_")[0] for key in tensors})
                write_lora(temporary, tensors, rank=rank, alpha=float(rank), dora=False, modules=modules)
            (temporary / "README.md").write_text(_card(merged), encoding="utf-8")
    except OSError as error:
        raise AdapterError(f"The adapter {output} cannot be written: {error.strerror or error}.") from None
    return merged


def _check(
    folders: Sequence[Path], headers: Sequence[AdapterHeader], scales: Sequence[float], base_model: str | None
) -> None:
    first, start = headers[0], folders[0]
    heads: dict[str, tuple[int, Path]] = {}
    mixing: dict[Mixes, Path] = {
        header.mixes: folder for folder, header in zip(folders, headers, strict=True) if header.heads
    }
    if len(mixing) > 1:
        raise AdapterError(
            f"{mixing['maps']} mixes attention maps and {mixing['values']} mixes values, which do not add up to one "
            "alpha; load them together instead."
        )
    for folder, header, scale in zip(folders, headers, scales, strict=True):
        if not math.isfinite(scale) or scale == 0:
            raise AdapterError(f"The scale of {folder} must be a finite number other than 0, not {scale:g}.")
        if header.lora and header.lora.dora:
            raise AdapterError(
                f"{folder} is a DoRA, whose change depends on the base model's weights and adds up with no other; "
                "load it beside the other adapters instead."
            )
        unknown = sorted({file.name for file in folder.glob("*.safetensors")} - {COEFF_FILE, LORA_FILE})
        if unknown:
            raise AdapterError(
                f"{folder} also holds {unknown[0]}, which cannot be merged; load the adapters together instead."
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


def _common_base(
    folders: Sequence[Path], headers: Sequence[AdapterHeader], base_model: str | None, vae: str | None
) -> BaseHeader | None:
    """How the base model is to be opened for all of them. Raises: AdapterMismatch if their VAEs differ."""
    known = [(folder, header.base) for folder, header in zip(folders, headers, strict=True) if header.base]
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
    # What the networks were is said only where all agree: of another model or VAE nobody has looked
    agree = [
        (name, print_)
        for name, print_ in first.networks.items()
        if not base_model
        and all(other.networks.get(name) == print_ for _, other in known)
        and (name != "vae" or chosen == first.vae)
    ]
    return first.model_copy(update={"vae": chosen, "networks": dict(agree)})


def _side_by_side(
    folders: Sequence[Path],
    headers: Sequence[AdapterHeader],
    scales: Sequence[float],
    loras: Sequence[dict[str, Tensor]],
) -> tuple[int, dict[str, Tensor]]:
    """The sum of the ranks and PEFT's A and B by key: A below A, B beside B with scale * alpha / rank in it."""
    pairs, strengths, ranks = [], [], []
    for folder, header, scale, tensors in zip(folders, headers, scales, loras, strict=True):
        if header.lora:
            pairs.append(lora_pairs(tensors, str(folder)))
            strengths.append(scale * header.lora.alpha / header.lora.rank)
            ranks.append(header.lora.rank)
    if sum(ranks) > _MOST_RANKS:
        raise AdapterError(
            f"The LoRAs' ranks add up to {sum(ranks):,}, and an adapter has at most {_MOST_RANKS:,}; "
            "load the adapters together instead."
        )
    sizes: dict[str, tuple[int, int]] = {}
    for own, rank in zip(pairs, ranks, strict=True):
        for module, (a, b) in own.items():
            size = sizes.setdefault(module, (a.shape[1], b.shape[0]))
            if size != (a.shape[1], b.shape[0]) or len(a) != rank:
                raise AdapterMismatch(
                    f"The LoRAs change {module} in matrices that do not fit together: they were trained on models of "
                    "different architecture, or one of them is damaged."
                )
    merged: dict[str, Tensor] = {}
    for module, (wide, tall) in sizes.items():
        absent = [(torch.zeros(rank, wide), torch.zeros(tall, rank)) for rank in ranks]
        parts = [pair.get(module, zeros) for pair, zeros in zip(pairs, absent, strict=True)]
        merged[f"{module}.lora_A.weight"] = torch.cat([a.float() for a, _ in parts])
        scaled = [strength * b.double() for (_, b), strength in zip(parts, strengths, strict=True)]
        merged[f"{module}.lora_B.weight"] = torch.cat(scaled, dim=1).float()
    return sum(ranks), merged


def _parts(header: AdapterHeader, scale: float) -> tuple[MergedPart, ...]:
    """What this adapter contributes; one that was merged itself contributes its own parts."""
    if header.merged:
        return tuple(part.model_copy(update={"scale": scale * part.scale}) for part in header.merged)
    return (
        MergedPart(
            token=header.token,
            class_word=header.class_word,
            kind=header.kind,
            trained_steps=header.trained_steps,
            scale=scale,
        ),
    )


def _card(header: AdapterHeader) -> str:
    rows = "".join(
        f"| `{part.token}` | {part.class_word or ''} | {part.kind} | {part.trained_steps} | {part.scale:g} |\n"
        for part in header.merged
    )
    return f"""---
library_name: coeffdiff
---

# {len(header.merged)} adapters in one

For `{header.base_model}`, merged with coeffdiff ({header.described}): the weighted sum of these. Each word calls its
own subject.

| token | class word | kind | steps | scale |
|---|---|---|---|---|
{rows}
```python
adapter = coeffdiff.load_adapter(pipe, ".")
```
"""
