"""The denoising loss, in numbers that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from coeffdiff.training.objective import PriorTerm, denoising_loss, min_snr_weights, signal_to_noise


def scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type=prediction_type,
    )


def test_a_perfect_prediction_costs_nothing():
    """Whoever returns the noise pays 0; whoever returns noise + 2 pays 4."""
    latents, noise = torch.randn(3, 4, 5, 7), torch.randn(3, 4, 5, 7)
    timesteps = torch.tensor([0, 500, 999])
    for error, cost in ((0.0, 0.0), (2.0, 4.0)):
        loss = denoising_loss(
            lambda x, t, e=error: noise + e, latents, noise, timesteps, scheduler(), snr_gamma=None
        )
        torch.testing.assert_close(loss, torch.tensor(cost))


def test_v_prediction_aims_at_the_velocity():
    """v = sqrt(a) noise - sqrt(1 - a) latents, and its weight is min(SNR, 5) / (SNR + 1)."""
    latents, noise = torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 5.0)
    kept = scheduler().alphas_cumprod[700]
    velocity = kept.sqrt() * 5 - (1 - kept).sqrt() * 3
    timesteps = torch.tensor([700])
    exact = denoising_loss(
        lambda x, t: velocity.expand_as(x), latents, noise, timesteps, scheduler("v_prediction"), None
    )
    torch.testing.assert_close(exact, torch.tensor(0.0), atol=1e-10, rtol=0)
    off = denoising_loss(
        lambda x, t: (velocity + 1).expand_as(x), latents, noise, timesteps, scheduler("v_prediction"), 5.0
    )
    snr = kept / (1 - kept)
    torch.testing.assert_close(off, torch.clamp(snr, max=5) / (snr + 1))


def test_what_the_model_sees_is_the_noised_latent():
    """sqrt(a) latents + sqrt(1 - a) noise, and the timesteps untouched."""
    seen = {}
    latents, noise = torch.full((2, 4, 2, 2), 2.0), torch.full((2, 4, 2, 2), -1.0)
    timesteps = torch.tensor([10, 990])

    def predict(noisy, given):
        seen.update(noisy=noisy, timesteps=given)
        return noise

    denoising_loss(predict, latents, noise, timesteps, scheduler())
    kept = scheduler().alphas_cumprod[timesteps].view(2, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"], kept.sqrt() * latents + (1 - kept).sqrt() * noise)
    assert seen["timesteps"].tolist() == [10, 990]


@pytest.mark.parametrize(
    ("snr", "velocity", "weight"),
    [(20.0, False, 0.25), (2.0, False, 1.0), (19.0, True, 0.25), (1.0, True, 0.5)],
)
def test_min_snr_caps_the_easy_timesteps(snr, velocity, weight):
    """With gamma 5: SNR 20 weighs 5/20, SNR 2 weighs 1; for v, SNR 19 weighs 5/20 and SNR 1 weighs 1/2."""
    torch.testing.assert_close(min_snr_weights(torch.tensor([snr]), 5.0, velocity), torch.tensor([weight]))


def zero_terminal(prediction_type: str) -> DDPMScheduler:
    """alpha_bar is exactly 0 at timestep 999."""
    made = DDPMScheduler.from_config(
        scheduler(prediction_type).config, rescale_betas_zero_snr=True, prediction_type=prediction_type
    )
    assert made.alphas_cumprod[999] == 0
    return made


@pytest.mark.parametrize(
    ("snr", "velocity", "weight"),
    [
        (0.0, False, 1.0),  # as at every SNR up to gamma
        (0.0, True, 0.0),  # 0 / (0 + 1)
        (1e-38, False, 1.0),
        (1e-38, True, 1e-38),
        (float("inf"), False, 0.0),  # 5 / inf
        (float("inf"), True, 0.0),
    ],
)
def test_the_weight_has_a_value_where_there_is_no_signal_and_where_there_is_no_noise(snr, velocity, weight):
    torch.testing.assert_close(min_snr_weights(torch.tensor([snr]), 5.0, velocity), torch.tensor([weight]))


@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize("gamma", [1e-300, 1e-40, 5.0, 1e38, 1e300])
def test_no_gamma_and_no_timestep_makes_a_weight_that_is_no_number(velocity, gamma):
    """SDXL's schedule, with and without zero terminal SNR, at all of its timesteps."""
    kind = "v_prediction" if velocity else "epsilon"
    for made in (scheduler(kind), zero_terminal(kind)):
        snr = signal_to_noise(made.alphas_cumprod, torch.arange(1000))
        weights = min_snr_weights(snr, gamma, velocity)
        assert weights.isfinite().all() and (weights >= 0).all() and (weights <= 1).all()


