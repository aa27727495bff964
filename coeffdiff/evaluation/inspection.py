"""An adapter's content, and how far it is from the base model: measured from its files alone."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coeffdiff.method.adapter_file import read_coefficients, read_lora
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import LORA_FILE
from coeffdiff.method.coefficients import deviation_of
from coeffdiff.method.lora_layout import lora_pairs
from coeffdiff.method.networks import UNET, network_of

# A row counts as a mixture of maps (in the simplex) within these: float32 sums of 20 entries, and room for noise.
_NEGATIVE, _SUM = -1e-6, 1e-3
# In a UNet -> in a text encoder
PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


@dataclass(frozen=True)
class LayerReport:
    """How far one attention layer's recombination is from the identity, at scale 1; norms are Frobenius norms."""

    layer: str
    block: str
    attention: str  # self, cross, or other where a name does not say
    heads: int
    norm: float
    diagonal: float  # norm of the entries of heads with themselves
    off_diagonal: float
    mean: float  # of the entries' absolute values
    largest: float


@dataclass(frozen=True)
class HeadReport:
    """One row of a layer's recombination: the heads that this one takes its map from, or its values."""

    layer: str
    head: int
    norm: float  # of the row's difference from the identity's
    own: float  # weight of its own map; 1 in the base model
    source: int  # the other head whose map it takes most of, by absolute weight
    weight: float  # of that map; 0 in the base model


@dataclass(frozen=True)
class SimplexReport:
    """How many rows are no mixture of maps any more, which ordinary attention cannot do: a mixture's weights are at
    least 0 and add up to 1."""

    rows: int
    outside: int
    negative: int  # rows with a negative weight
    smallest: float  # weight
    sums: int  # rows whose weights do not add up to 1, by more than 0.001
    lowest_sum: float
    highest_sum: float


@dataclass(frozen=True)
class BlockReport:
    """All layers of one kind in one block together; `norms` of what the adapter changes there, by part."""

    block: str
    attention: str
    layers: int
    norms: Mapping[str, float]


