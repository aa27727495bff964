"""What sampling will take: work counted on the meta device, at a speed measured here."""

from __future__ import annotations

import torch

from coeffdiff import estimate
from coeffdiff.sampling import Options, set_scheduler


def test_a_multiplication_and_an_addition_are_two_flops():
    """[3, 5] @ [5, 7] is 3 * 5 * 7 of both; a sum is a call without any that count."""
    with estimate._Work() as work:
        (torch.ones(3, 5, device="meta") @ torch.ones(5, 7, device="meta")).sum()
    assert work.flops == 2 * 3 * 5 * 7
    assert work.seconds(estimate._Speed(flops_per_second=210, seconds_per_call=0)) == 1


def test_work_grows_with_batch_and_size(built_pipeline):
    """Twice the batch is twice the work; twice the height nearly, since the text's projections stay."""
    unet, vae = built_pipeline.unet, built_pipeline.vae
    one = estimate._unet_work(unet, 1, 8, 8).flops
    assert estimate._unet_work(unet, 2, 8, 8).flops == 2 * one
    assert 1.5 * one < estimate._unet_work(unet, 1, 16, 8).flops < 3 * one
    assert estimate._vae_work(vae, 16, 8).flops > 1.9 * estimate._vae_work(vae, 8, 8).flops
    assert estimate._calls_of_the_unet(built_pipeline.scheduler, 7) == 7


def test_expected_time_grows_with_the_work(tiny_pipeline, monkeypatch):
    """At a speed of one flop a second and free calls, the time is the work."""
    monkeypatch.setattr(estimate, "_speed", lambda device, dtype: estimate._Speed(1.0, 0.0))
    unet, vae = (
        estimate._unet_work(tiny_pipeline.unet, 1, 8, 12).flops,
        estimate._vae_work(tiny_pipeline.vae, 8, 12).flops,
    )
    options = Options(steps=5, guidance=1, width=96, height=64)
    assert estimate.expected_seconds(tiny_pipeline, options, 3, "cpu") == 3 * (5 * unet + vae)
    guided = Options(steps=5, width=96, height=64, batch_size=3)
    assert estimate.expected_seconds(tiny_pipeline, guided, 3, "cpu") == 3 * (5 * 2 * unet + vae)
    set_scheduler(tiny_pipeline, "heun")  # calls the UNet 2 * 5 - 1 times
    assert estimate.expected_seconds(tiny_pipeline, options, 3, "cpu") == 3 * (9 * unet + vae)
    assert estimate.expected_seconds(tiny_pipeline, options, 0, "cpu") == 0


def test_the_speed_of_this_machine_is_measured_without_touching_its_generator():
    """Positive, finite, below a second, and torch's global generator is where it was."""
    state = torch.get_rng_state()
    speed = estimate._speed(torch.device("cpu"), torch.float32)
    assert 1e8 < speed.flops_per_second < 1e15 and 1e-8 < speed.seconds_per_call < 1e-2
    assert torch.equal(torch.get_rng_state(), state)
