"""What a run needs before its first step: settings resolved, photos and texts encoded, the UNet made trainable."""

from __future__ import annotations

import functools
import gc
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import accelerate
import diffusers
import peft
import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn

from coeffdiff import __version__, backbone, preflight, sampling
from coeffdiff.config import ModelFacts, Settings, resolve_auto, with_values
from coeffdiff.console import progress, say
from coeffdiff.data.class_captions import class_captions
from coeffdiff.data.latents import (
    LatentData,
    encode_photos,
    encode_texts,
    encode_unconditional,
    latent_scaling,
)
from coeffdiff.data.photos import PhotoSet, captions_for, fill
from coeffdiff.errors import ConfigError, ResumeError
from coeffdiff.method.adapter import AdapterHeader, BaseHeader, LoraHeader, fill_alphas, format_for
from coeffdiff.method.coefficients import Coefficients, Mixes
from coeffdiff.method.injection import inject
from coeffdiff.method.lora import add_lora
from coeffdiff.pocket import POCKET, POCKET_CLIP, POCKET_DINO
from coeffdiff.speed import has_bf16, prepare_kernels
from coeffdiff.threads import waiting
from coeffdiff.training.optimizer import check_optimizer
from coeffdiff.training.prior import counting_photos, encode_prior, introduce_prior
from coeffdiff.training.state import RunFolder
from coeffdiff.training.text import LearnedToken

_TIMING_SECONDS = 0.3  # for how long operations are timed before a run; `coeffdiff check` takes longer
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


PRECISIONS: dict[str, Literal["fp32", "fp16", "bf16"]] = {
    "no": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
}  # `sample`'s


@dataclass(frozen=True)
class Trainables:
    """What learns: alphas by layer name, LoRA parameters by name, a token's rows by encoder; all float32."""

    coefficients: dict[str, Coefficients]
    lora: dict[str, nn.Parameter]
    token: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def alphas(self) -> list[Tensor]:
        return [c.alpha for c in self.coefficients.values()]

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU under the names that checkpoints use."""
        named = {f"{layer}.alpha": c.alpha for layer, c in self.coefficients.items()} | self._named
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of tensors(). Raises: ResumeError if they are not exactly these."""
        own = self.tensors()
        if own.keys() != tensors.keys() or any(own[k].shape != t.shape for k, t in tensors.items()):
            raise ResumeError(
                "The checkpoint holds other layers than this model has; it belongs to another run."
            )
        fill_alphas(self.coefficients, {k: t for k, t in tensors.items() if k not in self._named})
        for name, parameter in self._named.items():
            parameter.copy_(tensors[name])

    @property
    def _named(self) -> dict[str, nn.Parameter]:
        return self.lora | {f"learned_token.{key}": rows for key, rows in self.token.items()}

    def moved(self) -> Tensor | None:
        """Mean |alpha| over all entries of all layers (distance from ordinary attention), 0-d; None without alpha."""
        if not self.coefficients:
            return None
        return torch.cat([c.displacement().flatten() for c in self.coefficients.values()]).mean()


def resolve(settings: Settings, base: Any, state: PartialState) -> tuple[Settings, dict[str, Any]]:
    """Settings without "auto" for this model and device, and what was chosen. Raises: ConfigError for fp16 on a CPU."""
    facts = ModelFacts(
        unet_parameters=backbone.unet_parameters(base),
        native_resolution=backbone.native_resolution(base),
        device_type=state.device.type,
        bf16=state.device.type == "cuda" and has_bf16(),
    )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # by accelerate launch or its config
    if settings.training.precision == "auto" and launched in ("fp16", "bf16"):
        settings = settings.model_copy(deep=True)
        settings.training.precision = "fp16" if launched == "fp16" else "bf16"
    settings, chosen = resolve_auto(settings, facts)
    if settings.model.variant == "auto":
        variant = backbone.chosen_variant(base, DTYPES[settings.training.precision])
        settings = with_values(settings, {"model.variant": variant})
        chosen["model.variant"] = variant
    judges = {"validation.dino": POCKET_DINO, "validation.clip": POCKET_CLIP}
    own = settings.model.name == POCKET
    named = {"validation.dino": settings.validation.dino, "validation.clip": settings.validation.clip}
    settings = with_values(
        settings, {key: judges[key] if own else None for key, name in named.items() if name == "auto"}
    )
    if settings.training.precision == "fp16" and state.device.type != "cuda":
        raise ConfigError(f"fp16 needs a CUDA GPU; on {state.device.type} use training.precision bf16 or no.")
    check_optimizer(settings.training.optimizer, state.device)
    return settings, chosen


