"""What is at fault where a loss or a gradient is not finite: asked when a run has failed, and time does not matter.

By then the optimizer has made its step with what was not finite, so what learns says nothing any more. The step is
done again without it: batch, base model, base model's loss. If all of these are finite, it was what had been learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coeffdiff.config.schema import Settings, rate_setting
from coeffdiff.data.batches import Batch
from coeffdiff.hosts.guard import unwrapped
from coeffdiff.hosts.lora.layers import lora_off
from coeffdiff.hosts.unet import alpha_off
from coeffdiff.models.pipelines import conditions
from coeffdiff.training.objective import PriorTerm, denoising_loss

_BF16 = "try --set training.precision=bf16"
# A loss of 1 times this, squared in a gradient's norm, is beyond float32; DreamBooth's weight is 1
_LARGE_WEIGHT = 1e12


@torch.no_grad()
def cause_of(
    step: int,
    batches: Iterable[Batch],
    unet: nn.Module,
    scheduler: Any,
    settings: Settings,
    groups: Iterable[str],
) -> str:
    """A clause that names it, and what to do.

    Args:
        batches: this process's, of that step.
        unet: as it trains; its adapters are off meanwhile. scheduler: of the loss.
        groups: of what learns: coeff, coeff_text, lora, lora_text, token.
    """
    training, bare = settings.training, unwrapped(unet)
    broken = first_not_finite((n, w) for n, w in bare.named_parameters() if not w.requires_grad)
    if broken:
        held = f"the base model's UNet holds such numbers in {broken.replace('.base_layer', '')}"
        if training.precision == "fp16":
            return f"{held}, which overflow in fp16 or are damaged: {_BF16}, or another copy of the model"
        return f"{held}, so it is damaged: take another copy of the model"
    for batch in batches:
        if name := first_not_finite(_tensors_of(batch)):
            return f"the batch holds such numbers in its {name}, which the model's VAE or text encoders made"
        predicted = _base_prediction(batch, bare, scheduler)
        if not predicted.isfinite().all():
            if training.precision == "fp16":
                return f"the base model itself overflows in fp16: {_BF16}"
            return f"the base model itself predicts such numbers in precision {training.precision}: is it damaged?"
        if not _base_loss(batch, predicted, scheduler, settings).isfinite():
            return _of_the_loss(settings)
    if settings.prior.weight > _LARGE_WEIGHT:
        return f"prior.weight {settings.prior.weight:g} is the cause: DreamBooth's is 1"
    if step == 1:
        advice = _BF16 if training.precision == "fp16" else "another --set training.precision may do"
        return (
            f"nothing had been learned yet, so it is the backward pass of this model that overflows: {advice}"
        )
    method = settings.method
    named = " or ".join(f"{rate_setting(name)} ({method.rates[name]:g})" for name in groups)
    if training.precision == "fp16":
        return f"what had been learned overflows in fp16: lower {named}, or {_BF16}"
    return (
        f"the learning rate is the usual cause: start anew with a lower {named}, as --resume with the same would end "
        "here again"
    )


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with NaN or infinity in it."""
    return next((name for name, tensor in named if not tensor.isfinite().all()), None)


def _tensors_of(batch: Batch) -> Iterable[tuple[str, Tensor]]:
    named: Mapping[str, Tensor | None] = {
        "latents": batch.latents,
        "noise": batch.noise,
        "text": batch.embeds,
        "pooled text": batch.pooled,
        "masks": batch.weights,
    }
    return [(name, tensor) for name, tensor in named.items() if tensor is not None]


def _base_prediction(batch: Batch, bare: Any, scheduler: Any) -> Tensor:
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    added = conditions(batch.pooled, batch.time_ids)
    with alpha_off(bare), lora_off(bare):
        found: Tensor = bare(noisy, batch.timesteps, batch.embeds, **added).sample
    return found


def _base_loss(batch: Batch, predicted: Tensor, scheduler: Any, settings: Settings) -> Tensor:
    prior = PriorTerm(batch.class_rows, settings.prior.weight, None) if batch.class_rows else None
    return denoising_loss(
        lambda noisy, timesteps: predicted,
        batch.latents,
        batch.noise,
        batch.timesteps,
        scheduler,
        settings.training.snr_gamma,
        weights=batch.weights,
        prior=prior,
    )


def _of_the_loss(settings: Settings) -> str:
    if settings.prior.weight > 1:
        return f"the loss itself overflows with prior.weight {settings.prior.weight:g}: DreamBooth's is 1"
    return "the loss itself is no number with this noise schedule, whatever is learned: see the model's scheduler"
