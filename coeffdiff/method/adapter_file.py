"""The files of an adapter folder, read, checked and packed: torch, safetensors and pydantic are all that they need.

coeff.safetensors                 alpha per layer and the header that makes the folder self-describing
pytorch_lora_weights.safetensors  with LoRA only, in diffusers' stock layout
learned_embeds.safetensors        with a learned token only; diffusers' load_textual_inversion reads it
README.md                         a model card
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from coeffdiff.errors import AdapterError
from coeffdiff.method.adapter_header import FORMAT_VERSION, PARTS, AdapterHeader, is_harmless, row_key
from coeffdiff.method.adapter_paths import COEFF_FILE, EMBEDS_FILE, HEADER_KEY, LORA_FILE
from coeffdiff.method.attached_header import ATTACHED, ATTACHED_VERSION, AttachedHeader
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.method.networks import encoders_in
from coeffdiff.method.not_an_adapter import name_of_tensors, no_tensors
from coeffdiff.utils.atomic import in_utf8

H = TypeVar("H", bound=BaseModel)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


_LARGEST = {
    COEFF_FILE: 64 * 2**20,
    LORA_FILE: 8 * 2**30,
    EMBEDS_FILE: 64 * 2**20,
}  # bytes; SDXL needs 0.2 MB, at most 6 GB (rank 1024) and 8 KB a vector, of which 100 tokens have 64 at most


_LARGEST_HEADER = (
    4 * 2**20
)  # bytes of names, shapes and metadata, which cost some thirty times as much to parse


def files_of(header: AdapterHeader) -> tuple[str, ...]:
    """The files that an adapter with this header consists of."""
    return (COEFF_FILE, *[LORA_FILE] * bool(header.lora), *[EMBEDS_FILE] * bool(header.vectors))


def refuse_large(where: str, name: str, size: int) -> None:
    """Raises: AdapterError if a file of this name is larger, in bytes, than any adapter's; where: to call it by."""
    if size > _LARGEST[name]:
        raise AdapterError(f"{where} has {size / 2**20:.0f} MiB; no {name} is that large.")


def pack_coefficients(alphas: dict[str, Tensor], header: AdapterHeader | AttachedHeader) -> bytes:
    """The content of a COEFF_FILE: alphas as of alphas_of, and the header that describes the folder."""
    content: bytes = save(alphas, metadata={"format": "pt", HEADER_KEY: header.model_dump_json()})
    return content


def read_header(folder: Path) -> AdapterHeader:
    """The header alone, without reading the tensors. Raises: AdapterError."""
    return read_coefficients(folder, tensors=False)[0]


def read_coefficients(folder: Path, tensors: bool = True) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Header and alphas of an adapter folder, every size checked before it is used. Raises: AdapterError."""
    file = folder / COEFF_FILE
    header, shapes, values = _read_described(file, AdapterHeader, FORMAT_VERSION, tensors)
    holds = {"coeff": bool(header.heads), "lora": bool(header.lora), "token": bool(header.vectors)}
    if {part for part, held in holds.items() if held} != set(header.kind.split("+")):
        raise AdapterError(
            f"{file} says it is of kind {header.kind}, but its header describes something else."
        )
    _check_alphas(file, header.heads, shapes, values)
    return header, values


def read_attached(folder: Path) -> tuple[AttachedHeader, dict[str, Tensor]]:
    """Header and alphas that coeffdiff.save wrote, every size checked before it is used. Raises: AdapterError."""
    file = folder / COEFF_FILE
    header, shapes, values = _read_described(file, AttachedHeader, ATTACHED_VERSION, tensors=True)
    _check_alphas(file, header.heads, shapes, values)
    return header, values


def _read_described(
    file: Path, schema: type[H], newest: int, tensors: bool
) -> tuple[H, dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """A file's header by its schema, the shapes of its tensors and, if asked for, their values."""
    metadata, shapes, values = _read_safetensors(file, tensors)
    if HEADER_KEY not in metadata:
        named = name_of_tensors(file)
        raise AdapterError(
            f"{file} was not written by coeffdiff: its header has no {HEADER_KEY!r} entry."
            + (f" It is {named}" if named else "")
        )
    try:
        raw = json.loads(metadata[HEADER_KEY])
        _refuse_other_kind(file, raw, schema)
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and newest < version < 10**6:
            raise AdapterError(
                f"{file} has format {version}; this coeffdiff reads up to {newest}. Update it."
            )
        return schema.model_validate(raw), shapes, values
    except (ValidationError, ValueError, RecursionError) as error:
        where = "its JSON"
        if isinstance(error, ValidationError):  # names a place, in which keys out of the file may stand
            place = [str(part) for part in error.errors()[0]["loc"]]
            where = (
                ".".join(place)
                if all(len(part) <= 100 and part.isprintable() for part in place)
                else place[0]
            )
        raise AdapterError(f"{file} has a damaged header ({where or 'its structure'}).") from None


