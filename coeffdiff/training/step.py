"""One optimizer step: draw, predict, loss, backward, clip, step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coeffdiff.config.optimizers import step_size
from coeffdiff.hosts.guard import verify
from coeffdiff.method.coefficients import draw_dropout
from coeffdiff.models.pipelines import conditions
from coeffdiff.training.inputs import Inputs
from coeffdiff.training.metric_buffer import PendingStep
from coeffdiff.training.network import Network, clip_gradients
from coeffdiff.training.objective import denoising_loss
from coeffdiff.training.plan import Plan
from coeffdiff.training.prior import loss_terms


def make_step(step: int, plan: Plan, inputs: Inputs, network: Network) -> PendingStep:
    """Everything random comes from the seed, the step and the indices of its samples.

    Returns: figures of the step, for which nobody has waited yet.
    Raises: InjectionError if an adapter's part has gone from the UNet.
    """
    settings, accelerator = plan.settings, network.accelerator
    live, learned = inputs.live, inputs.learned
    verify(network.unet)
    dropout, seed = settings.method.coeff.dropout, settings.training.seed
    draw_dropout(network.trainables.all_coefficients, dropout, seed=seed, step=step)
    losses: list[Tensor] = []
    prior_losses: list[Tensor] = []
    norms: dict[str, Tensor] = {}
    for micro in range(plan.accumulate):
        batch = inputs.data.batch(step, plan.share(micro), plan.state.device)
        embeds, pooled = live.conditions(batch) if live else (batch.embeds, batch.pooled)
        with accelerator.accumulate(network.model):
            loss = denoising_loss(
                _predictor(network.model, embeds, pooled, batch.time_ids),
                batch.latents,
                batch.noise,
                batch.timesteps,
                network.noise_scheduler,
                settings.training.snr_gamma,
                **loss_terms(batch, network.unet, settings),
                prior_losses=prior_losses,
            )
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                if live:
                    live.share_gradients(plan.state)
                norms = clip_gradients(accelerator, network.trainables, settings.training)
            network.optimizer.step()
            network.optimizer.zero_grad()
    skipped = accelerator.optimizer_step_was_skipped  # normal where an fp16 scaler lowers its scale
    means = {
        name: torch.stack(parts).mean()
        for name, parts in (("loss", losses), ("loss_prior", prior_losses))
        if parts
    }
    moved = {
        "alpha": network.trainables.mean_abs_alpha(),
        "text_alpha": network.trainables.mean_abs_text_alpha(),
        "token": learned.moved() if learned else None,
    }
    rates = [
        step_size(group) for group in network.optimizer.param_groups
    ]  # of this step: the schedule comes after
    pending = PendingStep(step, means, norms, moved, rates, skipped)
    if not skipped:
        network.schedule.step()
        if learned:
            learned.stepped()
        if network.average:
            network.average.update()
    return pending


def _predictor(model: Any, embeds: Tensor, pooled: Tensor, time_ids: Tensor) -> Any:
    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        prediction: Tensor = model(noisy, timesteps, embeds, **conditions(pooled, time_ids)).sample
        return prediction

    return predict
