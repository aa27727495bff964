"""The header of alphas that coeffdiff.save took from one model: which class, which layers, how they were made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from coeffdiff.method.adapter_header import is_harmless
from coeffdiff.method.coefficients import Form

ATTACHED: Literal["attached"] = "attached"  # the kind in the file, which no adapter of a pipeline has
ATTACHED_VERSION = 1  # the newest format that is read


class AttachedHeader(BaseModel):
    """What a file of attached alphas says of itself. Text is bounded and printable, since files come from others."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    format_version: int = Field(ATTACHED_VERSION, ge=1, le=ATTACHED_VERSION)
    kind: Literal["attached"] = ATTACHED
    model_class: str = Field(min_length=1, max_length=200)
    model_type: str = Field(min_length=1, max_length=200)  # the architecture that several classes may share
    model_name: str = Field("", max_length=1000)  # a hub id or a folder; empty for a model without a name
    form: Form = "residual"
    heads: dict[str, int] = Field(min_length=1, max_length=10_000)  # layer name -> heads
    versions: dict[str, str] = Field({}, max_length=100)

    @field_validator("model_class", "model_type", "model_name", "heads", "versions")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        parts = [*value, *value.values()] if isinstance(value, dict) else [value]
        if not all(is_harmless(part) for part in parts if isinstance(part, str)):
            raise ValueError("text that is overlong or has control characters")
        return value
