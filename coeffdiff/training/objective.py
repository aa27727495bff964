"""The denoising loss, a pure function: noise and timesteps are passed in, never drawn inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: Any,
    snr_gamma: float | None = 5.0,
) -> Tensor:
    """Mean squared error of the model's prediction, weighted per sample by min-SNR. A scalar, float32.

    Args:
        predict: (noisy latents [B, C, h, w], timesteps [B]) -> prediction [B, C, h, w].
        latents, noise: [B, C, h, w], the latents scaled for the UNet.
        timesteps: [B] long.
        scheduler: a DDPMScheduler of the model's betas and prediction type (epsilon or v_prediction).
        snr_gamma: None leaves every sample at weight one.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    errors = F.mse_loss(predict(noisy, timesteps).float(), target.float(), reduction="none").mean((1, 2, 3))
    if snr_gamma is None:
        return errors.mean()
    snr = signal_to_noise(scheduler.alphas_cumprod.to(timesteps.device), timesteps)
    return (errors * min_snr_weights(snr, snr_gamma, velocity)).mean()


def signal_to_noise(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """alpha_bar / (1 - alpha_bar) at each timestep, [B] float32."""
    kept = alphas_cumprod[timesteps].float()
    return kept / (1 - kept)


def min_snr_weights(snr: Tensor, gamma: float, velocity: bool) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v. [B].

    Source: Hang et al. 2023, arXiv 2303.09556, section 3.4. With zero terminal SNR the epsilon form would divide
    by zero; there only v is trained.
    """
    return torch.clamp(snr, max=gamma) / (snr + 1 if velocity else snr)
