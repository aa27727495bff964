"""Settings that a run would regret: warm-up, rates, what the base model predicts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from coeffdiff.config.schema import Settings
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.noise_schedule import schedule_findings
from coeffdiff.preflight.report import Finding


def warmup_findings(settings: Settings) -> list[Finding]:
    """A warm-up that takes the whole run, so that the learning rate that was asked for is never used."""
    training = settings.training
    warmup, steps = training.warmup_steps, int(training.steps)
    if warmup < steps:
        return []
    share = steps / warmup if warmup else 0
    sentence = (
        f"the warm-up takes {warmup} steps and the run has {steps}: the learning rate reaches {share:.0%} of what was "
        "asked for, and only at its end; lower training.warmup_steps, or train longer"
    )
    return [Finding("hint", "schedule", sentence)]


_USUAL_RATES = 0.5  # above it nothing was ever seen to learn; ours and others' lie between 1e-5 and 3e-2


def model_findings(settings: Settings, base: Any) -> list[Finding]:
    """What will keep this model from learning: its noise schedule, and rates far beyond any that are usual."""
    scheduler = load_pipeline(base, dtype=torch.float32, parts=()).scheduler
    loss_scheduler = DDPMScheduler.from_config(scheduler.config)
    findings = [Finding("hint", "model", sentence) for sentence in schedule_findings(loss_scheduler)]
    method = settings.method
    sections = (("coeff", method.coeff), ("lora", method.lora), ("token", method.token))
    # "auto", where nothing was resolved, is never too high
    rates = {name: section.learning_rate for name, section in sections if section.learning_rate != "auto"}
    for name, rate in ((name, float(rate)) for name, rate in rates.items()):
        trained = settings.learns_token if name == "token" else name in method.kind
        if trained and rate > _USUAL_RATES:
            sentence = (
                f"method.{name}.learning_rate {rate:g} is far above the usual 1e-5 to 3e-2: the loss "
                "will hardly stay finite"
            )
            findings.append(Finding("problem", "rate", sentence))
    return findings