@pytest.mark.parametrize(("kind", "loss", "gradient"), [("epsilon", 4.0, 4.0), ("v_prediction", 0.0, 0.0)])
def test_at_pure_noise_the_loss_and_its_gradient_are_numbers(kind, loss, gradient):
    """Off by 2 everywhere: 4 for epsilon, whose target is the input, and d/de (2 + e)^2 = 4; v weighs nothing."""
    latents, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    made, off = zero_terminal(kind), torch.zeros((), requires_grad=True)
    timesteps = torch.tensor([999, 999])
    right = noise if kind == "epsilon" else -latents  # v = sqrt(a) noise - sqrt(1 - a) latents at a = 0

    def predict(noisy, _):
        torch.testing.assert_close(noisy, noise)
        return right + 2 + off

    found = denoising_loss(predict, latents, noise, timesteps, made, 5.0)
    found.backward()
    torch.testing.assert_close(found.detach(), torch.tensor(loss))
    torch.testing.assert_close(off.grad, torch.tensor(gradient))


def test_without_weighting_pure_noise_teaches_v_what_the_picture_is():
    """snr_gamma None: the target is minus the latents, and being off by 2 costs 4."""
    latents, noise = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)
    found = denoising_loss(
        lambda x, t: -latents + 2, latents, noise, torch.tensor([999]), zero_terminal("v_prediction"), None
    )
    torch.testing.assert_close(found, torch.tensor(4.0))


def test_each_sample_has_its_own_weight():
    """A batch costs the mean of what its samples cost alone: weights are per sample, not per batch."""
    latents, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    timesteps = torch.tensor([5, 800])

    def loss(rows: slice) -> torch.Tensor:
        return denoising_loss(lambda x, t: 0 * x, latents[rows], noise[rows], timesteps[rows], scheduler())

    torch.testing.assert_close(loss(slice(0, 2)), (loss(slice(0, 1)) + loss(slice(1, 2))) / 2)


def test_outside_a_mask_errors_weigh_less():
    """Off by 2 everywhere costs 4; where half counts a quarter, (4 + 1) / 2."""
    latents, noise = torch.randn(2, 4, 2, 6), torch.randn(2, 4, 2, 6)
    weights = torch.ones(2, 1, 2, 6)
    weights[:, :, :, 3:] = 0.25
    loss = denoising_loss(
        lambda x, t: noise + 2, latents, noise, torch.tensor([3, 700]), scheduler(), None, weights=weights
    )
    torch.testing.assert_close(loss, torch.tensor(2.5))


@pytest.mark.parametrize("taught", [False, True], ids=["pictures", "teacher"])
def test_the_class_has_its_own_target_and_weight(taught):
    """Three rows of samples off by 2, masked to a half; three of the class off by 3, at weight 0.5: 2 + 0.5 * 9."""
    latents, noise = torch.randn(6, 4, 3, 5), torch.randn(6, 4, 3, 5)
    lesson, seen = torch.randn(3, 4, 3, 5), {}
    timesteps = torch.tensor([1, 500, 999, 2, 501, 998])

    def teacher(noisy, given):
        seen.update(teacher=(noisy, given))
        return lesson

    def predict(noisy, given):
        seen.update(student=(noisy, given))
        return torch.cat([noise[:3] + 2, (lesson if taught else noise[3:]) - 3])

    told: list[torch.Tensor] = []
    loss = denoising_loss(
        predict,
        latents,
        noise,
        timesteps,
        scheduler(),
        None,
        weights=torch.full((3, 1, 3, 5), 0.5),
        prior=PriorTerm(3, 0.5, teacher if taught else None),
        prior_losses=told,
    )
    torch.testing.assert_close(loss, torch.tensor(2 + 0.5 * 9))
    torch.testing.assert_close(told, [torch.tensor(9.0)])
    assert len(seen["student"][0]) == 6
    if taught:  # it sees what the student sees in these rows
        assert torch.equal(seen["teacher"][0], seen["student"][0][3:])
        assert seen["teacher"][1].tolist() == [2, 501, 998]


def test_the_class_is_weighted_by_min_snr_as_samples_are():
    """A batch with prior costs what its two halves cost alone, the second times the weight."""
    latents, noise, timesteps = (
        torch.randn(4, 4, 3, 5),
        torch.randn(4, 4, 3, 5),
        torch.tensor([5, 900, 7, 300]),
    )

    def alone(rows: slice) -> torch.Tensor:
        return denoising_loss(lambda x, t: 0 * x, latents[rows], noise[rows], timesteps[rows], scheduler())

    both = denoising_loss(
        lambda x, t: 0 * x, latents, noise, timesteps, scheduler(), prior=PriorTerm(2, 0.3, None)
    )
    torch.testing.assert_close(both, alone(slice(0, 2)) + 0.3 * alone(slice(2, 4)))


def test_signal_to_noise_falls_with_time():
    """alpha_bar / (1 - alpha_bar): one where signal and noise are equal, falling in t."""
    torch.testing.assert_close(
        signal_to_noise(torch.tensor([0.9, 0.5, 0.2]), torch.arange(3)), torch.tensor([9.0, 1.0, 0.25])
    )
