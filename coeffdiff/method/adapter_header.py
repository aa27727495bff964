"""The header of an adapter: what its folder holds and how it was made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from coeffdiff.method.coefficients import Form, Mixes
from coeffdiff.method.families import FAMILIES, SDXL, Family, FamilyName
from coeffdiff.method.networks import TEXT_ENCODERS, encoders_in
from coeffdiff.method.number_formats import Quantized

Kind = Literal["coeff", "lora", "coeff+lora", "token", "coeff+token", "lora+token", "coeff+lora+token"]


FORMAT_VERSION = 4  # the newest that is read; format_for says which is written
OWN_VAE = "none"  # how a user asks for the base model's own VAE
WIDE = "none"  # how a user asks for a base model that is not quantized
MOST_VECTORS = 64  # of the 75 tokens that a prompt has room for
# Key in the file -> the pipeline's parts, of all families; the names that diffusers' own scripts write.
PARTS = {encoder.key: (encoder.network, encoder.tokenizer) for encoder in SDXL.encoders}


def format_for(
    mixes: Mixes,
    vae: str | None = None,
    family: FamilyName = "sdxl",
    *,
    text_encoders: bool = False,
    learned_tokens: int = 0,
) -> int:
    """The oldest format that says enough: readers of 1, which knew maps alone, must not take values for them, readers
    of 2 would draw with the base model's own VAE, whatever the adapter was trained with, and readers of 3 take every
    adapter for SDXL's, would look for the text encoders' layers in the UNet, and know one learned token."""
    if text_encoders or family != "sdxl" or learned_tokens > 1:
        return 4
    return 3 if vae else 2 if mixes == "values" else 1


def row_key(part: str, number: int) -> str:
    """The key of a learned token's rows in its file, for one of PARTS; number: of the token among several, from 0."""
    return f"{part}.{number}" if number else part


def is_harmless(text: str) -> bool:
    """Whether text out of a file may be shown: no terminal's escape sequences, no megabytes."""
    return len(text) <= 1000 and text.isprintable()


class LoraHeader(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    rank: int = Field(ge=1, le=1024)
    alpha: float = Field(gt=0)
    dora: bool = False
    encoders: tuple[str, ...] = Field(
        (), max_length=len(TEXT_ENCODERS)
    )  # those that it is on beside the UNet

    @field_validator("encoders")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not set(value) <= set(TEXT_ENCODERS):
            raise ValueError("a text encoder that no pipeline has")
        return value


class BaseHeader(BaseModel):
    """How the base model was opened, and what its networks were, to draw with the same again.

    vae: another VAE than the base model's, a hub id or an absolute path; config: what gave a single file its configs;
    quantize: how its linear layers were quantized; precision: of the run's own pictures; networks: by name, what
    fingerprints.py says of their weights.
    """

    model_config = ConfigDict(frozen=True)
    vae: str | None = Field(None, max_length=1000)
    config: str | None = Field(None, max_length=1000)
    variant: str | None = Field(None, max_length=100)
    quantize: Quantized | None = None
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    networks: dict[str, str] = Field({}, max_length=20)

    @property
    def described_vae(self) -> str:
        return f"the VAE {self.vae}" if self.vae else "the base model's own VAE"

    @field_validator("vae", "config", "variant", "networks")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        parts = [*value, *value.values()] if isinstance(value, dict) else [value or ""]
        if not all(map(is_harmless, parts)):
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
        if value and not is_harmless(value):
            raise ValueError("text that is overlong or has control characters")
        return value


class NamedSubject(BaseModel):
    """One of the subjects of an adapter that was trained on several."""

    model_config = ConfigDict(frozen=True)
    token: str = Field(min_length=1, max_length=200)
    class_word: str | None = Field(None, max_length=200)
    templates: tuple[str, ...] = Field((), max_length=1000)

    @field_validator("token", "class_word", "templates")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        if not all(map(is_harmless, [value] if isinstance(value, str) else value or ())):
            raise ValueError("text that is overlong or has control characters")
        return value


class AdapterHeader(BaseModel):
    """What an adapter says of itself. Text is bounded and printable, since it comes from files of others."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    kind: Kind
    family: FamilyName = "sdxl"  # of the base model
    base_model: str = Field(max_length=1000)
    token: str = Field(min_length=1, max_length=200)
    class_word: str | None = Field(None, max_length=200)
    templates: tuple[str, ...] = Field((), max_length=1000)
    form: Form = "residual"
    mixes: Mixes = "maps"  # values: no Coeff-Tuning but the control for it
    heads: dict[str, int] = Field({}, max_length=10_000)  # layer name -> heads; networks.py says whose layer
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
    # All of several subjects; token, class_word and templates are then those of the first. Readers that do not know
    # this field load such an adapter as well, as its words are ordinary ones
    subjects: tuple[NamedSubject, ...] = Field((), max_length=100)

    @property
    def base_family(self) -> Family:
        return FAMILIES[self.family]

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders that alpha or LoRA are on beside the UNet."""
        return encoders_in([*self.heads, *(f"{name}." for name in (self.lora.encoders if self.lora else ()))])

    @property
    def described(self) -> str:
        """The kind in words, for people."""
        text = ", text encoders too" if self.encoders else ""
        return f"{self.kind}{', mixing values' if self.mixes == 'values' else ''}{text}"

    @property
    def tokens(self) -> tuple[str, ...]:
        """The words that call its subjects: one, or those of several, or of the adapters that were merged."""
        merged = tuple(dict.fromkeys(part.token for part in self.merged))
        return merged or tuple(subject.token for subject in self.subjects) or (self.token,)

    @property
    def named(self) -> tuple[NamedSubject, ...]:
        """Its subjects, in order: one, or several."""
        alone = NamedSubject(token=self.token, class_word=self.class_word, templates=self.templates)
        return self.subjects or (alone,)

    @property
    def calls(self) -> tuple[str, ...]:
        """How prompts call each subject: its token and class word."""
        return tuple(" ".join(filter(None, (one.token, one.class_word))) for one in self.named)

    @field_validator("family")
    @classmethod
    def _family_in_time(cls, value: FamilyName, info: ValidationInfo) -> FamilyName:
        if format_for("maps", None, value) > info.data.get("format_version", FORMAT_VERSION):
            raise ValueError("another family than SDXL, which this format does not know")
        return value

    @model_validator(mode="after")
    def _encoders_in_time(self) -> AdapterHeader:
        if self.encoders and self.format_version < format_for("maps", text_encoders=True):
            raise ValueError("text encoders, which this format does not know")
        return self

    @field_validator("mixes")
    @classmethod
    def _said_in_time(cls, value: Mixes, info: ValidationInfo) -> Mixes:
        if format_for(value) > info.data.get("format_version", FORMAT_VERSION):
            raise ValueError("mixing values, which this format does not know")
        return value

    @field_validator("subjects")
    @classmethod
    def _learned_in_time(
        cls, value: tuple[NamedSubject, ...], info: ValidationInfo
    ) -> tuple[NamedSubject, ...]:
        learned = len(value) if info.data.get("vectors") else 0
        if format_for("maps", learned_tokens=learned) > info.data.get("format_version", FORMAT_VERSION):
            raise ValueError("several learned tokens, which this format does not know")
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
        if not all(is_harmless(part) for part in parts if isinstance(part, str)):
            raise ValueError("text that is overlong or has control characters")
        return value
