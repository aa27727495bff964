"""The one tree of settings: defaults < YAML < flags < --set; every field is documented here and nowhere else.

Reading and merging happen here; what "auto" means for a given model and device is `resolve_auto`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from coeffdiff import yaml12
from coeffdiff.errors import ConfigError
from coeffdiff.paths import expanded
from coeffdiff.refusals import fields_of, parts, section_of, sentence

Auto = Literal["auto"]
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
PLACEHOLDER = "<V>"  # stands for the token in prompts, captions and templates, as in the paper's figures
# What an adapter is chosen by must not be what it is judged by: validation draws from the seeds below the first of
# evaluation, and none of its prompts is among evaluation's.
EVALUATION_FIRST_SEED = 100_000
VALIDATION_SEEDS = range(EVALUATION_FIRST_SEED)
VALIDATION_PROMPTS = ("a photo of {token} {class_word}", "a photo of {token} {class_word} at night")


def _folded(text: str) -> str:
    return " ".join(text.split())


def _is_broken(text: str) -> bool:
    """Halves of surrogate pairs, as in bytes that are no UTF-8: names of files may be so, prompts may not."""
    return any("\ud800" <= c <= "\udfff" for c in text)


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


def _as_meant(value: Any, kinds: list[Any]) -> Any:
    """`1e3` in quotes is a number where one is wanted; true is none."""
    if str in kinds or not {int, float}.intersection(kinds):
        return value
    if isinstance(value, bool) and bool not in kinds:
        raise PydanticCustomError("boolean", "not a number")  # said in other words, see refusals.py
    return yaml12.number(value.strip()) if isinstance(value, str) else value


class Section(BaseModel):
    """A part of a tree of settings: nothing unknown in it, no endless numbers, no impossible text."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_and_lists(cls, value: Any, info: ValidationInfo) -> Any:
        """One value where a list is wanted is a list of one."""
        kinds = parts(cls.model_fields[info.field_name or ""].annotation)
        items = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)
        if items is None:
            return _as_meant(value, kinds)
        listed = [value] if isinstance(value, str | int | float) else value
        return [_as_meant(item, parts(items)) for item in listed] if isinstance(listed, list) else listed

    @field_validator("*")
    @classmethod
    def _possible_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path) and "\0" in str(text):
                raise ValueError("it has a zero byte")
            if isinstance(value, list) and isinstance(text, str) and not text.isascii() and _is_broken(text):
                raise ValueError("it is not valid text")
        return value


S = TypeVar("S", bound=Section)


class ModelSettings(Section):
    name: PlaceOrName = Field(
        SDXL_BASE,
        description="an SDXL model: hub id, diffusers folder or single .safetensors file; or pocket, which ships",
    )
    variant: str | None = Field(
        "auto", description="file variant such as fp16; auto takes fp16 where it is there", examples=["fp16"]
    )
    vae: PlaceOrName | None = Field(
        None,
        description="another VAE: hub id or folder, e.g. madebyollin/sdxl-vae-fp16-fix",
        examples=["madebyollin/sdxl-vae-fp16-fix"],
    )
    config: PlaceOrName | None = Field(
        None,
        description="diffusers folder or cached hub id that gives a single file its configs and tokenizers, and a "
        "UNet alone the other networks",
        examples=[SDXL_BASE],
    )