def _refuse_other_kind(file: Path, raw: object, schema: type[BaseModel]) -> None:
    attached = isinstance(raw, dict) and raw.get("kind") == ATTACHED
    if attached and schema is AdapterHeader:
        raise AdapterError(
            f"{file} holds the alphas of one model, written by coeffdiff.save, and is no adapter of a pipeline: "
            "load it with coeffdiff.attach_from(model, folder)."
        )
    if not attached and schema is AttachedHeader and isinstance(raw, dict) and "base_model" in raw:
        raise AdapterError(
            f"{file} is an adapter for a pipeline of diffusers, not the alphas of one model: load it with "
            "coeffdiff.load_adapter(pipe, folder)."
        )


def _check_alphas(
    file: Path, heads: dict[str, int], shapes: dict[str, tuple[int, ...]], values: dict[str, Tensor]
) -> None:
    expected = {f"{layer}.alpha": (count, count) for layer, count in heads.items()}
    if shapes != expected:
        odd = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
        raise AdapterError(
            f"{file} does not hold what its header says: {odd} is missing, foreign or of another shape."
        )
    for key, tensor in values.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise AdapterError(f"{file}: {key} is not finite float32.")


def read_lora(
    folder: Path,
    header: AdapterHeader,
    check_shapes: Callable[[Mapping[str, tuple[int, ...]]], object] | None = None,
) -> dict[str, Tensor]:
    """The LoRA tensors that the header promises, or none.

    check_shapes: called with every tensor's shape by name before any is read; raises if they are not the host's.
    Raises: AdapterError if tensors are missing or not finite, and what check_shapes raises.
    """
    shapes = read_lora_shapes(folder, header)
    if not header.lora:
        return {}
    if check_shapes is not None:
        check_shapes(shapes)
    file = folder / LORA_FILE
    _, _, values = _read_safetensors(file, tensors=True)
    for key, tensor in values.items():
        if tensor.dtype not in _FLOATS or not tensor.isfinite().all():
            raise AdapterError(f"{file}: {key} holds something that is not a finite number.")
    return values


