"""DreamBooth's protocol plus drift: the pictures to be made for an adapter, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from coeffdiff.config.fields import EVALUATION_FIRST_SEED
from coeffdiff.data.photos import Photo
from coeffdiff.data.templates import fill
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.prompts import Prompts, without_token
from coeffdiff.sampling.options import Options, Request

# Of the class every k-th, so the first six of fewer than twelve (a better spread would need another FORMAT of the
# comparison's cells); of the unrelated all
DRIFT_PROMPTS = 6


THUMBNAIL = 288  # pixels a side; pages are read on phones


OPTIONS = Options()


@dataclass(frozen=True)
class Subject:
    """What an adapter has learned: M photos, a mask or None for each, and the words that name it."""

    name: str
    photos: Sequence[Photo]
    masks: Sequence[Image.Image | None]
    token: str
    class_word: str | None


@dataclass(frozen=True)
class Protocol:
    """How many pictures of which prompts: `pictures` of each with the token, `drift_pictures` of each without.

    The p-th picture of the n-th prompt has the seed first_seed + n * pictures + p, so that the methods of a
    comparison share their noise, and two prompts of a group (subject, class, unrelated) do not.
    """

    prompts: Prompts
    pictures: int = 4
    drift_pictures: int = 2
    first_seed: int = EVALUATION_FIRST_SEED
    options: Options = OPTIONS

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ConfigError(f"An evaluation needs at least 1 picture of each prompt, not {self.pictures}.")
        if self.drift_pictures < 0:
            raise ConfigError(f"There cannot be {self.drift_pictures} pictures of a prompt.")
        if self.first_seed < EVALUATION_FIRST_SEED:
            raise ConfigError(
                f"The seeds of evaluation begin at {EVALUATION_FIRST_SEED}, those below are training's and "
                f"validation's; {self.first_seed} is one of them."
            )


@dataclass(frozen=True)
class Asked:
    """A picture to be made. group: subject, class or unrelated; text: the prompt without the token."""

    group: str
    prompt: str
    text: str
    seed: int

    @property
    def request(self) -> Request:
        return Request(self.prompt, self.seed)


def asked_for(protocol: Protocol, token: str, class_word: str | None, *, known: bool = True) -> list[Asked]:
    """Every picture of an evaluation, in order.

    known: whether the model knows the token. The base model does not; its prompts name only the class.
    """
    prompts = [fill(template, token, class_word) for template in protocol.prompts.subject]
    texts = [without_token(prompt, token) for prompt in prompts]
    asked = _seeded("subject", prompts if known else texts, texts, protocol.pictures, protocol.first_seed)
    if known and (count := protocol.drift_pictures):
        of_class = texts[:: max(1, len(texts) // DRIFT_PROMPTS)][:DRIFT_PROMPTS] if class_word else []
        unrelated = protocol.prompts.unrelated
        asked += _seeded("class", of_class, of_class, count, protocol.first_seed)
        asked += _seeded("unrelated", unrelated, unrelated, count, protocol.first_seed)
    return asked


def _seeded(
    group: str, prompts: Sequence[str], texts: Sequence[str], count: int, first_seed: int
) -> list[Asked]:
    """`count` pictures of each prompt, each with a seed of its own."""
    return [
        Asked(group, prompt, text, first_seed + number * count + i)
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        for i in range(count)
    ]


@dataclass(frozen=True)
class Seen:
    """A picture's features by encoder, [D] each, and its thumbnail as JPEG."""

    features: Mapping[str, Tensor]
    thumbnail: bytes


@dataclass(frozen=True)
class Scored:
    """data: plain values, see score_adapter. thumbnails: JPEG by "subject-3", "drift-0", "base-0", ..."""

    data: dict[str, Any]
    thumbnails: dict[str, bytes]


@dataclass(frozen=True)
class Evaluation:
    """The files that evaluate() writes. results: the contents of the JSON file."""

    folder: Path
    numbers: Path
    table: Path
    report: Path
    results: dict[str, Any] = field(default_factory=dict)
