"""The denoising loss, a pure function: noise and timesteps are passed in, never drawn inside.

Letters: B samples; N rows of a batch, B or, with prior preservation, 2 B: row B + i is of the class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PriorTerm:
    """The part of the loss that keeps the class as it was.

    rows: how many rows at a batch's end are of the class.
    teacher: (noisy latents of these rows, timesteps) -> what they should be predicted as, without gradient; None
        for pictures of the class, whose target is their own noise.
    """

    rows: int
    weight: float
    teacher: Callable[[Tensor, Tensor], Tensor] | None


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: Any,
    snr_gamma: float | None = 5.0,
    *,
    weights: Tensor | None = None,
    prior: PriorTerm | None = None,
    prior_losses: list[Tensor] | None = None,
) -> Tensor:
    """Mean squared error of the model's prediction, weighted per sample by min-SNR. A scalar, float32.

    With `prior` it is the mean over the samples plus prior.weight times the mean over the class's rows; all rows
    pass through `predict` in one call, after the teacher's.

    Args:
        predict: (noisy latents [N, C, h, w], timesteps [N]) -> prediction [N, C, h, w].
        latents, noise: [N, C, h, w], the latents scaled for the UNet.
        timesteps: [N] long.
        scheduler: a DDPMScheduler of the model's betas and prediction type (epsilon or v_prediction).
        snr_gamma: None leaves every sample at weight one.
        weights: [B, 1, h, w], factors of the samples' squared errors; the mean stays one over all pixels, so that
            a photo counts by how much of it shows the subject. The class's rows have none.
        prior_losses: takes the mean over the class's rows, before its weight and without gradient.
    Source: Ruiz et al. 2023, arXiv 2208.12242, equation 2 for the prior's term with pictures of the class.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    samples = len(latents) - (prior.rows if prior else 0)
    if prior and prior.teacher:
        taught = prior.teacher(noisy[samples:], timesteps[samples:])
        target = torch.cat([target[:samples], taught.to(target.dtype)])
    errors = F.mse_loss(predict(noisy, timesteps).float(), target.float(), reduction="none")
    if weights is not None:
        errors = torch.cat([errors[:samples] * weights, errors[samples:]])
    errors = errors.mean((1, 2, 3))
    if snr_gamma is not None:
        snr = signal_to_noise(scheduler.alphas_cumprod.to(timesteps.device), timesteps)
        errors = errors * min_snr_weights(snr, snr_gamma, velocity)
    if prior is None:
        return errors.mean()
    of_class = errors[samples:].mean()
    if prior_losses is not None:
        prior_losses.append(of_class.detach())
    return errors[:samples].mean() + prior.weight * of_class


def signal_to_noise(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """alpha_bar / (1 - alpha_bar) at each timestep, [B] float32."""
    kept = alphas_cumprod[timesteps].float()
    return kept / (1 - kept)


def min_snr_weights(snr: Tensor, gamma: float, velocity: bool) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v. [B].

    Both weigh the squared error of the picture by min(SNR, gamma): an error of epsilon is sqrt(SNR) times that of the
    picture, one of v sqrt(SNR + 1) times. At SNR 0 (zero terminal SNR) there is no picture in the input. Epsilon's
    weight is 1 there, its value for every SNR up to gamma, on a target that is the input itself; v's is 0. At an
    infinite SNR (a first beta of 0) both are 0.
    Source: Hang et al. 2023, arXiv 2303.09556, section 3.4.
    """
    numbers = torch.finfo(snr.dtype)
    gamma = min(max(gamma, numbers.tiny), numbers.max)  # a gamma of 1e-50 would be 0 / 0 again
    if velocity:
        return torch.clamp(snr, max=gamma) / (snr + 1)
    return torch.clamp(gamma / snr, max=1)