def read_lora_shapes(folder: Path, header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    """The shapes of the LoRA tensors that the header promises, or none; the tensors are not read.

    Raises: AdapterError for a file that is missing, damaged, unasked for, or of other text encoders.
    """
    file = folder / LORA_FILE
    if not header.lora:
        if file.exists():
            raise AdapterError(
                f"{file} does not belong here: {COEFF_FILE} says that this adapter has no LoRA."
            )
        return {}
    if not file.is_file():
        raise AdapterError(f"{folder} is incomplete: {LORA_FILE} is missing.")
    shapes = _read_safetensors(file, tensors=False)[1]
    if encoders_in(shapes) != encoders_in(f"{name}." for name in header.lora.encoders):
        found = " and ".join(encoders_in(shapes)) or "no text encoder"
        raise AdapterError(
            f"{file} has LoRA for {found}, where {COEFF_FILE} names {' and '.join(header.lora.encoders) or 'none'}."
        )
    return shapes


def read_rows(folder: Path, header: AdapterHeader) -> dict[str, Tensor]:
    """The rows of the learned token that the header promises, or none; of several by row_key.

    Raises: AdapterError if they are anything else.
    """
    file = folder / EMBEDS_FILE
    if not header.vectors:
        if file.exists():
            raise AdapterError(
                f"{file} does not belong here: {COEFF_FILE} says that this adapter has no learned token."
            )
        return {}
    if not file.is_file():
        raise AdapterError(f"{folder} is incomplete: {EMBEDS_FILE} is missing.")
    _, shapes, values = _read_safetensors(file, tensors=True)
    keys = [row_key(part, number) for number in range(len(header.named)) for part in header.base_family.keys]
    if shapes.keys() != set(keys) or any(len(s) != 2 or s[0] != header.vectors for s in shapes.values()):
        found = ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items())[:3])
        raise AdapterError(
            f"{file} does not hold {header.vectors} vectors {'each ' * (len(keys) > 1)}for {' and '.join(keys[:4])}, "
            f"as its adapter says, but {found or 'nothing'}."
        )
    for key, tensor in values.items():
        if tensor.dtype not in _FLOATS or not tensor.isfinite().all():
            raise AdapterError(f"{file}: {key} holds something that is not a finite number.")
    return values


def _read_safetensors(
    file: Path, tensors: bool
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, Tensor]]:
    try:
        size = file.stat().st_size
        refuse_large(str(file), file.name, size)
        with file.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if _LARGEST_HEADER < length <= size:  # beyond the file it is damage, which safetensors names
            raise AdapterError(
                f"{file} has a header of {length / 2**20:.0f} MiB; no {file.name} needs more than "
                f"{_LARGEST_HEADER // 2**20}."
            )
        with in_utf8(file) as named, safe_open(named, framework="pt", device="cpu") as opened:
            names = list(opened.keys())
            if not all(is_harmless(name) for name in names):
                raise AdapterError(f"{file} has a tensor name that is overlong or has control characters.")
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            values = {name: opened.get_tensor(name) for name in names} if tensors else {}
            return dict(opened.metadata() or {}), shapes, values
    except (
        SafetensorError,
        OSError,
        ValueError,
        OverflowError,
        RuntimeError,
        TypeError,
        UnicodeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "".join(filter(str.isprintable, reason[:200]))  # it may quote the file
        if other := no_tensors(file):
            raise AdapterError(f"{file} is {other}") from None
        raise AdapterError(
            f"{file} cannot be read; it is damaged or not a safetensors file ({reason})."
        ) from None


def rows_of(rows: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Of the rows of several learned tokens those of one, {"clip_l": [N, D], "clip_g": [N, D]}."""
    return {part: rows[row_key(part, number)] for part in PARTS if row_key(part, number) in rows}


def save_rows(folder: Path, rows: Mapping[str, Tensor]) -> None:
    """Write EMBEDS_FILE."""
    (folder / EMBEDS_FILE).write_bytes(pack_rows(rows))


def pack_rows(rows: Mapping[str, Tensor]) -> bytes:
    """The content of an EMBEDS_FILE, which diffusers' load_textual_inversion reads key by key, and A1111 and ComfyUI
    as an embedding."""
    tensors = {key: value.detach().float().cpu().contiguous() for key, value in rows.items()}
    content: bytes = save(tensors, metadata={"format": "pt"})
    return content


def alphas_of(layers: dict[str, Coefficients]) -> dict[str, Tensor]:
    """What a file holds of these layers: {"<layer>.alpha": [H, H] float32 on the CPU}."""
    return {f"{layer}.alpha": c.alpha.detach().float().cpu().contiguous() for layer, c in layers.items()}
