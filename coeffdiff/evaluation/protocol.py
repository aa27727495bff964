"""DreamBooth's protocol and drift beside it: what is asked of an adapter, and what it scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from coeffdiff.config.fields import EVALUATION_FIRST_SEED
from coeffdiff.data.photos import Photo
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.prompts import Prompts
from coeffdiff.sampling.options import Options, Request
from coeffdiff.utils.distributed import DistributedContext

# Of the class: every k-th, so the first six of fewer than twelve (to spread them better would be another FORMAT of
# comparisons' cells); of the unrelated all
DRIFT_PROMPTS = 6


THUMBNAIL = 288  # pixels; pages are for phones


ONE_PROCESS = DistributedContext()


OPTIONS = Options()


@dataclass(frozen=True)
class Subject:
    """Photos [M] and masks (one for each photo, or None) of what an adapter has learned, and how it is called."""

    name: str
    photos: Sequence[Photo]
    masks: Sequence[Image.Image | None]
    token: str
    class_word: str | None


@dataclass(frozen=True)
class Protocol:
    """What is asked for: `pictures` of each prompt for the subject, `drift_pictures` of each without the token.

    The p-th picture of the n-th prompt has the seed first_seed + n * pictures + p, whoever makes it, so that arms
    share their noise and no two prompts of a group do (the subject's, its class's, the unrelated).
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


@dataclass(frozen=True)
class Seen:
    """A picture that was made, as the encoders see it ([D] each), and small, as JPEG."""

    features: Mapping[str, Tensor]
    thumbnail: bytes


@dataclass(frozen=True)
class Scored:
    """data: plain values, see score_adapter. thumbnails: JPEG by "subject-3", "drift-0", "base-0", ..."""

    data: dict[str, Any]
    thumbnails: dict[str, bytes]


@dataclass(frozen=True)
class Evaluation:
    """What evaluate() leaves. results is what its JSON file holds."""

    folder: Path
    numbers: Path
    table: Path
    report: Path
    results: dict[str, Any] = field(default_factory=dict)