class SubjectSettings(Section):
    images: Place | None = Field(None, description="folder with the photos")
    token: str | None = Field(None, description="the word that will mean the subject", examples=["ohwx"])
    class_word: str | None = Field(
        None, description='what the subject is, such as "stuffed animal"', examples=["stuffed animal"]
    )
    learn_token: bool = Field(
        False,
        description="new embeddings for the token in both text encoders, trained with whatever method.kind says",
    )
    templates: list[str] = Field(
        ["a photo of {token} {class_word}"],
        min_length=1,
        description="captions for photos that have none of their own; one is drawn at random each time",
    )
    caption_dropout: Annotated[float, Field(ge=0, le=1)] | Auto = Field(
        "auto",
        description="probability that a sample trains without its caption, as guidance sees it; auto: 0 for SDXL, "
        "0.1 for small models",
    )

    @field_validator("token", "class_word")
    @classmethod
    def _one_line(cls, text: str | None) -> str | None:
        text = None if text is None else _folded(text)
        if text is not None and not (0 < len(text) <= 100 and text.isprintable()):
            raise ValueError("it must be 1 to 100 visible characters")
        return text

    @field_validator("templates")
    @classmethod
    def _one_line_each(cls, templates: list[str]) -> list[str]:
        templates = [_folded(template) for template in templates]
        if not all(0 < len(template) <= 1000 and template.isprintable() for template in templates):
            raise ValueError("each must be 1 to 1000 visible characters")
        return templates


class PhotoSettings(Section):
    crop: Literal["none", "center", "random"] = Field(
        "none",
        description="none keeps the whole photo in an aspect-ratio bucket; center and random cut a square",
    )
    flip: bool = Field(
        False, description="mirror half of the augmentations; wrong for subjects with a left and right"
    )
    augmentations: int | Auto = Field(
        "auto",
        description="views that each photo is encoded in; auto: 8 for random crops, 2 for flips alone, else 1",
    )
    cache: Place | Auto = Field("auto", description="folder of encoded photos; auto: ~/.cache/coeffdiff")

    @field_validator("augmentations")
    @classmethod
    def _some(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 64:
            raise ValueError("must lie between 1 and 64")
        return value


class CoeffSettings(Section):
    targets: Literal["self", "cross", "both"] = Field(
        "both", description="attention layers that get an alpha"
    )
    blocks: list[str] | None = Field(
        None,
        description="only layers whose name starts with one of these, e.g. up_blocks.0; null: all",
        examples=[["up_blocks.0"]],
    )
    form: Literal["residual", "identity", "random"] = Field(
        "residual",
        description="residual: I + alpha from zero; identity: alpha from I without residual; random: alpha from noise",
    )
    mixes: Literal["maps", "values"] = Field(
        "maps",
        description="maps: Coeff-Tuning; values: a control that flash attention can do, for comparisons only: out[h] = "
        "A[h] sum_g coeff[h,g] V[g] has no way out of the convex hull of mixed values, and could be merged into W_v",
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="dropout on alpha's entries, drawn once per layer and step"
    )
    learning_rate: AboveZero = Field(
        "auto", description="auto: three times LoRA's (our choice; no source gives one)"
    )
    backend: str = Field(
        "auto", description="how mixed attention is computed; auto chooses by device and shape"
    )

    @model_validator(mode="after")
    def _backend_is_used(self) -> CoeffSettings:
        if self.mixes == "values" and self.backend != "auto":
            raise ValueError("backend has no effect where values are mixed, since ordinary attention follows")
        return self


class LoraSettings(Section):
    rank: int = Field(16, ge=1, le=1024, description="LoRA rank")
    alpha: AboveZero = Field(
        "auto",
        description="numerator of LoRA's scaling alpha / rank, not Coeff-Tuning's alpha; auto: the rank",
    )
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="adapted projections"
    )
    dora: bool = Field(False, description="weight-decomposed LoRA (DoRA)")
    learning_rate: AboveZero = Field("auto", description="auto: 1e-4 for SDXL, 1e-3 for small models")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay on LoRA; alpha never has any")


class TokenSettings(Section):
    vectors: int = Field(1, ge=1, le=64, description="embeddings of a learned token, in each text encoder")
    init: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="text as which a learned token begins; null: the class word, or without one the token itself",
        examples=["stuffed animal"],
    )
    learning_rate: AboveZero = Field("auto", description="auto: 2e-3 for SDXL, 3e-3 for small models")
    norm_pull: float = Field(
        0.1,
        ge=0,
        le=1,
        description="how far a step draws an embedding's length back to its first one; 0: never, 1: wholly",
    )


