"""Findings on settings: warm-up, learning rates, the base model's noise schedule."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from coeffdiff.config.idle import idle_parts, idle_settings
from coeffdiff.config.optimizer_rates import auto_rate, has_one_rate
from coeffdiff.config.refusals import listed
from coeffdiff.config.schema import MethodSettings, Settings, TrainingSettings, rate_setting
from coeffdiff.config.tree import differences
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.noise_schedule import schedule_findings
from coeffdiff.preflight.report import Finding

_HIGHEST_RATE = 0.5  # above it nothing ever learned; ours and others' lie between 1e-5 and 3e-2


def warmup_findings(training: TrainingSettings) -> list[Finding]:
    """A hint if the warm-up takes the whole run, so that the full learning rate is never used."""
    warmup, steps = training.warmup_steps, int(training.steps)
    if warmup < steps:
        return []
    share = steps / warmup if warmup else 0
    sentence = (
        f"the warm-up takes {warmup} steps and the run has {steps}: the learning rate reaches {share:.0%} of what was "
        "asked for, and only at its end; lower training.warmup_steps, or train longer"
    )
    return [Finding("hint", "schedule", sentence)]


def model_findings(base: Any) -> list[Finding]:
    """Hints on the noise schedule of the model. base: from find_backbone."""
    scheduler = load_pipeline(base, dtype=torch.float32, parts=()).scheduler
    loss_scheduler = DDPMScheduler.from_config(scheduler.config)
    return [Finding("hint", "model", sentence) for sentence in schedule_findings(loss_scheduler)]


def idle_findings(settings: Settings) -> list[Finding]:
    """A hint on settings that are not at their defaults and do nothing, since the method does not train their part.

    Those that are "auto" by default are left out: perhaps nobody gave them.
    """
    begin = idle_settings(settings)
    changed = differences(Settings(), settings).items()
    idle = [name for name, (default, _) in changed if name.startswith(begin) and default != "auto"]
    if not idle:
        return []
    parts = [part for part in idle_parts(settings) if any(part in name for name in idle)]
    verb, kind = "do" if len(idle) > 1 else "does", settings.method.kind
    sentence = f"{listed(idle, 'and')} {verb} nothing: the method {kind} trains no {listed(parts)}"
    return [Finding("hint", "method", sentence)]


def rate_findings(method: MethodSettings, *, learns_token: bool, optimizer: str = "adamw") -> list[Finding]:
    """Learning rates far above all usual ones, of what is trained, where the optimizer's usual ones are known."""
    if has_one_rate(optimizer) or auto_rate(optimizer, 1.0) is None:
        return []
    findings = []
    trained = [name for name in ("coeff", "lora") if name in method.kind] + ["token"] * learns_token
    trained += [f"{name}_text" for name in method.on_text_encoders]
    # "auto", where nothing was resolved, is never too high
    rates = {name: rate for name, rate in method.rates.items() if name in trained and rate != "auto"}
    for name, rate in ((name, float(rate)) for name, rate in rates.items()):
        if rate > _HIGHEST_RATE:
            sentence = (
                f"{rate_setting(name)} {rate:g} is far above the usual 1e-5 to 3e-2: the loss "
                "will hardly stay finite"
            )
            findings.append(Finding("problem", "rate", sentence))
    return findings