def introduce(
    settings: Settings,
    chosen: dict[str, Any],
    photos: PhotoSet,
    base: Any,
    run: RunFolder,
    state: PartialState,
    class_pictures: PhotoSet | None = None,
) -> None:
    """Everything that was found and decided, before anything slow begins."""
    subject, training = settings.subject, settings.training
    say(f"model    {base.name}")
    say(
        f"photos   {len(photos.photos)} in {subject.images}"
        + (f", {len(photos.skipped)} left out" if photos.skipped else "")
    )
    for skipped in photos.skipped:
        say(f"         left out {skipped.path.name}: {skipped.reason}")
    for note in photos.notes:
        say(f"         {note}")
    if masked := sum(photo.mask is not None for photo in photos.photos):
        say(
            f"masks    for {masked} of {len(photos.photos)} photos; errors outside weigh {training.outside_mask:g}"
        )
    introduce_prior(settings, class_pictures)
    batch = f"batch {training.batch_size} x {training.accumulate} accumulated x {state.num_processes} process"
    method = settings.method
    control = ", mixing values" if "coeff" in method.kind and method.coeff.mixes == "values" else ""
    say(
        f"method   {settings.trained_kind}{control}, {training.steps} steps, "
        f"{batch}{'es' if state.num_processes > 1 else ''}"
    )
    if chosen:
        say("auto     " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
    say(f"run      {run.path} on {state.device.type}, precision {training.precision}")
    if state.device.type == "cpu":
        say(f"threads  {torch.get_num_threads()}, {waiting()}")
    if state.is_main_process:
        report = preflight.check(
            settings,
            photos,
            base,
            state.device,
            budget_seconds=_TIMING_SECONDS,
            class_pictures=class_pictures,
        )
        for line in preflight.lines(report.findings):
            say(line)


def encode(
    settings: Settings,
    photos: PhotoSet,
    base: Any,
    dtype: torch.dtype,
    state: PartialState,
    class_pictures: PhotoSet | None = None,
) -> tuple[LatentData, dict[str, Any], Any, LearnedToken | None]:
    """Photos and texts through the parts of the model that do not train.

    Returns: what training draws from, the validation prompts ready for sampling, the VAE (on the CPU) for them, and
        with a learned token the text encoders that it is learned in. Otherwise they leave memory here.
    """
    subject, training = settings.subject, settings.training
    token, word = str(subject.token), subject.class_word
    captions = [captions_for(photo, subject.templates, token, word) for photo in photos.photos]
    of_class, of_pictures = class_captions(settings, captions, class_pictures)
    trained = [text for texts in (*captions, of_class.values(), *of_pictures) for text in texts]
    prompts = [fill(prompt, token, word) for prompt in settings.validation.prompts]
    pipe = backbone.load_pipeline(base, dtype=dtype, parts={"text", "vae"})
    pipe.text_encoder.to(state.device)
    pipe.text_encoder_2.to(state.device)
    learned = LearnedToken(pipe, settings) if settings.learns_token else None
    texts = encode_texts(pipe, trained, state.device)
    unconditional = encode_unconditional(pipe, state.device) if subject.caption_dropout else None
    previews = (
        sampling.encode_prompts(pipe, prompts, guidance=settings.validation.guidance) if prompts else {}
    )
    vae = pipe.vae
    prepare_kernels(state.device, dtype, vae)
    if not learned:
        pipe.text_encoder = pipe.text_encoder_2 = pipe.tokenizer = pipe.tokenizer_2 = None
    free_memory(state)
    through_vae = functools.partial(
        encode_photos,
        vae=vae,
        resolution=int(training.resolution),
        step=backbone.bucket_step(base, int(training.resolution)),
        seed=training.seed,
        device=state.device,
    )
    with state.local_main_process_first():
        with progress("encoding photos", len(photos.photos)) as bar:
            encoded = through_vae(
                photos.photos, captions, settings=settings.photos, on_photo=counting_photos(bar)
            )
        prior = encode_prior(settings, of_class, class_pictures, of_pictures, encoded, through_vae)
    scaling = latent_scaling(vae)
    vae = vae.to("cpu") if prompts else None  # pictures need it again
    pipe.vae = None
    free_memory(state)
    timesteps = pipe.scheduler.config.num_train_timesteps
    data = LatentData(
        encoded,
        texts,
        scaling,
        timesteps,
        training.seed,
        outside_mask=training.outside_mask,
        noise_offset=training.noise_offset,
        caption_dropout=float(subject.caption_dropout),
        unconditional=unconditional,
        prior=prior,
    )
    return data, previews, vae, learned


def make_trainable(unet: nn.Module, settings: Settings, learned: LearnedToken | None = None) -> Trainables:
    """LoRA first: PEFT freezes everything that is there when it comes. What learns is float32."""
    method, seed = settings.method, settings.training.seed
    unet.requires_grad_(False)
    lora: dict[str, nn.Parameter] = {}
    coefficients: dict[str, Coefficients] = {}
    if "lora" in method.kind:
        lora = add_lora(
            unet,
            rank=method.lora.rank,
            alpha=float(method.lora.alpha),
            targets=method.lora.targets,
            dora=method.lora.dora,
            seed=seed,
        )
    if "coeff" in method.kind:
        coefficients = inject(
            unet,
            targets=method.coeff.targets,
            blocks=method.coeff.blocks,
            form=method.coeff.form,
            seed=seed,
            backend=method.coeff.backend,
            mixes=method.coeff.mixes,
        )
    for parameter in [*lora.values(), *(c.alpha for c in coefficients.values())]:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return Trainables(coefficients, lora, learned.rows if learned else {})


def header_for(
    settings: Settings,
    trainables: Trainables,
    model: str,
    step: int,
    networks: dict[str, str] | None = None,
) -> AdapterHeader:
    """What the adapter will say of itself after `step` steps on `model`.

    settings: with absolute paths, since the adapter is read elsewhere. networks: fingerprints of the model.
    """
    subject, lora = settings.subject, settings.method.lora
    check_model_name(model)
    mixes: Mixes = settings.method.coeff.mixes if trainables.coefficients else "maps"
    opened = settings.model
    base = BaseHeader(
        vae=opened.vae,
        config=opened.config,
        variant=opened.variant,
        precision=PRECISIONS[settings.training.precision],
        networks=networks or {},
    )
    return AdapterHeader(
        format_version=format_for(mixes, opened.vae),
        kind=settings.trained_kind,
        base_model=model,
        token=str(subject.token),
        class_word=subject.class_word,
        templates=tuple(subject.templates),
        form=settings.method.coeff.form,
        mixes=mixes,
        heads={layer: c.heads for layer, c in trainables.coefficients.items()},
        lora=LoraHeader(rank=lora.rank, alpha=float(lora.alpha), dora=lora.dora) if trainables.lora else None,
        vectors=settings.method.token.vectors if trainables.token else 0,
        trained_steps=step,
        resolution=int(settings.training.resolution),
        versions=versions(),
        base=base,
    )


def check_model_name(name: str) -> None:
    """Raises: ConfigError for what an adapter could not name so that others load it again."""
    if len(name) > 1000 or not name.isprintable():
        raise ConfigError(
            f"The name of the model {name[:200]} is overlong or has control characters; rename it."
        )


def versions() -> dict[str, str]:
    """Of everything that decides a result."""
    modules = (torch, diffusers, transformers, accelerate, peft)
    return {"coeffdiff": __version__} | {module.__name__: str(module.__version__) for module in modules}


def free_memory(state: PartialState) -> None:
    """Give back what nobody holds any more, to the GPU's other users too."""
    gc.collect()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
