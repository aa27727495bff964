"""The values of "auto" for a model and a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coeffdiff.config.nested import as_tree, flattened
from coeffdiff.config.optimizer_rates import (
    auto_rate,
    has_one_rate,
    refuse_unequal_rates,
    refuse_unknown_rates,
)
from coeffdiff.config.schema import CoeffSettings, Settings, rate_setting
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

    Raises: ConfigError for learning rates that nobody gave with an optimizer of which none is known.

    The paper names no SDXL values (steps, rates, batch); these are ours. LoRA's 1e-4 and 500 steps at an effective
    batch of 4 are what the established SDXL recipes share.

    Small models get what did well on pocket (scripts/evidence/README.md, Tuning): LoRA at 1e-3 for 200 steps, since
    3e-3, which was a little better then, broke down after some 600 beside alpha. Beside it alpha may have any rate from
    1e-3 to 3e-2, and has three times LoRA's; alone it has 3e-3, and 400 steps, as larger rates lose the places that
    prompts name. For full-size models alpha's rates are carried over, untested. Small models' method is LoRA, since
    alpha beside it brought nothing that could be seen, unless a setting of alpha is given; for full-size models
    coeff+lora stays, the paper's own recipe for SDXL, untested by us.

    Stable Diffusion 1.5 gets SDXL's values at its own 512 px: our choice, nothing was measured on it.

    A learned token's: on pocket's earlier UNet 3e-3 was the best of 3e-3, 1e-2 and 3e-2. For SDXL nothing was
    measured; 2e-3 is what the example of diffusers' textual inversion for SDXL comes to (5e-4, scaled by its 4
    samples a step).

    On the text encoders half of the UNet's rates, as a caution and not as a finding: what they learn reaches every
    layer of the UNet at once, and other prompts with it.
    """
    large, method = facts.is_large, {}
    if settings.method.kind == "auto":
        wanted = settings.method.coeff != CoeffSettings()
        method = {"method.kind": "coeff+lora" if large or wanted else "lora"}
        settings = with_values(settings, method)
    half = ("bf16" if facts.bf16 else "fp16") if facts.device_type == "cuda" else "no"
    crops = 8 if settings.photos.crop == "random" else 1
    optimizer = settings.training.optimizer
    refuse_unknown_rates(optimizer, learning_rates(settings))
    steps = 500 if large else 400 if settings.method.kind == "coeff" else 200

    def usual(adamw: float) -> float:
        return auto_rate(optimizer, adamw) or adamw

    asked = settings.method.lora.learning_rate
    lora_rate = usual(1e-4 if large else 1e-3) if asked == "auto" else asked
    if "lora" in settings.method.kind:
        # 0.0003, not 0.00030000000000000003; a rate that is absurd is refused as LoRA's, which was given
        coeff_rate = _rounded(min(3 * lora_rate, 1e30))
    else:
        coeff_rate = usual(3e-3)
    given = settings.method.coeff.learning_rate
    token_rate = usual(2e-3 if large else 3e-3)
    if has_one_rate(optimizer):
        coeff_rate = token_rate = lora_rate
    on_text = 1.0 if has_one_rate(optimizer) else 0.5
    choices = {
        "photos.augmentations": max(crops, 2 if settings.photos.flip else 1),
        "method.lora.learning_rate": lora_rate,
        "method.lora.alpha": settings.method.lora.rank,
        "method.coeff.learning_rate": coeff_rate,
        "method.lora.text_learning_rate": _rounded(on_text * lora_rate),
        "method.coeff.text_learning_rate": _rounded(on_text * (coeff_rate if given == "auto" else given)),
        "method.token.learning_rate": token_rate,
        "training.steps": steps,
        "training.batch_size": 1 if large else 4,
        "training.accumulate": 4 if large else 1,
        "training.resolution": facts.native_resolution,
        "training.precision": half,
        "training.gradient_checkpointing": large,
        "training.log_every": 10 if facts.device_type == "cuda" else 1,
    }
    flat = flattened(as_tree(settings))
    chosen = method | {name: value for name, value in choices.items() if flat[name] == "auto"}
    resolved = with_values(settings, chosen)
    refuse_unequal_rates(optimizer, learning_rates(resolved))
    return resolved, chosen


def _rounded(rate: float) -> float:
    return float(f"{rate:g}")


def learning_rates(settings: Settings) -> dict[str, float | str]:
    """The learning rates of what learns, by dotted name; "auto" where that is not resolved yet."""
    method = settings.method
    learning = {
        "coeff": "coeff" in method.kind,
        "coeff_text": "coeff" in method.on_text_encoders,
        "lora": "lora" in method.kind,
        "lora_text": "lora" in method.on_text_encoders,
        "token": settings.learns_token,
    }
    return {rate_setting(group): method.rates[group] for group, learns in learning.items() if learns}