@dataclass(frozen=True)
class Inspection:
    """alpha_blocks have the norms all, diagonal and off_diagonal, and mean and largest of the entries; lora_blocks
    the norms of the weight changes: all and one for each projection."""

    folder: Path
    header: AdapterHeader
    files: Mapping[str, int]  # bytes
    alpha_parameters: int
    lora_parameters: int
    layers: Sequence[LayerReport]
    heads: Sequence[HeadReport]  # most recombined first
    simplex: SimplexReport | None  # of mixed maps; the weights of values are bound to nothing
    alpha_blocks: Sequence[BlockReport]
    lora_blocks: Sequence[BlockReport]
    deviations: Mapping[str, Tensor]  # layer -> [H, H], the recombination without the identity

    @property
    def taken(self) -> str:
        """What heads take of each other, in a word: map or values."""
        return "map" if self.header.mixes == "maps" else "values"

    def as_json(self) -> dict[str, Any]:
        """Plain values; heads are all rows there are."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("deviations", "header", "folder")
        }
        fields: dict[str, Any] = _plain(plain)
        return {"folder": str(self.folder), "header": self.header.model_dump(mode="json"), **fields}


def inspect_adapter(folder: Path) -> Inspection:
    """Read and measure an adapter folder. Raises: AdapterError if it is missing, damaged or hostile."""
    header, alphas = read_coefficients(folder)
    lora = read_lora(folder, header)
    deviations = {layer: deviation_of(alphas[f"{layer}.alpha"], header.form) for layer in header.heads}
    layers = [_layer_report(layer, deviation) for layer, deviation in deviations.items()]
    heads = [row for layer, deviation in deviations.items() for row in _rows(layer, deviation)]
    return Inspection(
        folder=folder,
        header=header,
        files={file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
        alpha_parameters=sum(alpha.numel() for alpha in alphas.values()),
        lora_parameters=sum(tensor.numel() for tensor in lora.values()),
        layers=layers,
        heads=sorted(heads, key=lambda row: -row.norm),
        simplex=_simplex(list(deviations.values())) if deviations and header.mixes == "maps" else None,
        alpha_blocks=_alpha_blocks(layers),
        lora_blocks=_lora_blocks(lora, header, folder) if header.lora else [],
        deviations=deviations,
    )


def block_and_attention(layer: str) -> tuple[str, str]:
    """Block and kind of attention of a layer by its name: ("down_blocks.1", "cross"), ("text_encoder_2", "self")."""
    if network_of(layer) != UNET:
        return network_of(layer), "self"
    match = re.match(r"((?:down|up)_blocks\.\d+|mid_block)\.", layer)
    attention = {"attn1": "self", "attn2": "cross"}.get(layer.rpartition(".")[2], "other")
    return match[1] if match else "other", attention


def _layer_report(layer: str, deviation: Tensor) -> LayerReport:
    wide, block = deviation.double(), block_and_attention(layer)
    diagonal = wide.diagonal()
    return LayerReport(
        layer=layer,
        block=block[0],
        attention=block[1],
        heads=len(wide),
        norm=float(wide.norm()),
        diagonal=float(diagonal.norm()),
        off_diagonal=float((wide - diagonal.diag()).norm()),
        mean=float(wide.abs().mean()),
        largest=float(wide.abs().max()),
    )


def _rows(layer: str, deviation: Tensor) -> list[HeadReport]:
    norms, own = deviation.double().norm(dim=1), deviation.double().diagonal() + 1
    others = deviation.abs().fill_diagonal_(-1)  # below every weight: with one head there is no other
    sources = others.argmax(dim=1)
    weights = deviation.gather(1, sources[:, None])[:, 0]
    rows = zip(norms.tolist(), own.tolist(), sources.tolist(), weights.tolist(), strict=True)
    return [HeadReport(layer, head, *row) for head, row in enumerate(rows)]


def _simplex(deviations: Sequence[Tensor]) -> SimplexReport:
    coeffs = [deviation.double() + torch.eye(len(deviation)) for deviation in deviations]
    smallest = torch.cat([coeff.amin(dim=1) for coeff in coeffs])
    sums = torch.cat([coeff.sum(dim=1) for coeff in coeffs])
    negative, off = smallest < _NEGATIVE, (sums - 1).abs() > _SUM
    return SimplexReport(
        rows=len(sums),
        outside=int((negative | off).sum()),
        negative=int(negative.sum()),
        smallest=float(smallest.min()),
        sums=int(off.sum()),
        lowest_sum=float(sums.min()),
        highest_sum=float(sums.max()),
    )


def _alpha_blocks(layers: Sequence[LayerReport]) -> list[BlockReport]:
    def together(members: Sequence[LayerReport]) -> dict[str, float]:
        entries = sum(member.heads**2 for member in members)
        return {
            "all": _root_of_squares(member.norm for member in members),
            "diagonal": _root_of_squares(member.diagonal for member in members),
            "off_diagonal": _root_of_squares(member.off_diagonal for member in members),
            "mean": sum(member.mean * member.heads**2 for member in members) / entries,
            "largest": max(member.largest for member in members),
        }

    return _by_block(layers, lambda member: (member.block, member.attention), together)


def _lora_blocks(tensors: dict[str, Tensor], header: AdapterHeader, folder: Path) -> list[BlockReport]:
    """Norms of alpha / rank * B A. DoRA's magnitudes are left out: what they change depends on the base model."""
    assert header.lora
    strength = header.lora.alpha / header.lora.rank
    norms = {}
    for module, (down, up) in lora_pairs(tensors, str(folder / LORA_FILE)).items():
        a, b = down.double(), up.double()
        # |B A|^2 = <B^T B, A A^T>: rank x rank, where the product itself is as large as the layer
        square = float(((b.T @ b) * (a @ a.T)).sum())
        norms[module] = strength * math.sqrt(max(0.0, square))

    def place(module: str) -> tuple[str, str]:
        return block_and_attention(_layer_of(module))

    def together(modules: Sequence[str]) -> dict[str, float]:
        parts = {
            name: [norms[module] for module in modules if module.endswith((f".{name}", f".{of_clip}"))]
            for name, of_clip in PROJECTIONS.items()
        }
        projections = {name: _root_of_squares(values) for name, values in parts.items() if values}
        return {"all": _root_of_squares(norms[module] for module in modules), **projections}

    return _by_block(list(norms), place, together, count=lambda modules: len({*map(_layer_of, modules)}))


def _layer_of(module: str) -> str:
    """The attention layer that a projection belongs to."""
    match = re.match(r"(.*\.(?:attn[12]|self_attn))\.", module)
    return match[1] if match else module


def _by_block(
    members: Sequence[Any],
    place: Callable[[Any], tuple[str, str]],
    together: Callable[[Sequence[Any]], dict[str, float]],
    count: Callable[[Sequence[Any]], int] = len,
) -> list[BlockReport]:
    """A report for each block and kind of attention, in the model's order, and one for all of them."""
    if not members:
        return []
    groups: dict[tuple[str, str], list[Any]] = {}
    for member in members:
        groups.setdefault(place(member), []).append(member)
    order = ("down", "mid", "up", "other", "text")
    places = sorted(groups, key=lambda at: (order.index(at[0].split("_")[0]), at[0], at[1] != "self", at[1]))
    reports = [BlockReport(*at, count(groups[at]), together(groups[at])) for at in places]
    return [*reports, BlockReport("all", "both", count(members), together(members))]


def _root_of_squares(values: Any) -> float:
    return math.sqrt(sum(value * value for value in values))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
