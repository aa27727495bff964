"""The plan of a comparison: subjects, arms, and the settings that decide a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from coeffdiff.config.fields import PlaceOrName, Section, Seed
from coeffdiff.config.idle import idle_parts
from coeffdiff.config.nested import as_tree, flattened
from coeffdiff.config.schema import ModelSettings, Settings
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.comparison_subjects import ComparisonSubject
from coeffdiff.evaluation.protocol import Protocol

FORMAT = 1  # of a cell; goes up when the same key would mean other numbers
SEED_DISTANCE = 10_000  # between the first seeds of the pictures of two training seeds
# Learning-rate schedules that do not depend on the number of steps
ENDLESS = ("constant", "constant_with_warmup")
# Settings of training that change no number of a cell
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
# Settings that the comparison makes, for every arm alike
_OWN = (
    "model.", "subject.images", "subject.token", "subject.class_word", "subjects", "training.seed", "validation.",
    "output",
)  # fmt: skip


class Comparison(Section):
    """The plan of a comparison; a plan file holds it as YAML."""

    model: ModelSettings = ModelSettings()
    subjects: PlaceOrName = Field(
        "dev",
        description="of pocket's own dev, eval, tellable, told, fresh:N (fresh:N@SEED) or names with commas between "
        "them; or a folder: a data set in DreamBooth's layout, a folder of folders of photos, or one folder of photos",
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
        "`lora 1e-3` and `lora 3e-3` are tries of `lora`, of which the report names the best; a try may have two rates",
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
                    f"{own} cannot be set for arms: the comparison sets it for all of them alike"
                )
        if self.reference not in self.arms:
            raise ValueError(f"the reference {self.reference!r} is none of the arms {', '.join(self.arms)}")
        return self

    def only(self, arms: Sequence[str]) -> Comparison:
        """The plan with these arms and the reference alone. Raises: ConfigError for an arm that it lacks."""
        for arm in arms:
            if arm not in self.arms:
                raise ConfigError(f"The plan has no arm {arm!r}; it has {', '.join(self.arms)}.")
        kept = {arm: given for arm, given in self.arms.items() if arm in (*arms, self.reference)}
        return self.model_copy(update={"arms": kept})


@dataclass(frozen=True)
class Point:
    """Where an adapter is scored: after so many steps, at a scale."""

    steps: int
    scale: float


@dataclass(frozen=True)
class Job:
    """An arm on a subject with a seed.

    settings: resolved, of its training; None for the bare model. key: a hash of all that decides the training; cells:
    for each point a hash of all that decides its numbers, under which they are kept whatever the arm is called.
    """

    arm: str
    subject: ComparisonSubject
    seed: int
    settings: Settings | None
    protocol: Protocol
    key: str
    cells: Mapping[Point, str]

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self.cells)

    @property
    def label(self) -> str:
        return f"{self.subject.name}, {self.arm}, seed {self.seed}"

    @property
    def end(self) -> Point:
        """The point that the arm is judged by: its last step, at the scale nearest to 1."""
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


# Settings that came later, and what they are where they do nothing: cells keep the names that they had before
_OFF: dict[str, Any] = {"training.ema": None, "training.optimizer_args": {}, "subjects": []}


def deciding(settings: Settings) -> dict[str, Any]:
    """The resolved settings that decide the result of a training; without those of methods that it does not use."""
    idle = tuple(f"method.{part}." for part in idle_parts(settings))
    idle += tuple(
        f"method.{name}.text_" for name in ("coeff", "lora") if name not in settings.method.on_text_encoders
    )
    flat = flattened(as_tree(settings))
    kept = {
        name: value
        for name, value in flat.items()
        if not name.startswith((*INDIFFERENT, *idle)) and (name not in _OFF or value != _OFF[name])
    }
    if settings.model.quantize:
        kept["model.quantize"] = settings.model.quantize
    if settings.training.lr_schedule not in ENDLESS:
        kept["training.steps"] = settings.training.steps
    if settings.prior.images:
        kept["prior.images"] = [photo.identity for photo in read_photos(settings.prior.images).photos]
    return kept


def strip_name(point: Point) -> str:
    """File name of a point's pictures in a row, in the folder of its job."""
    return f"strip-{point.steps}x{point.scale:g}.png"
