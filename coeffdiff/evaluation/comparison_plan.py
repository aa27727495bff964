"""The plan of a comparison: subjects, arms, and the settings that decide a cell."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from coeffdiff.config.fields import PlaceOrName, Section, Seed
from coeffdiff.config.nested import as_tree, flattened
from coeffdiff.config.schema import ModelSettings, Settings
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.evaluation.prompts import LISTING, read_listing
from coeffdiff.evaluation.protocol import Protocol, Subject
from coeffdiff.pocket.world import subjects
from coeffdiff.utils.atomic import atomic_write

FORMAT = 1  # of a cell; goes up when the same key would mean other numbers


SEED_DISTANCE = 10_000  # between the first seeds of the pictures of two training seeds


# What a training setting may differ in without a number of a cell changing.
INDIFFERENT = (
    "model.",  # its weights count, not where they lie
    "subject.images",
    "photos.cache",
    "training.steps",  # a cell has its own
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_adapters_every",
    "training.log_every",
    "validation.",
    "tracking.",
    "output",
)


ENDLESS = ("constant", "constant_with_warmup")  # schedules that know nothing of the steps to come


# What compare says itself, for every arm alike
_OWN = (
    "model.", "subject.images", "subject.token", "subject.class_word", "training.seed", "validation.", "output",
)  # fmt: skip


class Comparison(Section):
    """What is to be compared; a plan file holds it as YAML."""

    model: ModelSettings = ModelSettings()
    subjects: PlaceOrName = Field(
        "dev",
        description="of pocket's own dev, eval, fresh:N (fresh:N@SEED) or names with commas between them; or a folder: "
        "a data set in DreamBooth's layout, a folder of folders of photos, or one folder of photos",
    )
    token: str = Field("sks", description="the word that means the subject, in every arm")
    class_word: str | None = Field(None, description="of subjects for which no list of classes has one")
    arms: dict[str, dict[str, Any] | None] = Field(
        {
            "base": None,
            "lora": {"method.kind": "lora"},
            "coeff": {"method.kind": "coeff"},
            "coeff+lora": {"method.kind": "coeff+lora"},
        },
        min_length=1,
        description="name -> settings of training, by dotted name; null is the model without an adapter. Arms named "
        "`lora 1e-3` and `lora 3e-3` are tries of `lora`, of which the report names the best",
        examples=[{"lora": {"method.kind": "lora", "method.lora.rank": 4}}],
    )
    settings: dict[str, Any] = Field(
        {},
        description="settings of every arm that trains, by dotted name",
        examples=[{"training.steps": 500}],
    )
    reference: str = Field("lora", description="arm that the others are paired with")
    seeds: list[Seed] = Field([0, 1], min_length=1, description="of training; pictures have others by each")
    checkpoints: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="steps at which adapters are scored besides the last", examples=[[100]]
    )
    scales: list[float] = Field([1.0], min_length=1, description="that adapters are scored at")
    prompts: PlaceOrName = Field("auto", description="as in evaluate")
    limit: int | None = Field(10, ge=1, description="at most so many prompts, spread over the list")
    pictures: int = Field(1, ge=1, description="for each prompt")
    drift_pictures: int = Field(1, ge=0, description="for each prompt without the token")
    denoising_steps: int = Field(25, ge=1, description="of every picture")
    guidance: float = Field(5.0, ge=0, description="classifier-free guidance of every picture")
    batch_size: int = Field(5, ge=1, description="pictures made at a time")
    dino: PlaceOrName | None = Field(None, description="as in evaluate")
    clip: PlaceOrName | None = Field(None, description="as in evaluate")

    @field_validator("seeds", "checkpoints", "scales")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError("it names a value twice")
        return values

    @model_validator(mode="after")
    def _arms_are_comparable(self) -> Comparison:
        for given in (self.settings, *self.arms.values()):
            own = next((name for name in flattened(given or {}) if name.startswith(_OWN)), None)
            if own:
                raise ValueError(
                    f"{own} cannot be set for arms: the comparison says it, and for all of them alike"
                )
        if self.reference not in self.arms:
            raise ValueError(f"the reference {self.reference!r} is none of the arms {', '.join(self.arms)}")
        return self

    def only(self, arms: Sequence[str]) -> Comparison:
        """The same with these arms and the reference. Raises: ConfigError for an arm that it has not."""
        for arm in arms:
            if arm not in self.arms:
                raise ConfigError(f"The plan has no arm {arm!r}; it has {', '.join(self.arms)}.")
        kept = {arm: given for arm, given in self.arms.items() if arm in (*arms, self.reference)}
        return self.model_copy(update={"arms": kept})


@dataclass(frozen=True)
class ComparisonSubject:
    """A subject of a comparison. identity: what tells its photos from others', the same on every machine."""

    name: str
    folder: Path
    class_word: str | None
    identity: str
    made_up: subjects.Subject | None = None

    def write_photos(self) -> None:
        """Of one of pocket's own, if they are not there yet."""
        if self.made_up and not self.folder.is_dir():
            with atomic_write(self.folder) as unfinished:
                subjects.write_photos(self.made_up, unfinished, masks=True)


