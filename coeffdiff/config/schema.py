"""The one tree of settings; every field is documented here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from coeffdiff.config.fields import (
    EVALUATION_FIRST_SEED,
    SDXL_BASE,
    VALIDATION_PROMPTS,
    VALIDATION_SEEDS,
    AboveZero,
    Auto,
    Place,
    PlaceOrName,
    Section,
    Seed,
    lines_of,
    single_line,
    word_of,
)
from coeffdiff.config.subject_entries import SubjectEntry, check_apart
from coeffdiff.method.number_formats import Quantized


class ModelSettings(Section):
    name: PlaceOrName = Field(
        SDXL_BASE,
        description="an SDXL or Stable Diffusion 1.5 model: hub id, diffusers folder or single .safetensors file; or "
        "pocket, which ships",
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
    quantize: Quantized | None = Field(
        None,
        description="for small cards: the frozen linear layers of UNet and text encoders in 8 bits (int8 or fp8, needs "
        "pip install 'coeffdiff[quant]') or 4 (nf4, on NVIDIA GPUs, needs 'coeffdiff[bnb]'); what learns stays float32",
        examples=["int8"],
    )


class SubjectSettings(Section):
    images: Place | None = Field(None, description="folder with the photos")
    token: str | None = Field(None, description="the word that will mean the subject", examples=["ohwx"])
    class_word: str | None = Field(
        None, description='what the subject is, such as "stuffed animal"', examples=["stuffed animal"]
    )
    learn_token: bool = Field(
        False,
        description="new embeddings for the token in each text encoder, trained with whatever method.kind says",
    )
    templates: list[str] = Field(
        ["a photo of {token} {class_word}"],
        min_length=1,
        description="captions for photos that have none of their own; one is drawn at random each time",
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability that a sample trains without its caption, as guidance sees it",
    )

    _words = field_validator("token", "class_word")(word_of)
    _lines = field_validator("templates")(lines_of)


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
        "auto",
        description="auto: three times LoRA's; without LoRA 3e-3 (our choice)",
    )
    text_encoders: bool = Field(
        False, description="an alpha on every attention layer of the text encoders too, whatever targets says"
    )
    text_learning_rate: AboveZero = Field(
        "auto", description="of the text encoders' alphas; auto: half of learning_rate (our choice)"
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
    learning_rate: AboveZero = Field(
        "auto", description="auto: 1e-4 for full-size models, 1e-3 for small models"
    )
    text_encoders: bool = Field(
        False,
        description="LoRA of the same rank on the text encoders' attention projections too (q, k, v, out)",
    )
    text_learning_rate: AboveZero = Field(
        "auto", description="of the text encoders' LoRA; auto: half of learning_rate (our choice)"
    )
    weight_decay: float = Field(1e-4, ge=0, description="weight decay on LoRA; alpha never has any")


class TokenSettings(Section):
    vectors: int = Field(1, ge=1, le=64, description="embeddings of a learned token, in each text encoder")
    init: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="text as which a learned token begins; null: the class word, or without one the token itself",
        examples=["stuffed animal"],
    )
    learning_rate: AboveZero = Field(
        "auto", description="auto: 2e-3 for full-size models, 3e-3 for small models"
    )
    norm_pull: float = Field(
        0.1,
        ge=0,
        le=1,
        description="how far a step draws an embedding's length back to its first one; 0: never, 1: wholly",
    )


class MethodSettings(Section):
    kind: Literal["auto", "coeff", "lora", "coeff+lora", "token"] = Field(
        "auto",
        description="what is trained; token: the learned token alone (subject.learn_token adds it to the others). "
        "auto: coeff+lora for full-size models, the paper's recipe, untested by us; lora for small models, where "
        "alpha beside it brought nothing, unless a setting of coeff is given",
    )
    coeff: CoeffSettings = CoeffSettings()
    lora: LoraSettings = LoraSettings()
    token: TokenSettings = TokenSettings()

    @property
    def rates(self) -> dict[str, float | str]:
        """The learning rate of each group of what learns; _text: on the text encoders."""
        return {
            "coeff": self.coeff.learning_rate,
            "coeff_text": self.coeff.text_learning_rate,
            "lora": self.lora.learning_rate,
            "lora_text": self.lora.text_learning_rate,
            "token": self.token.learning_rate,
        }

    @property
    def on_text_encoders(self) -> list[Literal["coeff", "lora"]]:
        """The parts that are trained on the text encoders too."""
        parts: tuple[Literal["coeff"], Literal["lora"]] = ("coeff", "lora")
        return [part for part in parts if part in self.kind and getattr(self, part).text_encoders]

    @model_validator(mode="after")
    def _text_encoders_are_used(self) -> MethodSettings:
        for part in ("coeff", "lora"):
            if getattr(self, part).text_encoders and self.kind != "auto" and part not in self.kind:
                raise ValueError(
                    f"{part}.text_encoders has no effect with method {self.kind}, which trains no {part}; leave it "
                    f"out, or take a method with {part} in it"
                )
        return self


def rate_setting(group: str) -> str:
    """The setting that holds a rate of MethodSettings.rates."""
    part, _, on_text = group.partition("_")
    return f"method.{part}.{'text_' if on_text else ''}learning_rate"


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
        "auto",
        description="optimizer steps; auto: 500 for full-size models, 200 for small models, 400 for their alpha alone",
        examples=[500],
    )
    batch_size: int | Auto = Field(
        "auto", description="per process; auto: 1 for full-size models, 4 for small models"
    )
    accumulate: int | Auto = Field(
        "auto", description="micro-batches a step; auto: 4 for full-size models, 1 for small models"
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
        "auto", description="recompute activations; auto: on for full-size models"
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
    optimizer: str = Field(
        "adamw",
        description="adamw, adamw8bit (moments of LoRA's larger matrices in 8 bits, needs coeffdiff[bnb]), prodigy or "
        "lion (need coeffdiff[optimizers]), adafactor, or a class of torch.optim by name, such as nadam",
        examples=["prodigy"],
    )
    optimizer_args: dict[str, Any] = Field(
        {},
        description="arguments of the optimizer's class, such as {betas: [0.9, 0.99]}; learning rates and weight "
        "decay have settings of their own",
        examples=[{"betas": [0.9, 0.99]}],
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of what learns, such as 0.99: validation pictures and "
        "adapters are then the average's; null: none",
        examples=[0.99],
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

    @field_validator("optimizer")
    @classmethod
    def _optimizers_name(cls, value: str) -> str:
        value = single_line(value).lower()
        if not value:
            raise ValueError("it must be the name of an optimizer")
        return value

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
    subjects: list[SubjectEntry] = Field(
        [],
        max_length=100,
        description="several subjects in one run, each with images, token, class_word, templates and prior_images; "
        "what else subject says holds for all of them",
        examples=[[{"images": "mug/", "token": "ohwx", "class_word": "mug"}]],
    )
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

    @model_validator(mode="after")
    def _subjects_are_apart(self) -> Settings:
        if self.subjects:
            check_apart(self.subjects)
            shared = self.subject
            if shared.images or shared.token or shared.class_word:
                raise ValueError(
                    "subjects gives each its own images, token and class_word; leave those of subject (--images, "
                    "--token, --class-word) out"
                )
            if self.prior.images is not None:
                raise ValueError("prior.images is of one class; with subjects give each its own prior_images")
        return self

    @property
    def each_subject(self) -> tuple[SubjectSettings, ...]:
        """The subjects in order, of ordinary runs one; what is not a subject's own is that of `subject`."""
        own = ("images", "token", "class_word")
        return tuple(
            self.subject.model_copy(
                update={
                    **{name: getattr(entry, name) for name in own},
                    "templates": entry.templates or self.subject.templates,
                }
            )
            for entry in self.subjects
        ) or (self.subject,)

    @property
    def class_folders(self) -> tuple[Path | None, ...]:
        """The folder with pictures of the class of each subject, in order; None: the network is the teacher."""
        return tuple(entry.prior_images for entry in self.subjects) or (self.prior.images,)

    @property
    def run_name(self) -> str | None:
        """The tokens, after which the run's folder is called; None as long as one is missing."""
        tokens = [subject.token for subject in self.each_subject]
        return "-".join(filter(None, tokens))[:100] if all(tokens) else None

    @property
    def learns_token(self) -> bool:
        return self.subject.learn_token or self.method.kind == "token"

    @property
    def trained_kind(self) -> str:
        """method.kind with the learned token in it, as adapters name it: coeff+token."""
        kind = self.method.kind
        return f"{kind}+token" if self.subject.learn_token and kind != "token" else kind
