"""Settings without "auto", for a base model and a device."""

from __future__ import annotations

import gc
import os
from typing import Any, Literal

import torch
from accelerate import PartialState

from coeffdiff.config.auto import ModelFacts, resolve_auto
from coeffdiff.config.optimizers import check_optimizer, optimizer_class
from coeffdiff.config.schema import ModelSettings, Settings
from coeffdiff.config.tree import with_values
from coeffdiff.errors import ConfigError
from coeffdiff.models.architecture import native_resolution, unet_parameters
from coeffdiff.models.files import chosen_variant
from coeffdiff.models.quantizing import check_quantizing, refuse_dora
from coeffdiff.pocket import POCKET, POCKET_CLIP, POCKET_DINO
from coeffdiff.utils.torch_setup import DTYPES, has_bf16

PRECISIONS: dict[str, Literal["fp32", "fp16", "bf16"]] = {
    "no": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
}  # `sample`'s


def resolve(settings: Settings, base: Any, state: PartialState) -> tuple[Settings, dict[str, Any]]:
    """Settings without "auto" for this model and device, and what was chosen. Raises: ConfigError for fp16 on a CPU."""
    facts = ModelFacts(
        unet_parameters=unet_parameters(base),
        native_resolution=native_resolution(base),
        device_type=state.device.type,
        bf16=state.device.type == "cuda" and has_bf16(),
    )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # by accelerate launch or its config
    if settings.training.precision == "auto" and launched in ("fp16", "bf16"):
        settings = settings.model_copy(deep=True)
        settings.training.precision = "fp16" if launched == "fp16" else "bf16"
    optimizer_class(settings.training.optimizer)  # a misspelt name before rates that depend on it
    settings, chosen = resolve_auto(settings, facts)
    if settings.model.variant == "auto":
        variant = chosen_variant(base, DTYPES[settings.training.precision])
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
    training, decay = settings.training, settings.method.lora.weight_decay
    check_optimizer(
        training.optimizer,
        state.device,
        training.optimizer_args,
        decay if "lora" in settings.method.kind else 0.0,
    )
    check_quantizing(settings.model.quantize, state.device.type)
    if "lora" in settings.method.kind and settings.method.lora.dora:
        refuse_dora(settings.model.quantize, "method.lora")
    return settings, chosen


def check_names(name: str, model: ModelSettings) -> None:
    """Raises: ConfigError for what an adapter could not name so that others load it again.

    name: of the base model; model: with absolute paths, as the adapter's header has them.
    """
    named = (
        ("The name of the model", name, 1000),
        ("model.vae", model.vae, 1000),
        ("model.config", model.config, 1000),
        ("model.variant", model.variant, 100),
    )
    for what, text, most in named:
        if text and len(text) > most:
            raise ConfigError(f"{what} {text[:200]} has more than {most} characters; take a shorter one.")
        if strange := next((letter for letter in text or "" if not letter.isprintable()), None):
            raise ConfigError(
                f"{what} {text} has a character that cannot be printed (U+{ord(strange):04X}), and an adapter has to "
                "name it; rename it."
            )


def free_memory(state: PartialState) -> None:
    """Give back what nobody holds any more, to the GPU's other users too."""
    gc.collect()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
