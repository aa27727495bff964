"""The one tree of settings: defaults < YAML < flags < --set; every field is documented here and nowhere else.

Reading and merging happen here; what "auto" means for a given model and device is `resolve_auto`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from coeffdiff.errors import ConfigError

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


class Section(BaseModel):
    """A part of a tree of settings: nothing unknown in it, no endless numbers, no impossible text."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

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
    name: str = Field(
        SDXL_BASE,
        description="an SDXL model: hub id, diffusers folder or single .safetensors file; or pocket, which ships",
    )
    variant: str | None = Field(
        "auto", description="file variant such as fp16; auto takes fp16 where it is there"
    )
    vae: str | None = Field(
        None, description="another VAE: hub id or folder, e.g. madebyollin/sdxl-vae-fp16-fix"
    )
    config: str | None = Field(
        None,
        description="diffusers folder or cached hub id that gives a single file its configs and tokenizers",
    )


class SubjectSettings(Section):
    images: Path | None = Field(None, description="folder with the photos")
    token: str | None = Field(None, description="the word that will mean the subject")
    class_word: str | None = Field(None, description='what the subject is, such as "stuffed animal"')
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
    cache: Path | Auto = Field("auto", description="folder of encoded photos; auto: ~/.cache/coeffdiff")

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
        None, description="only layers whose name starts with one of these, e.g. up_blocks.0; null: all"
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
    images: Path | None = Field(
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
    steps: int | Auto = Field("auto", description="optimizer steps; auto: 500 for SDXL, 300 for small models")
    batch_size: int | Auto = Field("auto", description="per process; auto: 1 for SDXL, 4 for small models")
    accumulate: int | Auto = Field(
        "auto", description="micro-batches a step; auto: 4 for SDXL, 1 for small models"
    )
    resolution: int | Auto = Field(
        "auto", description="side in pixels of the square with a bucket's area; auto: model's"
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

    @field_validator("precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

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
    dino: str | None = Field(
        "auto",
        description="vision transformer that scores validation pictures against the photos: hub id, such as "
        "facebook/dino-vits16, or folder; auto: pocket's own for pocket, none for others",
    )
    clip: str | None = Field(
        "auto",
        description="CLIP that scores them against photos and prompts: hub id, such as "
        "openai/clip-vit-base-patch32, or folder; auto: pocket's own for pocket, none for others",
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
    output: Path | Auto = Field(
        "auto", description="run folder; auto: runs/<token>, or the next free runs/<token>-N"
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
    choices: tuple[str, ...] = ()


def documented_settings(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[Setting]:
    """Every setting there is, depth first, for `--list-settings` and the nearest-name hints."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from documented_settings(field.annotation, f"{prefix}{name}.")
        else:
            choices = get_args(field.annotation)
            words = tuple(c for c in choices if isinstance(c, str)) if len(choices) > 1 else ()
            yield Setting(prefix + name, field.default, field.description or "", words)


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
    return section_from(kind, _merged(file, flags, assignments), source=str(file) if file else "the settings")


def given_settings(
    file: Path | None = None, flags: dict[str, Any] | None = None, assignments: Iterable[str] = ()
) -> dict[str, Any]:
    """Only what was said, as dotted name -> checked value; a default that was said counts, others do not."""
    tree = _merged(file, flags, assignments)
    checked = flattened(as_tree(section_from(Settings, tree, source=str(file) if file else "the settings")))
    return {name: checked[name] for name in flattened(tree)}


def _merged(file: Path | None, flags: dict[str, Any] | None, assignments: Iterable[str]) -> dict[str, Any]:
    tree: dict[str, Any] = _read_yaml(file) if file else {}
    for name, value in (flags or {}).items():
        if value is not None:
            _put(tree, name, value)
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name.strip():
            raise ConfigError(
                f"--set {assignment!r} is not of the form name=value, such as training.steps=300."
            )
        try:
            value = yaml.safe_load(text) if text.strip() else None
        except (yaml.YAMLError, ValueError, RecursionError):  # 2001-99-99 looks like a date
            value = text
        _put(tree, name.strip(), value)
    return tree


def section_from(kind: type[S], tree: dict[str, Any], source: str) -> S:
    """A validated copy of a plain tree. Raises: ConfigError with one sentence for the first thing that is wrong."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # The inner members of a union each report; an unknown key is the most useful thing to hear first.
        problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
        raise ConfigError(_sentence(kind, problems[0], source)) from None


def save_settings(settings: Section, file: Path) -> None:
    file.write_text(yaml.safe_dump(as_tree(settings), sort_keys=False, allow_unicode=True), encoding="utf-8")


def as_tree(settings: Section) -> dict[str, Any]:
    """The settings as plain values (paths as text), ready for YAML and JSON."""
    return settings.model_dump(mode="json")


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    """A copy with other values, by dotted name."""
    tree = as_tree(settings)
    for name, value in values.items():
        _put(tree, name, value)
    return section_from(Settings, tree, "the settings")


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


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no settings file {file}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {file} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{file}{where} is not valid YAML: {problem}.") from None
    except (ValueError, RecursionError) as error:  # a date that does not exist; a thousand brackets
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{file} is not valid YAML: {problem}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} should hold settings such as `training: {{steps: 500}}`, not a {type(tree).__name__}."
        )
    return tree


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{dotted} cannot be set: {parent} is not a section.")
        tree = below
    tree[last] = value


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as one level: dotted name -> value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _sentence(kind: type[BaseModel], problem: Any, source: str) -> str:
    known = list(documented_settings(kind))
    names = [setting.name for setting in known]
    where = [str(part) for part in problem["loc"]]
    dotted = ".".join(where)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(dotted, names, 1, 0.6) or _same_leaf(where[-1], names)
        hint = f" Did you mean {near[0]}?" if near else f" The sections are {', '.join(kind.model_fields)}."
        return f"Unknown setting {dotted} in {source}.{hint}"
    while dotted not in names and "." in dotted:  # a union's member names are appended to the location
        dotted = dotted.rpartition(".")[0]
    setting = next((s for s in known if s.name == dotted), None)
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if problem["type"] != "value_error" and setting and setting.choices:
        ending = "" if set(setting.choices) != {"auto"} else " or a number"
        message = f"it must be {', '.join(setting.choices)}{ending}"
    given = problem["input"]
    written = repr(given) if len(repr(given)) <= 200 else f"{repr(given)[:200]}..."
    shown = "" if isinstance(given, dict | BaseModel) else f" (given: {written})"
    return f"{source}: {dotted}{shown}: {message}." if dotted else f"{source}: {message}."


def _same_leaf(leaf: str, names: list[str]) -> list[str]:
    leaves = {name.rpartition(".")[2]: name for name in names}
    return [leaves[match] for match in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
