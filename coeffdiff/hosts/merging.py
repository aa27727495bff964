"""Several adapters as one folder, with the same effect as loading them together.

coeff = I + sum of scale_i * (coeff_i - I) on every layer, and LoRA's weight changes add up the same way. One coeff
never mixes both maps and values. Needs no model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.hosts.lora.file import write_lora
from coeffdiff.hosts.merge_checks import Part, check_parts, common_base
from coeffdiff.method.adapter_file import pack_coefficients, read_coefficients, read_lora
from coeffdiff.method.adapter_header import (
    AdapterHeader,
    BaseHeader,
    LoraHeader,
    MergedPart,
    format_for,
)
from coeffdiff.method.adapter_paths import COEFF_FILE, same_adapter
from coeffdiff.method.coefficients import Mixes, deviation_of
from coeffdiff.method.lora_layout import lora_pairs
from coeffdiff.method.networks import UNET, encoders_in, network_of
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.output_folder import refuse_occupied, why_unwritable, write_errors

_MOST_RANKS = 1024  # the limit of LoraHeader
_MOST_PARTS = 100  # the limit of AdapterHeader


def merge_adapters(
    adapters: Sequence[tuple[str | Path, float | None]],
    output: Path,
    base_model: str | None = None,
    vae: str | None = None,
) -> AdapterHeader:
    """Write the weighted sum of adapters as the adapter folder `output`.

    The sum of alphas is computed in float64 and exact up to one rounding to float32. LoRAs are concatenated: the
    merged rank is the sum of their ranks, and its product the sum of their products. The first adapter's token is
    the merged one's; the header's `merged` lists all tokens, and each still calls its own subject.

    Args:
        adapters: run or adapter folders, or repositories of the Hub, and scales; None is the adapter's recommended one.
        base_model: to record as the base; needed where the adapters name different ones.
        vae: likewise; OWN_VAE is the base model's own.
    Returns: the header that was written; its recommended scale is 1.
    Raises: AdapterError for a damaged adapter, a DoRA, ranks beyond 1024, a scale that is 0 or not finite, an output
        that holds something, or if one adapter mixes maps and another values; AdapterMismatch if they belong to
        different models.
    """
    if len(adapters) < 2:
        raise AdapterError("Merging takes at least two adapters, such as runs/a:0.7 runs/b:0.3.")
    refuse_occupied(output, AdapterError)
    if reason := why_unwritable(output.parent):  # where its temporary name will be
        raise AdapterError(f"The adapter {output} cannot be written: {reason}.")
    parts = _read_parts(adapters)
    check_parts(parts, base_model)
    base = common_base(parts, base_model, vae)
    alphas = _sum_of_alphas(parts)
    rank, lora = _concatenated_loras(parts)
    header = _merged_header(parts, base, base_model, rank, encoders_in(lora))
    if not all(tensor.isfinite().all() for tensor in (*alphas.values(), *lora.values())):
        raise AdapterError("The sum is not finite; the scales are too large.")
    _write(output, header, alphas, lora)
    return header


def _read_parts(adapters: Sequence[tuple[str | Path, float | None]]) -> list[Part]:
    """Raises: AdapterError for a damaged adapter, or for the same one twice."""
    folders = [resolve_adapter(path) for path, _ in adapters]
    for one, other in itertools.combinations(folders, 2):
        if same_adapter(one, other):
            raise AdapterError(
                f"{one} and {other} are the same adapter, given twice; one with the sum of their scales does the same "
                "and needs no merging."
            )
    read = [(folder, *read_coefficients(folder)) for folder in folders]
    return [
        Part(
            folder,
            header,
            header.recommended_scale if scale is None else scale,
            alphas,
            read_lora(folder, header),
        )
        for (folder, header, alphas), (_, scale) in zip(read, adapters, strict=True)
    ]


def _sum_of_alphas(parts: Sequence[Part]) -> dict[str, Tensor]:
    """sum of scale * (coeff - I) by layer, added in float64."""
    sums: dict[str, Tensor] = {}
    for part in parts:
        for layer in part.header.heads:
            key = f"{layer}.alpha"
            deviation = part.scale * deviation_of(part.alphas[key].double(), part.header.form)
            sums[key] = sums.get(key, 0) + deviation
    return {key: alpha.float().contiguous() for key, alpha in sums.items()}


def _merged_header(
    parts: Sequence[Part],
    base: BaseHeader | None,
    base_model: str | None,
    rank: int,
    encoders: tuple[str, ...],
) -> AdapterHeader:
    """encoders: text encoders that the merged LoRA is on. Raises: AdapterError for too many parts."""
    headers = [part.header for part in parts]
    merged = [one for part in parts for one in _merged_parts(part.header, part.scale)]
    if len(merged) > _MOST_PARTS:
        raise AdapterError(f"These are {len(merged)} adapters; at most {_MOST_PARTS} can be merged into one.")
    heads = {layer: count for header in headers for layer, count in header.heads.items()}
    mixes: Mixes = next((header.mixes for header in headers if header.heads), "maps")
    return headers[0].model_copy(
        update={
            "format_version": format_for(
                mixes,
                base.vae if base else None,
                headers[0].family,
                text_encoders=any(header.encoders for header in headers),
            ),
            "base": base,
            "kind": "+".join(["coeff"] * bool(heads) + ["lora"] * bool(rank)),
            "base_model": base_model or headers[0].base_model,
            "form": "residual",
            "mixes": mixes,
            "heads": heads,
            "lora": LoraHeader(rank=rank, alpha=rank, encoders=encoders) if rank else None,
            "trained_steps": max(header.trained_steps for header in headers),
            "resolution": max(header.resolution for header in headers),
            "recommended_scale": 1.0,
            "merged": tuple(merged),
            "subjects": (),  # merged names them
        }
    )


def _write(output: Path, header: AdapterHeader, alphas: dict[str, Tensor], lora: dict[str, Tensor]) -> None:
    """The adapter folder, atomically. Raises: AdapterError if it cannot be written."""
    with write_errors(f"The adapter {output}", AdapterError), atomic_write(output) as temporary:
        temporary.mkdir()
        (temporary / COEFF_FILE).write_bytes(pack_coefficients(alphas, header))
        if header.lora:
            rank = header.lora.rank
            modules = sorted({key.rpartition(".lora_")[0] for key in lora if network_of(key) == UNET})
            write_lora(temporary, lora, rank=rank, alpha=float(rank), dora=False, modules=modules)
        (temporary / "README.md").write_text(_card(header), encoding="utf-8")


def _concatenated_loras(parts: Sequence[Part]) -> tuple[int, dict[str, Tensor]]:
    """The sum of the ranks and PEFT's tensors by key: A below A, B beside B with scale * alpha / rank in it.

    Raises: AdapterError for more than 1024 ranks; AdapterMismatch for matrices of different sizes.
    """
    pairs, strengths, ranks = [], [], []
    for part in parts:
        if lora := part.header.lora:
            pairs.append(lora_pairs(part.lora, str(part.folder)))
            strengths.append(part.scale * lora.alpha / lora.rank)
            ranks.append(lora.rank)
    if sum(ranks) > _MOST_RANKS:
        raise AdapterError(
            f"The LoRAs' ranks add up to {sum(ranks):,}, and an adapter has at most {_MOST_RANKS:,}; "
            "load the adapters together instead."
        )
    merged: dict[str, Tensor] = {}
    for module, (wide, tall) in _sizes(pairs, ranks).items():
        absent = [(torch.zeros(rank, wide), torch.zeros(tall, rank)) for rank in ranks]
        present = [pair.get(module, zeros) for pair, zeros in zip(pairs, absent, strict=True)]
        merged[f"{module}.lora_A.weight"] = torch.cat([a.float() for a, _ in present])
        scaled = [strength * b.double() for (_, b), strength in zip(present, strengths, strict=True)]
        merged[f"{module}.lora_B.weight"] = torch.cat(scaled, dim=1).float()
    return sum(ranks), merged


def _sizes(
    pairs: Sequence[Mapping[str, tuple[Tensor, Tensor]]], ranks: Sequence[int]
) -> dict[str, tuple[int, int]]:
    """Input and output width of every module that a LoRA changes. Raises: AdapterMismatch where two differ."""
    sizes: dict[str, tuple[int, int]] = {}
    for own, rank in zip(pairs, ranks, strict=True):
        for module, (a, b) in own.items():
            size = sizes.setdefault(module, (a.shape[1], b.shape[0]))
            if size != (a.shape[1], b.shape[0]) or len(a) != rank:
                raise AdapterMismatch(
                    f"The LoRAs change {module} in matrices that do not fit together: they were trained on models of "
                    "different architecture, or one of them is damaged."
                )
    return sizes


def _merged_parts(header: AdapterHeader, scale: float) -> tuple[MergedPart, ...]:
    """This adapter's entries in the header's `merged`: one for each of its subjects, or of its own parts."""
    if header.merged:
        return tuple(part.model_copy(update={"scale": scale * part.scale}) for part in header.merged)
    return tuple(
        MergedPart(
            token=subject.token,
            class_word=subject.class_word,
            kind=header.kind,
            trained_steps=header.trained_steps,
            scale=scale,
        )
        for subject in header.named
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
