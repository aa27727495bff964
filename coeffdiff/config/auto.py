"""The values of "auto" for a model and a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coeffdiff.config.nested import as_tree, flattened
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values


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
    0.50 and 0.83). The ratio for SDXL is taken from there. On pocket LoRA at 1e-3 looks nearer to six subjects after
    300 steps than after 100 (DINO, photos masked: +0.107 [-0.002, +0.218], undecided; configs/compare/ablations.yaml
    beside controls.yaml), with cleaner pictures, at a cost: prompts of other things drift 0.10 farther.

    Captions dropped: on pocket a tenth brings LoRA, with alpha or without, a little nearer to subjects (DINO, photos
    masked: +0.024 and +0.030 over twelve; on the six of them that no choice was made on +0.022 and +0.018, undecided;
    configs/compare/recipes.yaml and fresh.yaml), and prompts of other things drift 0.07 to 0.08 farther. On SDXL
    nothing was measured, and most SDXL trainers drop none unless asked.

    A learned token's: on pocket 3e-3 was the best of 3e-3, 1e-2 and 3e-2 (configs/compare/tuning_controls.yaml). For
    SDXL nothing was measured; 2e-3 is what the example of diffusers' textual inversion for SDXL comes to (5e-4, scaled
    by its 4 samples a step).

    On the text encoders half of the UNet's rates, as a caution and not as a finding: what they learn reaches every
    layer of the UNet at once, and other prompts with it.
    """
    large = facts.is_large
    half = ("bf16" if facts.bf16 else "fp16") if facts.device_type == "cuda" else "no"
    crops = 8 if settings.photos.crop == "random" else 1
    lora_rate = settings.method.lora.learning_rate
    if lora_rate == "auto":
        lora_rate = 1e-4 if large else 1e-3
    coeff_rate = settings.method.coeff.learning_rate
    if coeff_rate == "auto":
        # 0.0003, not 0.00030000000000000003; a rate that is absurd is refused as LoRA's, which was given
        coeff_rate = float(f"{min(3 * lora_rate, 1e30):g}")
    choices = {
        "photos.augmentations": max(crops, 2 if settings.photos.flip else 1),
        "method.lora.learning_rate": lora_rate,
        "method.lora.alpha": settings.method.lora.rank,
        "method.coeff.learning_rate": coeff_rate,
        "method.lora.text_learning_rate": _half(lora_rate),
        "method.coeff.text_learning_rate": _half(coeff_rate),
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


def _half(rate: float) -> float:
    return float(f"{rate / 2:g}")
