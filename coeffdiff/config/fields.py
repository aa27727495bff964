"""The types of settings, and the section that holds them: unknown keys are refused, values are read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from coeffdiff.config import yaml12
from coeffdiff.config.annotations import union_members
from coeffdiff.method.families import SDXL
from coeffdiff.utils.paths import expanded
from coeffdiff.utils.text import has_surrogates

Auto = Literal["auto"]

SDXL_BASE = SDXL.usual_base
PLACEHOLDER = "<V>"  # stands for the token in prompts, captions and templates, as in the paper's figures
PLACEHOLDERS = r"<V(\d{0,4})>"  # with several tokens <V1>, <V2>
# What selects an adapter must not be what judges it: validation draws from the seeds below the first of
# evaluation, and none of its prompts is among evaluation's.
EVALUATION_FIRST_SEED = 100_000
VALIDATION_SEEDS = range(EVALUATION_FIRST_SEED)
VALIDATION_PROMPTS = ("a photo of {token} {class_word}", "a photo of {token} {class_word} at night")


def single_line(text: str) -> str:
    """The text with single blanks in place of all white space."""
    return " ".join(text.split())


def word_of(text: str | None) -> str | None:
    """A token or class word on one line. Raises: ValueError for one that is empty, overlong or cannot be seen."""
    text = None if text is None else single_line(text)
    if text is not None and not (0 < len(text) <= 100 and text.isprintable()):
        raise ValueError("it must be 1 to 100 visible characters")
    return text


def lines_of(templates: list[str]) -> list[str]:
    """Captions, each on one line. Raises: ValueError for one that is empty, overlong or cannot be seen."""
    templates = [single_line(template) for template in templates]
    if not all(0 < len(template) <= 1000 and template.isprintable() for template in templates):
        raise ValueError("each must be 1 to 1000 visible characters")
    return templates


def _above_zero(value: float | str) -> float | str:
    if not isinstance(value, str) and value <= 0:
        raise ValueError("must be above zero")
    if not isinstance(value, str) and value > 1e30:
        raise ValueError("must be at most 1e30, since what learns is float32")
    return value


Seed = Annotated[int, Field(ge=0, lt=2**63)]
AboveZero = Annotated[float | Auto, AfterValidator(_above_zero)]
Place = Annotated[Path, BeforeValidator(expanded)]
PlaceOrName = Annotated[str, BeforeValidator(expanded)]  # a hub id, or one of a few words, or a path


def _as_number(value: Any, kinds: list[Any]) -> Any:
    """`1e3` in quotes becomes a number where one is expected; true is none. kinds: types that the setting takes."""
    if str in kinds or not {int, float}.intersection(kinds):
        return value
    if isinstance(value, bool) and bool not in kinds:
        raise PydanticCustomError("boolean", "not a number")  # refusals.py words it for the user
    return yaml12.number(value.strip()) if isinstance(value, str) else value


class Section(BaseModel):
    """A part of a tree of settings: without unknown keys, infinite numbers and invalid text."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_and_lists(cls, value: Any, info: ValidationInfo) -> Any:
        """A single value where a list is expected becomes a list of one."""
        kinds = union_members(cls.model_fields[info.field_name or ""].annotation)
        items = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)
        if items is None:
            return _as_number(value, kinds)
        listed = [value] if isinstance(value, str | int | float) else value
        return (
            [_as_number(item, union_members(items)) for item in listed]
            if isinstance(listed, list)
            else listed
        )

    @field_validator("*")
    @classmethod
    def _possible_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path) and "\0" in str(text):
                raise ValueError("it has a zero byte")
            if isinstance(value, list) and isinstance(text, str) and has_surrogates(text):
                raise ValueError("it is not valid text")
        return value


S = TypeVar("S", bound=Section)
