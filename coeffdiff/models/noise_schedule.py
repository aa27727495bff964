"""Checks of a base model's noise schedule."""

from __future__ import annotations

from typing import Any

import torch

from coeffdiff.errors import ModelError


def check_schedule(scheduler: Any, name: str) -> None:
    """Raises: ModelError for betas outside 0 to 1, with which the loss would be NaN.

    scheduler: of the loss, a DDPMScheduler. name: of the model, for the sentence.
    """
    steps, config = scheduler.betas, scheduler.config
    if ((steps >= 0) & (steps <= 1)).all():  # which NaN is not
        return
    betas = (
        "trained_betas"
        if config.get("trained_betas")
        else f"beta_start {config.beta_start} and beta_end {config.beta_end}"
    )
    raise ModelError(
        f"The scheduler of {name} has {betas} ({config.beta_schedule}), which make no noise schedule: betas lie "
        "between 0 and 1. Take the scheduler_config.json of the model that it was made from."
    )


def has_zero_terminal_snr(scheduler: Any) -> bool:
    """Whether a picture noised to the last timestep is noise alone."""
    return bool(torch.any(scheduler.alphas_cumprod == 0))


def schedule_findings(scheduler: Any) -> list[str]:
    """A sentence for each oddity of the schedule that the user did not choose."""
    if not has_zero_terminal_snr(scheduler) or scheduler.config.prediction_type != "epsilon":
        return []
    return [
        "its scheduler has zero terminal SNR (rescale_betas_zero_snr) and it predicts epsilon. At the last timestep "
        "the input is the noise that is asked for, so nothing is learned there, and samplers that begin there divide "
        "by zero. Models with such a schedule predict v: is prediction_type right?"
    ]
