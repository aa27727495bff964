"""The adapter folder: written whole or not at all, checked before use, and seen to have been applied.

coeff.safetensors                 alpha per layer and the header that makes the folder self-describing
pytorch_lora_weights.safetensors  with LoRA only, in diffusers' stock layout
learned_embeds.safetensors        with a learned token only; diffusers' load_textual_inversion reads it
README.md                         a model card
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.files import appearing, in_utf8
from coeffdiff.method import finding
from coeffdiff.method.coefficients import Coefficients, Form, Mixes
from coeffdiff.method.finding import find_adapter
from coeffdiff.method.guard import unwatch, verify, watch
from coeffdiff.method.home import enter, leave, verify_home
from coeffdiff.method.injection import attention_layers, coefficients_of, eject, inject, set_scale, unwrapped
from coeffdiff.method.lora import (
    LORA_FILE,
    check_lora,
    check_removable,
    check_settable,
    load_lora,
    remove_lora,
    save_lora,
    set_lora_scale,
)
from coeffdiff.method.token import (
    EMBEDS_FILE,
    MOST_VECTORS,
    PARTS,
    TokenPart,
    add_token,
    remove_token,
    save_rows,
    switch_token,
    verify_token,
)

Kind = Literal["coeff", "lora", "coeff+lora", "token", "coeff+token", "lora+token", "coeff+lora+token"]

COEFF_FILE = finding.COEFF_FILE
FORMAT_VERSION = 3  # the newest that is read; format_for says which is written
OWN_VAE = "none"  # how a person asks for the base model's own VAE
_KEY = finding.HEADER_KEY
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = {
    COEFF_FILE: 64 * 2**20,
    LORA_FILE: 8 * 2**30,
    EMBEDS_FILE: 16 * 2**20,
}  # bytes; SDXL needs 0.2 MB, at most 6 GB (rank 1024) and 8 KB a vector
_LARGEST_HEADER = (
    4 * 2**20
)  # bytes of names, shapes and metadata, which cost some thirty times as much to parse


def format_for(mixes: Mixes, vae: str | None = None) -> int:
    """The oldest format that says enough: readers of 1, which knew maps alone, must not take values for them, and
    readers of 2 would draw with the base model's own VAE, whatever the adapter was trained with."""
    return 3 if vae else 2 if mixes == "values" else 1


def _harmless(text: str) -> bool:
    """Whether text out of a file may be shown: no terminal's escape sequences, no megabytes."""
    return len(text) <= 1000 and text.isprintable()