@dataclass(frozen=True)
class Point:
    """Where an adapter is looked at."""

    steps: int
    scale: float


@dataclass(frozen=True)
class Job:
    """An arm on a subject with a seed. settings: resolved, of its training; None for the bare model."""

    arm: str
    sitter: ComparisonSubject
    seed: int
    settings: Settings | None
    protocol: Protocol
    points: tuple[Point, ...]
    key: str  # of all that decides the training

    @property
    def label(self) -> str:
        return f"{self.sitter.name}, {self.arm}, seed {self.seed}"

    @property
    def end(self) -> Point:
        """What the arm is judged by: its last step, at the scale nearest to 1."""
        last = max(point.steps for point in self.points)
        return min(
            (point for point in self.points if point.steps == last), key=lambda point: abs(point.scale - 1.0)
        )


@dataclass(frozen=True)
class Outcome:
    """What compare() leaves. results is what comparison.json holds; missing names cells that are not there."""

    folder: Path
    report: Path
    results: dict[str, Any]
    missing: list[str]


def deciding(settings: Settings) -> dict[str, Any]:
    """The resolved settings that decide what a training comes to; those of methods that take no part are left out."""
    kind = settings.method.kind
    learning = {"coeff": "coeff" in kind, "lora": "lora" in kind, "token": settings.learns_token}
    idle = tuple(f"method.{name}." for name, learns in learning.items() if not learns)
    flat = flattened(as_tree(settings))
    found = {name: value for name, value in flat.items() if not name.startswith((*INDIFFERENT, *idle))}
    if settings.training.lr_schedule not in ENDLESS:
        found["training.steps"] = settings.training.steps
    if settings.prior.images:
        found["prior.images"] = [photo.identity for photo in read_photos(settings.prior.images).photos]
    return found


def find_subjects(wanted: str, class_word: str | None, output: Path) -> Iterator[ComparisonSubject]:
    """The subjects that a plan names; the photos of pocket's own, once they are written, lie below `output`.

    Raises: ConfigError or PhotoError for what there is not.
    """
    own, root = subject_named(wanted)
    if own:
        for subject in own:
            folder = output / "work" / "photos" / subject.name
            yield ComparisonSubject(
                subject.name, folder, subject.class_word, repr(_rounded(subject)), subject
            )
        return
    listing = read_listing(root)  # in it, or beside it where it is one subject's folder
    classes = listing.classes if listing else {}
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    if listing and listing.file.parent == root:
        folders = [folder for folder in folders if folder.name in classes]
        if not folders:
            raise PhotoError(f"None of the subjects that {root / LISTING} names has a folder in {root}.")
    for folder in folders or [root]:
        own_class = classes.get(folder.name) or class_word
        identity = hash_of([photo.identity for photo in read_photos(folder).photos])
        yield ComparisonSubject(folder.name, folder, own_class, identity)


def _rounded(value: Any) -> Any:
    """A subject with its numbers to four decimals: the last digits of those that torch computes are a processor's."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_rounded(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _rounded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def subject_named(wanted: str) -> tuple[list[subjects.Subject], Path]:
    """Those of pocket's own that are meant, or a folder that is there. Raises: ConfigError for neither."""
    own, root = _made_up(wanted), Path(wanted)
    if not own and not root.is_dir():
        raise ConfigError(
            f"There are no subjects {wanted!r}: dev, eval, fresh:N or names of pocket's own, or a folder of photos."
        )
    return own, root


def _made_up(wanted: str) -> list[subjects.Subject]:
    """Those of pocket's own that are meant, or none."""
    fresh = re.fullmatch(r"fresh:(\d+)(?:@(\d+))?", wanted)
    if fresh:
        first = int(fresh[2] or 0)
        return [subjects.fresh_subject(seed) for seed in range(first, first + int(fresh[1]))]
    if wanted in ("dev", "eval"):
        return list(subjects.DEV if wanted == "dev" else subjects.EVAL)
    names = wanted.split(",")
    return [subjects.SUBJECTS[name] for name in names] if set(names) <= set(subjects.SUBJECTS) else []


def subject_of(sitter: ComparisonSubject, token: str) -> Subject:
    photos = read_photos(sitter.folder).photos
    return Subject(sitter.name, photos, [photo.open_mask() for photo in photos], token, sitter.class_word)


def hash_of(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def without_name(point: Point) -> str:
    return f"strip-{point.steps}x{point.scale:g}.png"