class MethodSettings(Section):
    kind: Literal["coeff", "lora", "coeff+lora", "token"] = Field(
        "coeff+lora",
        description="what is trained; token: the learned token alone (subject.learn_token adds it to the others)",
    )
    coeff: CoeffSettings = CoeffSettings()
    lora: LoraSettings = LoraSettings()
    token: TokenSettings = TokenSettings()


class PriorSettings(Section):
    weight: float = Field(
        0.0,
        ge=0,
        description="weight in the loss of what the class is to keep meaning; 0: off, DreamBooth's is 1. Doubles a "
        "batch, and without prior.images the network runs once more, forward only",
    )
    images: Place | None = Field(
        None,
        description="folder with pictures of the class; null: the network with its adapters off is the teacher, "
        "of class captions (those of the photos without the token) on the photos' own noised latents",
    )

    @model_validator(mode="after")
    def _images_are_used(self) -> PriorSettings:
        if self.images is not None and not self.weight:
            raise ValueError("images have no effect at weight 0; DreamBooth's weight is 1")
        return self


class TrainingSettings(Section):
    steps: int | Auto = Field(
        "auto", description="optimizer steps; auto: 500 for SDXL, 300 for small models", examples=[500]
    )
    batch_size: int | Auto = Field("auto", description="per process; auto: 1 for SDXL, 4 for small models")
    accumulate: int | Auto = Field(
        "auto", description="micro-batches a step; auto: 4 for SDXL, 1 for small models"
    )
    resolution: int | Auto = Field(
        "auto",
        description="side in pixels of the square with a bucket's area; auto: model's",
        examples=[1024],
    )
    precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto", description="auto: bf16 or fp16 on a GPU, no on CPU"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything that is drawn")
    gradient_checkpointing: bool | Auto = Field(
        "auto", description="recompute activations; auto: on for SDXL"
    )
    snr_gamma: float | None = Field(
        5.0, gt=0, description="min-SNR loss weighting; null: plain mean squared error"
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=1,
        description="spread of a constant added to a sample's noise in each channel, for very dark or bright "
        "pictures; 0: off, often 0.03 to 0.1",
    )
    masked_loss: bool | Auto = Field(
        "auto",
        description="use masks, from photo.mask.png or photo-masklabel.png beside a photo (white on the subject, in "
        "the photo's size) or its alpha channel; auto: where there are any, true: every photo needs one, false: "
        "ignore them",
    )
    outside_mask: float = Field(
        0.1,
        ge=0,
        le=1,
        description="weight of the squared errors outside a mask, inside it is 1 (our choice)",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="adamw8bit: moments of LoRA's larger matrices in 8 bits, needs pip install 'coeffdiff[bnb]'",
    )
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant", description="learning-rate schedule over optimizer steps"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up, for every schedule but constant")
    compile: bool = Field(
        False,
        description="torch.compile the UNet's transformer blocks: some seconds to minutes first, faster steps then",
    )
    clip_coeff: float | None = Field(
        1.0, gt=0, description="largest gradient norm of all alphas; null: no clipping"
    )
    clip_lora: float | None = Field(1.0, gt=0, description="largest gradient norm of LoRA; null: no clipping")
    clip_token: float | None = Field(
        1.0, gt=0, description="largest gradient norm of a learned token; null: no clipping"
    )
    log_every: int | Auto = Field(
        "auto",
        description="steps between looks at the losses, each of which waits for the GPU; every step has its line all "
        "the same. auto: 10 on a GPU, 1 elsewhere",
    )
    checkpoint_every: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="older checkpoints are removed")
    keep_adapters_every: int = Field(
        0,
        ge=0,
        description="steps between adapters that stay in RUN/adapters, to choose one by eye afterwards: RUN@200 names "
        "one, sample --checkpoints draws all, evaluate --checkpoints scores them; 0: none",
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # what YAML 1.1 makes of a bare `no`

    @field_validator("steps", "batch_size", "accumulate", "log_every")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("resolution")
    @classmethod
    def _sensible(cls, value: int | str) -> int | str:
        if isinstance(value, int) and (value % 8 or not 32 <= value <= 4096):
            raise ValueError("must be a multiple of 8 between 32 and 4096")
        return value

    @model_validator(mode="after")
    def _warmup_has_a_schedule(self) -> TrainingSettings:
        if self.warmup_steps and self.lr_schedule == "constant":
            raise ValueError("warmup_steps needs lr_schedule constant_with_warmup, linear or cosine")
        return self


class ValidationSettings(Section):
    every: int = Field(0, ge=0, description="steps between validation pictures; 0: only at the end")
    prompts: list[str] = Field(
        list(VALIDATION_PROMPTS),
        description="prompts of the validation pictures; an empty list makes none",
    )
    seeds: list[Seed] = Field(
        [1000, 1001],
        min_length=1,
        description=f"a picture for each prompt and seed; below {EVALUATION_FIRST_SEED}, where evaluation's begin",
    )
    steps: int = Field(25, ge=1, description="denoising steps of a validation picture")
    guidance: float = Field(5.0, ge=0, description="classifier-free guidance of a validation picture")
    dino: PlaceOrName | None = Field(
        "auto",
        description="vision transformer that scores validation pictures against the photos: hub id, such as "
        "facebook/dino-vits16, or folder; auto: pocket's own for pocket, none for others",
        examples=["facebook/dino-vits16"],
    )
    clip: PlaceOrName | None = Field(
        "auto",
        description="CLIP that scores them against photos and prompts: hub id, such as "
        "openai/clip-vit-base-patch32, or folder; auto: pocket's own for pocket, none for others",
        examples=["openai/clip-vit-base-patch32"],
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="the adapter of the last step, or of the validation with the best score: the geometric mean of "
        "subject fidelity (where photos have masks, to the photos without their background) and text alignment",
    )

    @field_validator("seeds")
    @classmethod
    def _not_those_of_evaluation(cls, seeds: list[int]) -> list[int]:
        if any(seed not in VALIDATION_SEEDS for seed in seeds):
            raise ValueError(f"must lie below {EVALUATION_FIRST_SEED}, where the seeds of evaluation begin")
        return seeds


class TrackingSettings(Section):
    tensorboard: bool = Field(False, description="TensorBoard log in the run folder")
    wandb: bool = Field(
        False, description="Weights & Biases; with WANDB_MODE=offline it stays in the run folder"
    )
    project: str = Field(
        "coeffdiff", min_length=1, description="project that Weights & Biases files the run under"
    )


class Settings(Section):
    """Everything a run needs; `config.yaml` in a run folder is one of these, resolved."""

    model: ModelSettings = ModelSettings()
    subject: SubjectSettings = SubjectSettings()
    photos: PhotoSettings = PhotoSettings()
    method: MethodSettings = MethodSettings()
    training: TrainingSettings = TrainingSettings()
    prior: PriorSettings = PriorSettings()
    validation: ValidationSettings = ValidationSettings()
    tracking: TrackingSettings = TrackingSettings()
    output: Place | Auto = Field(
        "auto",
        description="run folder; auto: runs/<token>, or the next free runs/<token>-N",
        examples=["runs/toy"],
    )

    @property
    def learns_token(self) -> bool:
        return self.subject.learn_token or self.method.kind == "token"

    @property
    def trained_kind(self) -> str:
        """method.kind with the learned token in it, as adapters name it: coeff+token."""
        kind = self.method.kind
        return f"{kind}+token" if self.subject.learn_token and kind != "token" else kind


@dataclass(frozen=True)
class Setting:
    """One documented field: its dotted name, default value and description."""

    name: str
    default: Any
    description: str


def documented_settings(section: type[BaseModel] = Settings) -> Iterator[Setting]:
    """Every setting there is, depth first, for `--list-settings`."""
    for name, field in fields_of(section):
        yield Setting(name, field.default, field.description or "")


def load_settings(
    file: Path | None = None, flags: dict[str, Any] | None = None, assignments: Iterable[str] = ()
) -> Settings:
    """Settings from a YAML file, then flags (dotted name -> value, None is skipped), then `a.b=c` assignments.

    Raises: ConfigError, naming the key and, for an unknown one, the nearest that exists.
    """
    return load_section(Settings, file, flags, assignments)


def load_section(
    kind: type[S],
    file: Path | None = None,
    flags: dict[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> S:
    """Like load_settings, for any other tree of sections that a command is configured by."""
    flat, lines = _merged(kind, file, flags, assignments)
    return _checked(kind, flat, lines)


def given_settings(
    file: Path | None = None, flags: dict[str, Any] | None = None, assignments: Iterable[str] = ()
) -> dict[str, Any]:
    """Only what was said, as dotted name -> checked value; a default that was said counts, others do not."""
    flat, lines = _merged(Settings, file, flags, assignments)
    checked = flattened(as_tree(_checked(Settings, flat, lines)))
    return {name: checked[name] for name in flat}


def _merged(
    kind: type[BaseModel], file: Path | None, flags: dict[str, Any] | None, assignments: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What was said last of each setting, by dotted name; and of those that a file says, where in it."""
    tree, lines = _read_yaml(file) if file else ({}, {})
    flat: dict[str, Any] = {}
    for name, value in sorted(_leaves(kind, tree), key=lambda leaf: leaf[0].count(".")):
        try:
            _lay(flat, name, value)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
    said = [(name, value) for name, value in (flags or {}).items() if value is not None]
    for assignment in assignments:
        name, separator, text = (part.strip() for part in assignment.partition("="))
        if not separator or not name:
            raise ConfigError(
                f"--set {assignment!r} is not of the form name=value, such as training.steps=300."
            )
        value = _assigned(kind, name, text)
        said += _leaves(kind, {name: value}) if isinstance(value, dict) else [(name, value)]
    for name, value in said:
        _lay(flat, name, value)
        for line in [line for line in lines if line == name or line.startswith(f"{name}.")]:
            del lines[line]
    return flat, {name: f"{file}, line {line}" for name, line in lines.items()}


def _leaves(kind: type[BaseModel], tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a tree by dotted name. A section with nothing in it says nothing."""
    for name, value in tree.items():
        section, free = _what_is_at(kind, name)
        if section and isinstance(value, dict):
            yield from _leaves(section, value, f"{prefix}{name}.")
        elif value is not None or not (section or free):
            yield f"{prefix}{name}", value


def _what_is_at(kind: type[BaseModel], dotted: str) -> tuple[type[BaseModel] | None, bool]:
    """The section of that name, or whether it is a setting that is a mapping."""
    section: type[BaseModel] | None = kind
    field = None
    for name in dotted.split("."):
        field = section.model_fields.get(name) if section else None
        section = section_of(field)
    return section, field is not None and get_origin(field.annotation) is dict


def _lay(flat: dict[str, Any], name: str, value: Any) -> None:
    """Put a setting in the place of what was said of it and of all in it; names may go on inside of a mapping."""
    for other in [other for other in flat if other == name or other.startswith(f"{name}.")]:
        del flat[other]
    above = next((other for other in flat if name.startswith(f"{other}.")), None)
    if above is None:
        flat[name] = value
        return
    if not isinstance(flat[above], dict):
        raise ConfigError(f"{name} cannot be set: {above} is not a section.")
    flat[above] = dict(flat[above])
    _lay(flat[above], name[len(above) + 1 :], value)


def _assigned(kind: type[BaseModel], name: str, text: str) -> Any:
    """What a text after `--set name=` is for that setting; whoever wants text gets what stands there."""
    own, trained = dict(fields_of(kind)), fields_of(Settings)
    field = own.get(name) or next((field for end, field in trained if name.endswith(f".{end}")), None)
    kinds = parts(field.annotation) if field else []
    items = [inner for one in kinds if get_origin(one) is list for inner in parts(get_args(one)[0])]
    try:
        value = yaml12.value(text)
    except yaml12.Twice as twice:
        raise ConfigError(f"--set {name}: {twice.name} is there twice; keep one of them.") from None
    if str in items and isinstance(value, str) and text.startswith("["):
        raise ConfigError(
            f"--set {name} (given: {text[:200]!r}) is no list that can be read: put quotes around each text that has "
            f'one of , # : [ ] {{ }} in it, such as {name}=["dog #2", "cat"].'
        )
    wants_text = {str, Path}.intersection(kinds) and not {int, float, bool}.intersection(kinds)
    if (str in items and not isinstance(value, list)) or wants_text:
        nothing = value is None and (type(None) in kinds or not text)
        return value if nothing or (isinstance(value, str) and text[0] in "\"'") else text
    return value


def _checked(kind: type[S], flat: dict[str, Any], lines: dict[str, str]) -> S:
    """A validated copy. Raises: ConfigError with one sentence for the first thing that is wrong."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        section = tree
        for parent in above:
            section = section.setdefault(parent, {})
        section[last] = value
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # The inner members of a union each report; an unknown key is the most useful thing to hear first.
        order = ["extra_forbidden", "value_error"]
        problem = min(error.errors(), key=lambda p: order.index(p["type"]) if p["type"] in order else 9)
        raise ConfigError(sentence(kind, problem, _where(problem, lines), _names_in(kind))) from None


def _where(problem: Any, lines: dict[str, str]) -> str:
    """The line of a file that says what is wrong; of several settings that do not go together, one that is named."""
    place = [str(part) for part in problem["loc"]]
    below = [name for name in lines if name.startswith("".join(f"{part}." for part in place))]
    if problem["type"] == "extra_forbidden" and below:
        return lines[below[0]]
    if problem["type"] == "value_error" and isinstance(problem["input"], dict | BaseModel):
        words = re.findall(r"\w+", str(problem["ctx"]["error"]))
        return next((lines[name] for name in below if name.rpartition(".")[2] in words), "the settings")
    while place and ".".join(place) not in lines:
        inside = [name for name in lines if name.startswith(".".join([*place, ""]))]
        if isinstance(problem["input"], dict) and inside:  # a mapping where a value is wanted
            return lines[inside[0]]
        place.pop()
    return lines.get(".".join(place), "the settings")


def _names_in(kind: type[BaseModel]) -> list[str]:
    """Settings of training that a plan can say of all its arms."""
    return [f"settings.{name}" for name, _ in fields_of(Settings)] if "settings" in kind.model_fields else []


def save_settings(settings: Section, file: Path) -> None:
    file.write_text(yaml12.dump(as_tree(settings)), encoding="utf-8")


def as_tree(settings: Section) -> dict[str, Any]:
    """The settings as plain values (paths as text), ready for YAML and JSON."""
    return settings.model_dump(mode="json")


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    """A copy with other values, by dotted name."""
    flat = flattened(as_tree(settings))
    for name, value in _leaves(Settings, values):
        _lay(flat, name, value)
    return _checked(Settings, flat, {})


def differences(old: Settings, new: Settings, ignore: Iterable[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, with both values."""
    skipped = set(ignore)
    flat_old, flat_new = flattened(as_tree(old)), flattened(as_tree(new))
    return {
        name: (flat_old.get(name), value)
        for name, value in flat_new.items()
        if flat_old.get(name) != value and name not in skipped
    }


@dataclass(frozen=True)
class ModelFacts:
    """What "auto" depends on. unet_parameters counts numbers; native_resolution is in pixels."""

    unet_parameters: int
    native_resolution: int
    device_type: str
    bf16: bool

    @property
    def is_large(self) -> bool:
        return self.unet_parameters >= 500_000_000


def resolve_auto(settings: Settings, facts: ModelFacts) -> tuple[Settings, dict[str, Any]]:
    """A copy with every model-dependent "auto" replaced, and what was chosen (dotted name -> value).

    The paper names no SDXL values (steps, rates, batch); these are ours. LoRA's 1e-4 and 500 steps at an
    effective batch of 4 are what the established SDXL recipes share. Alpha's rate is three times LoRA's: on pocket,
    two subjects, 300 steps, mean |alpha| came to 0.02 at LoRA's own rate, 0.05 at three times it (0.13 where alpha
    learned alone) and alone to 0.27 at ten times it, where the places that prompts name began to go (setting accuracy
    0.50 and 0.83). SDXL's ratio is taken over from there. On pocket LoRA at 1e-3 looks nearer to six subjects after
    300 steps than after 100 (DINO, photos masked: +0.107 [-0.002, +0.218], undecided; configs/compare/ablations.yaml
    beside controls.yaml), with cleaner pictures, at a cost: prompts of other things drift 0.10 farther.

    Captions dropped: on pocket a tenth brings LoRA, with alpha or without, a little nearer to subjects (DINO, photos
    masked: +0.024 and +0.030 over twelve; on the six of them that no choice was made on +0.022 and +0.018, undecided;
    configs/compare/recipes.yaml and fresh.yaml), and prompts of other things drift 0.07 to 0.08 farther. On SDXL
    nothing was measured, and most SDXL trainers drop none unless asked.

    A learned token's: on pocket 3e-3 was the best of 3e-3, 1e-2 and 3e-2 (configs/compare/tuning_controls.yaml). For
    SDXL nothing was measured; 2e-3 is what the example of diffusers' textual inversion for SDXL comes to (5e-4, scaled
    by its 4 samples a step).
    """
    large = facts.is_large
    half = ("bf16" if facts.bf16 else "fp16") if facts.device_type == "cuda" else "no"
    crops = 8 if settings.photos.crop == "random" else 1
    lora_rate = settings.method.lora.learning_rate
    if lora_rate == "auto":
        lora_rate = 1e-4 if large else 1e-3
    choices = {
        "photos.augmentations": max(crops, 2 if settings.photos.flip else 1),
        "method.lora.learning_rate": lora_rate,
        "method.lora.alpha": settings.method.lora.rank,
        # 0.0003, not 0.00030000000000000003; a rate that is absurd is refused as LoRA's, which was given
        "method.coeff.learning_rate": float(f"{min(3 * lora_rate, 1e30):g}"),
        "method.token.learning_rate": 2e-3 if large else 3e-3,
        "subject.caption_dropout": 0.0 if large else 0.1,
        "training.steps": 500 if large else 300,
        "training.batch_size": 1 if large else 4,
        "training.accumulate": 4 if large else 1,
        "training.resolution": facts.native_resolution,
        "training.precision": half,
        "training.gradient_checkpointing": large,
        "training.log_every": 10 if facts.device_type == "cuda" else 1,
    }
    flat = flattened(as_tree(settings))
    chosen = {name: value for name, value in choices.items() if flat[name] == "auto"}
    return with_values(settings, chosen), chosen


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What a file says, and the lines of its settings by dotted name."""
    try:
        tree, lines = yaml12.read(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no settings file {file}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {file} cannot be read: {error}.") from None
    except yaml12.Twice as twice:
        raise ConfigError(
            f"{file} says {twice.name} twice, in line {twice.first} and in line {twice.second}; keep one of them, "
            "with all that is to count."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{file}{where} is not valid YAML: {problem}.") from None
    except RecursionError:  # a thousand brackets
        raise ConfigError(f"{file} is not valid YAML: nested too deeply.") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} should hold settings such as `training: {{steps: 500}}`, not a {type(tree).__name__}."
        )
    return tree, lines


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as one level: dotted name -> value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