class LoraHeader(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    rank: int = Field(ge=1, le=1024)
    alpha: float = Field(gt=0)
    dora: bool = False


class BaseHeader(BaseModel):
    """How the base model was opened, and what its networks were, to draw with the same again.

    vae: another VAE than the base model's, a hub id or an absolute path; config: what gave a single file its configs;
    precision: of the run's own pictures; networks: by name, what fingerprints.py says of their weights.
    """

    model_config = ConfigDict(frozen=True)
    vae: str | None = Field(None, max_length=1000)
    config: str | None = Field(None, max_length=1000)
    variant: str | None = Field(None, max_length=100)
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    networks: dict[str, str] = Field({}, max_length=20)

    @property
    def described_vae(self) -> str:
        return f"the VAE {self.vae}" if self.vae else "the base model's own VAE"

    @field_validator("vae", "config", "variant", "networks")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        parts = [*value, *value.values()] if isinstance(value, dict) else [value or ""]
        if not all(map(_harmless, parts)):
            raise ValueError("text that is overlong or has control characters")
        return value


class MergedPart(BaseModel):
    """One of the adapters that were merged into this one, and the scale that it went in with."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    token: str = Field(min_length=1, max_length=200)
    class_word: str | None = Field(None, max_length=200)
    kind: Literal["coeff", "lora", "coeff+lora"]
    trained_steps: int = Field(ge=0)
    scale: float

    @field_validator("token", "class_word")
    @classmethod
    def _printable(cls, value: str | None) -> str | None:
        if value and not _harmless(value):
            raise ValueError("text that is overlong or has control characters")
        return value


class AdapterHeader(BaseModel):
    """What an adapter says of itself. Text is bounded and printable, since it comes from files of others."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    kind: Kind
    base_model: str = Field(max_length=1000)
    token: str = Field(min_length=1, max_length=200)
    class_word: str | None = Field(None, max_length=200)
    templates: tuple[str, ...] = Field((), max_length=1000)
    form: Form = "residual"
    mixes: Mixes = "maps"  # values: no Coeff-Tuning but the control for it
    heads: dict[str, int] = Field({}, max_length=10_000)  # layer name -> heads
    lora: LoraHeader | None = None
    vectors: int = Field(0, ge=0, le=MOST_VECTORS)  # of the learned token; 0: the token is an ordinary word
    trained_steps: int = Field(ge=0, le=10**9)
    # Steps that the run made, if the adapter was chosen among those of its validations; otherwise trained_steps
    run_steps: int | None = Field(None, ge=0, le=10**9)
    resolution: int = Field(ge=1, le=10**6)
    recommended_scale: float = 1.0
    versions: dict[str, str] = Field({}, max_length=100)
    base: BaseHeader | None = None  # nothing in adapters of older versions
    merged: tuple[MergedPart, ...] = Field((), max_length=100)

    @property
    def described(self) -> str:
        """The kind in words, for people."""
        return f"{self.kind}, mixing values" if self.mixes == "values" else self.kind

    @property
    def tokens(self) -> tuple[str, ...]:
        """The words that call its subjects: one, or those of the adapters that were merged."""
        return tuple(dict.fromkeys(part.token for part in self.merged)) or (self.token,)

    @field_validator("mixes")
    @classmethod
    def _said_in_time(cls, value: Mixes, info: ValidationInfo) -> Mixes:
        if format_for(value) > info.data.get("format_version", FORMAT_VERSION):
            raise ValueError("mixing values, which this format does not know")
        return value

    @field_validator("base")
    @classmethod
    def _vae_in_time(cls, value: BaseHeader | None, info: ValidationInfo) -> BaseHeader | None:
        if (
            value
            and value.vae
            and info.data.get("format_version", FORMAT_VERSION) < format_for("maps", value.vae)
        ):
            raise ValueError("another VAE, which this format does not know")
        return value

    @field_validator("base_model", "token", "class_word", "templates", "heads", "versions")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else list(value or ())
        if isinstance(value, dict):
            parts += list(value.values())
        if not all(_harmless(part) for part in parts if isinstance(part, str)):
            raise ValueError("text that is overlong or has control characters")
        return value


class Adapter:
    """An adapter that has been applied to a pipeline: switch it with set_scale, take it off with remove."""

    def __init__(self, pipe: Any, name: str, path: Path, header: AdapterHeader) -> None:
        self.header, self.path, self.name = header, path, name
        self._scale = 1.0
        self._unet = unwrapped(pipe.unet)
        self._home: Any = weakref.ref(pipe) if hasattr(pipe, "__weakref__") else None
        self._pipe = (
            pipe if header.vectors else None
        )  # a token lives there; a copy of the UNet need not copy it

    @property
    def scale(self) -> float:
        """What set_scale set. Raises: InjectionError if something else has parted alpha, LoRA and token since."""
        if self._present():
            self.verify()
        return self._scale

    def set_scale(self, scale: float) -> None:
        """Use I + scale * alpha and scale * LoRA. 0 gives the base model bit for bit (if nothing else is loaded).

        A learned token has no scale: it is read as it was learned, at 0 as the ordinary word that it was before.
        A LoRA that something else has switched off or rescaled is then on again, beside those that are.
        Raises: InjectionError if a part is gone, or the LoRA is fused into the weights. Nothing has changed then.
        """
        if not math.isfinite(scale):
            raise AdapterError(f"The scale of {self.path} must be a finite number, not {scale}.")
        self._check_loaded()
        verify_home(self._home and self._home(), self._unet)
        if self.header.lora:
            check_settable(self._unet, self.name, scale)
        set_scale(self._unet, scale, self.name)
        if self.header.lora:
            set_lora_scale(self._unet, self.name, scale)
        if self.header.vectors:
            switch_token(self._pipe, self.name, on=scale != 0)
        self._scale = scale

    def remove(self) -> None:
        """Take alpha, LoRA and token off; UNet, text encoders and pipeline have their original parts again.

        Raises: InjectionError if the LoRA is fused into the weights. Nothing has changed then.
        """
        self._check_loaded()
        if self.header.lora:
            check_removable(self._unet, self.name)
        eject(self._unet, self.name)
        if self.header.lora:
            remove_lora(self._unet, self.name)
        if self.header.vectors:
            unwatch(self._unet, f"token {self.name}")
            remove_token(self._pipe, self.name)
        del _loaded(self._unet)[self.name]
        if not _loaded(self._unet):
            leave(self._home and self._home(), self._unet)

    def verify(self) -> None:
        """Raises: InjectionError if a part is no longer what set_scale made it.

        Displaced alpha (attention slicing, an IP-Adapter...), LoRA that is off, rescaled or unloaded, a token that the
        pipeline would not read. The same is compared before each forward of the UNet.
        """
        self._check_loaded()
        verify(self._unet)

    def verify_text(self, pipe: Any) -> None:
        """Raises: InjectionError if this pipeline, which is to encode prompts, would not read the learned token."""
        if self.header.vectors and self._scale:
            verify_token(pipe, self.name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_home": None}  # a copy's pipeline is not this one

    def _present(self) -> bool:
        return _loaded(self._unet).get(self.name) is self

    def _check_loaded(self) -> None:
        if not self._present():
            raise AdapterError(f"{self.path} has been removed from this pipeline; load it again.")


def load_adapter(
    pipe: Any, path: str | Path, scale: float | None = None, *, backend: str = "auto"
) -> Adapter:
    """Apply an adapter (alpha, LoRA and learned token) to a StableDiffusionXLPipeline.

    Args:
        pipe: anything with an SDXL `unet`; for a learned token also with its text encoders and tokenizers.
        path: a run folder, an adapter folder, a checkpoint, a file in one of them, or a step of a run: runs/a@200.
        scale: how strongly it is applied; by default what the adapter recommends.
        backend: of mixed attention; see attention.choose_backend.
    Returns: the applied adapter. Several may be loaded, of any kinds; they add up: on each layer
        coeff = I + sum of scale_i * alpha_i, and to each weight the sum of scale_i * LoRA_i. Those that mix values
        have a coeff of their own, and mixed maps meet mixed values.
    Raises: AdapterError if the files are missing, damaged or hostile, or the token is taken by a loaded adapter;
        AdapterMismatch if they are sound but belong to another architecture. The pipeline is then as before.
    """
    folder = find_adapter(path)
    header, alphas = read_coefficients(folder)
    rows = read_rows(folder, header)
    unet = unwrapped(pipe.unet)
    check_architecture(unet, header, folder)
    lora = read_lora(folder, header, unet)
    others = _loaded(unet)
    for other in others.values():
        check_apart((folder, header), (other.path, other.header))
    taken = {*others, *getattr(unet, "peft_config", {})}
    name = next(f"coeffdiff_{n}" for n in range(len(taken) + 1) if f"coeffdiff_{n}" not in taken)
    adapter = Adapter(pipe, name, folder, header)
    try:
        if alphas:
            layers = inject(
                unet, name, layers=list(header.heads), form=header.form, backend=backend, mixes=header.mixes
            )
            fill_alphas(layers, alphas)
            for coefficients in layers.values():
                coefficients.requires_grad_(False)
        if header.lora:
            load_lora(unet, lora, name, **header.lora.model_dump(), origin=str(folder / LORA_FILE))
        if rows:
            add_token(pipe, header.token, rows, name, origin=str(folder / EMBEDS_FILE))
            watch(unet, f"token {name}", TokenPart(pipe, name, str(folder)))
        others[name] = adapter
        enter(pipe)
        adapter.set_scale(header.recommended_scale if scale is None else scale)
        adapter.verify()
    except BaseException:
        eject(unet, name)
        remove_lora(unet, name)
        unwatch(unet, f"token {name}")
        remove_token(pipe, name)
        others.pop(name, None)
        if not others:
            leave(pipe, unet)
        raise
    return adapter


def check_apart(one: tuple[Path, AdapterHeader], other: tuple[Path, AdapterHeader]) -> None:
    """Raises: AdapterError unless these two may be loaded beside each other: the same one twice, or of one word."""
    (folder, header), (path, before) = one, other
    shared = [token for token in header.tokens if token.lower() in map(str.lower, before.tokens)]
    of_one_run = finding.same_run(folder, path)
    if finding.same_adapter(folder, path) or (of_one_run and header.trained_steps == before.trained_steps):
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
    return list(_loaded(unwrapped(pipe.unet)).values())


def save_adapter(
    folder: Path,
    unet: nn.Module,
    header: AdapterHeader,
    extras: Mapping[str, bytes] | None = None,
    name: str = "default",
    rows: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter folder under a temporary name beside it, then rename: it is there whole or not at all.

    extras: further files by name, such as the model card and its pictures.
    rows: of the learned token, if the header has one.
    """
    with appearing(folder, durable=True) as temporary:
        write_adapter(temporary, unet, header, extras, name, rows)


def write_adapter(
    folder: Path,
    unet: nn.Module,
    header: AdapterHeader,
    extras: Mapping[str, bytes] | None = None,
    name: str = "default",
    rows: Mapping[str, Tensor] | None = None,
) -> None:
    """save_adapter for a folder that is not there yet and appears later, as a part of another."""
    folder.mkdir()
    alphas = alphas_of(coefficients_of(unet, name))
    (folder / COEFF_FILE).write_bytes(pack_coefficients(alphas, header))
    if header.lora:
        save_lora(unet, folder, name)
    if header.vectors:
        save_rows(folder, rows or {})
    for file, extra in (extras or {}).items():
        (folder / file).write_bytes(extra)


def pack_coefficients(alphas: dict[str, Tensor], header: AdapterHeader) -> bytes:
    """The content of a COEFF_FILE: alphas as of alphas_of, and the header that describes the folder."""
    content: bytes = save(alphas, metadata={"format": "pt", _KEY: header.model_dump_json()})
    return content


def alphas_of(layers: dict[str, Coefficients]) -> dict[str, Tensor]:
    """What a file holds of these layers: {"<layer>.alpha": [H, H] float32 on the CPU}."""
    return {f"{layer}.alpha": c.alpha.detach().float().cpu().contiguous() for layer, c in layers.items()}


@torch.no_grad()
def fill_alphas(layers: dict[str, Coefficients], alphas: dict[str, Tensor]) -> None:
    """Copy alphas into their layers. Raises: AdapterError if one of either side has no counterpart."""
    unmatched = {f"{layer}.alpha" for layer in layers} ^ set(alphas)
    if unmatched:
        raise AdapterError(f"{sorted(unmatched)[0]} has no counterpart ({len(unmatched)} in all).")
    for layer, coefficients in layers.items():
        coefficients.alpha.copy_(alphas[f"{layer}.alpha"])


def read_header(folder: Path) -> AdapterHeader:
    """The header alone, without reading the tensors. Raises: AdapterError."""
    return read_coefficients(folder, tensors=False)[0]


def read_coefficients(folder: Path, tensors: bool = True) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Header and alphas of an adapter folder, every size checked before it is used. Raises: AdapterError."""
    file = folder / COEFF_FILE
    metadata, shapes, values = _read_safetensors(file, tensors)
    if _KEY not in metadata:
        raise AdapterError(f"{file} was not written by coeffdiff: its header has no {_KEY!r} entry.")
    try:
        raw = json.loads(metadata[_KEY])
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and FORMAT_VERSION < version < 10**6:
            raise AdapterError(
                f"{file} has format {version}; this coeffdiff reads up to {FORMAT_VERSION}. Update it."
            )
        header = AdapterHeader.model_validate(raw)
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
    holds = {"coeff": bool(header.heads), "lora": bool(header.lora), "token": bool(header.vectors)}
    if {part for part, held in holds.items() if held} != set(header.kind.split("+")):
        raise AdapterError(
            f"{file} says it is of kind {header.kind}, but its header describes something else."
        )
    expected = {f"{layer}.alpha": (heads, heads) for layer, heads in header.heads.items()}
    if shapes != expected:
        odd = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
        raise AdapterError(
            f"{file} does not hold what its header says: {odd} is missing, foreign or of another shape."
        )
    for key, tensor in values.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise AdapterError(f"{file}: {key} is not finite float32.")
    return header, values


def read_lora(folder: Path, header: AdapterHeader, unet: nn.Module | None = None) -> dict[str, Tensor]:
    """The LoRA tensors that the header promises, or none; with a unet every shape is checked before it is read.

    Raises: AdapterError if they are missing or not finite, AdapterMismatch if they belong to another UNet.
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
    if unet is not None:
        _, shapes, _ = _read_safetensors(file, tensors=False)
        check_lora(unet, shapes, rank=header.lora.rank, dora=header.lora.dora, origin=str(file))
    _, _, values = _read_safetensors(file, tensors=True)
    for key, tensor in values.items():
        if tensor.dtype not in _FLOATS or not tensor.isfinite().all():
            raise AdapterError(f"{file}: {key} holds something that is not a finite number.")
    return values


def read_rows(folder: Path, header: AdapterHeader) -> dict[str, Tensor]:
    """The learned token's rows that the header promises, or none. Raises: AdapterError if they are anything else."""
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
    if shapes.keys() != PARTS.keys() or any(len(s) != 2 or s[0] != header.vectors for s in shapes.values()):
        found = ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items())[:3])
        raise AdapterError(
            f"{file} does not hold {header.vectors} vectors each for {' and '.join(PARTS)}, as its adapter says, but "
            f"{found or 'nothing'}."
        )
    for key, tensor in values.items():
        if tensor.dtype not in _FLOATS or not tensor.isfinite().all():
            raise AdapterError(f"{file}: {key} holds something that is not a finite number.")
    return values


def check_architecture(unet: nn.Module, header: AdapterHeader, folder: Path) -> None:
    """Raise AdapterMismatch unless the UNet (weights or none) has the header's layers with as many heads."""
    layers = attention_layers(unet)
    for name, heads in header.heads.items():
        found = layers[name].heads if name in layers else None
        if found != heads:
            there = f"this UNet has {found} heads there" if found else "this UNet has no such layer"
            raise AdapterMismatch(
                f"{folder} has {heads} x {heads} coefficients for {name}, but {there}. The adapter was trained on "
                f"{header.base_model}; use that, or a fine-tune of it, as the model."
            )


def _read_safetensors(
    file: Path, tensors: bool
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, Tensor]]:
    try:
        size = file.stat().st_size
        if size > _LARGEST[file.name]:
            raise AdapterError(f"{file} has {size / 2**20:.0f} MiB; no {file.name} is that large.")
        with file.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if _LARGEST_HEADER < length <= size:  # beyond the file it is damage, which safetensors names
            raise AdapterError(
                f"{file} has a header of {length / 2**20:.0f} MiB; no {file.name} needs more than "
                f"{_LARGEST_HEADER // 2**20}."
            )
        with in_utf8(file) as named, safe_open(named, framework="pt", device="cpu") as opened:
            names = list(opened.keys())
            if not all(_harmless(name) for name in names):
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
        raise AdapterError(
            f"{file} cannot be read; it is damaged or not a safetensors file ({reason})."
        ) from None


def _loaded(unet: Any) -> dict[str, Adapter]:
    if not hasattr(unet, "_coeffdiff_adapters"):
        unet._coeffdiff_adapters = {}
    registry: dict[str, Adapter] = unet._coeffdiff_adapters
    return registry
