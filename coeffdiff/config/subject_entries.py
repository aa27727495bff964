"""One of several subjects of a run, and what several must have to be learned together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from coeffdiff.config.fields import Place, Section, lines_of, word_of


class SubjectEntry(Section):
    """One of several subjects, as a file of --subjects lists them."""

    images: Place | None = Field(None, description="folder with its photos")
    token: str | None = Field(None, description="the word that will mean it", examples=["ohwx"])
    class_word: str | None = Field(None, description="what it is", examples=["mug"])
    templates: list[str] | None = Field(
        None, min_length=1, description="captions for photos without their own; null: subject.templates"
    )
    prior_images: Place | None = Field(
        None,
        description="folder with pictures of its class, in place of prior.images; for all subjects or none",
    )

    _words = field_validator("token", "class_word")(word_of)

    @field_validator("templates")
    @classmethod
    def _lines(cls, templates: list[str] | None) -> list[str] | None:
        return None if templates is None else lines_of(templates)


def check_apart(subjects: Sequence[SubjectEntry]) -> None:
    """Raises: ValueError for subjects that no prompt could tell apart, or of which only some have pictures."""
    tokens = [entry.token for entry in subjects if entry.token]
    for one, other in itertools.permutations(tokens, 2):
        if re.search(rf"(?<!\w){re.escape(one)}(?!\w)", other, re.IGNORECASE):
            what = f"two subjects have the token {one}"
            if one.lower() != other.lower():
                what = f"the token {one} of one subject is a word of {other}, another's"
            raise ValueError(f"{what}; a prompt could not tell them apart, so give each a word of its own")
    folders = [entry.prior_images for entry in subjects if entry.prior_images]
    if folders and len(folders) < len(subjects):
        raise ValueError("some subjects have prior_images and others have not; give them to all or to none")


class BatchEntry(SubjectEntry):
    """A subject of a batch, which trains each by itself."""

    name: str | None = Field(
        None, description="of its run folder; null: that of the folder with its photos", examples=["mug"]
    )
    set: dict[str, Any] = Field(
        {}, description="settings of its own, by dotted name", examples=[{"training.steps": 300}]
    )

    @field_validator("name")
    @classmethod
    def _a_folders_name(cls, name: str | None) -> str | None:
        if name is None:
            return None
        name = word_of(name) or ""
        if not can_name_a_folder(name):
            raise ValueError('it must be able to name a folder: no dot first, none of / \\ : * ? " < > |')
        return name


def can_name_a_folder(name: str) -> bool:
    """Whether a run's folder may have this name, on any system; hidden ones are none."""
    return bool(name) and name[0] != "." and not re.search(r'[/\\:*?"<>|]', name)
