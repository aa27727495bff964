"""Prior preservation: the teacher is the base model, the student comes back as it was, and the class is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from coeffdiff.config.loading import load_settings
from coeffdiff.data.batches import Batch
from coeffdiff.data.class_captions import class_captions
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.hosts.lora.layers import add_lora, lora_parameters
from coeffdiff.hosts.unet import coefficients_of, inject
from coeffdiff.method.coefficients import draw_dropout
from coeffdiff.training.objective import denoising_loss
from coeffdiff.training.prior import loss_terms, read_class_pictures, teacher_for


def batch_for(unet, unet_inputs, samples: int = 2) -> Batch:
    """Samples and, under other captions, their class rows."""
    inputs, other = unet_inputs(unet, batch=samples), unet_inputs(unet, batch=samples, seed=1)
    twice = [torch.cat([inputs["sample"]] * 2), torch.cat([other["sample"]] * 2)]
    conditions = inputs["added_cond_kwargs"], other["added_cond_kwargs"]
    return Batch(
        *twice,
        torch.cat([inputs["timestep"]] * 2),
        torch.cat([inputs["encoder_hidden_states"], other["encoder_hidden_states"]]),
        *(torch.cat([c[name] for c in conditions]) for name in ("text_embeds", "time_ids")),
        captions=("sks ball",) * samples + ("ball",) * samples,
        class_rows=samples,
    )


def predict_with(network, batch: Batch):
    conditions = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    return lambda noisy, timesteps: (
        network(noisy, timesteps, batch.embeds, added_cond_kwargs=conditions).sample
    )


def adapted(unet, dora: bool = False):
    """Alpha and LoRA far from their beginnings, and those of an older adapter, which are on but do not train."""
    unet.requires_grad_(False)
    add_lora(unet, "older", rank=2, alpha=2.0, seed=7)
    add_lora(unet, rank=3, alpha=3.0, dora=dora)
    inject(unet, "older", seed=7)
    inject(unet)
    generator = torch.Generator().manual_seed(5)
    moved = [c.alpha for name in ("default", "older") for c in coefficients_of(unet, name).values()]
    with torch.no_grad():
        for tensor in [*moved, *lora_parameters(unet).values(), *lora_parameters(unet, "older").values()]:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    for coefficients in coefficients_of(unet, "older").values():
        coefficients.alpha.requires_grad_(False)
    draw_dropout(coefficients_of(unet), 0.3, seed=0, step=1)
    return unet


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_teacher_is_the_base_model_and_leaves_no_trace(micro_pipeline, unet_inputs, dora):
    """Bit for bit what the untouched model predicts; then every parameter trains that did, and the student is itself."""
    base = copy.deepcopy(micro_pipeline.unet).requires_grad_(False)
    unet = adapted(micro_pipeline.unet, dora)
    batch = batch_for(unet, unet_inputs)
    predict = predict_with(unet, batch)
    trained = {name: p.requires_grad for name, p in unet.named_parameters()}
    before = predict(batch.latents, batch.timesteps)
    asked = batch.latents[2:].clone().requires_grad_()  # whatever comes, what is taught is a constant
    lesson = teacher_for(batch, unet)(asked, batch.timesteps[2:])
    conditions = {"text_embeds": batch.pooled[2:], "time_ids": batch.time_ids[2:]}
    expected = base(
        batch.latents[2:], batch.timesteps[2:], batch.embeds[2:], added_cond_kwargs=conditions
    ).sample
    assert torch.equal(lesson, expected)
    assert not lesson.requires_grad
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == trained
    after = predict(batch.latents, batch.timesteps)
    assert torch.equal(after, before)
    assert (after[2:] - lesson).abs().max() > 0.01
    assert after.requires_grad


def test_a_teacher_that_fails_leaves_the_adapters_on(micro_pipeline, unet_inputs):
    """Out of memory in the middle of its forward."""
    unet = adapted(micro_pipeline.unet)
    batch = batch_for(unet, unet_inputs)
    predict = predict_with(unet, batch)
    before = predict(batch.latents, batch.timesteps)
    trained = {name: p.requires_grad for name, p in unet.named_parameters()}

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = unet.mid_block.register_forward_pre_hook(runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        teacher_for(batch, unet)(batch.latents[2:], batch.timesteps[2:])
    hook.remove()
    assert torch.equal(predict(batch.latents, batch.timesteps), before)
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_teacher_known_beforehand(micro_pipeline, unet_inputs, checkpointing):
    """With its predictions stored by an untouched model: the same loss and the same gradient of every parameter, also
    where gradient checkpointing computes activations anew in the backward pass."""
    base = copy.deepcopy(micro_pipeline.unet).requires_grad_(False)
    unet = adapted(micro_pipeline.unet).train()
    batch = batch_for(unet, unet_inputs)
    scheduler = DDPMScheduler.from_config(micro_pipeline.scheduler.config)
    settings = load_settings(None, {"prior.weight": 0.7})
    drawn = batch.latents, batch.noise, batch.timesteps, scheduler

    def gradients(terms):
        loss = denoising_loss(predict_with(unet, batch), *drawn, **terms)
        loss.backward()
        result = {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}
        unet.zero_grad()
        return loss.detach(), result

    stored = loss_terms(batch, base, settings)
    expected_loss, expected = gradients(stored)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    loss, found = gradients(loss_terms(batch, unet, settings))
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    assert len(found) == 8 * (4 * 2 + 1)  # of each layer four LoRAs of two matrices, and alpha
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_the_class_stays_while_the_subject_is_learned(micro_pipeline, unet_inputs):
    """After 25 steps on two samples the class has drifted to less than a third of what it does without a prior, and
    the subject's loss has fallen all the same."""
    scheduler = DDPMScheduler.from_config(micro_pipeline.scheduler.config)
    base, drift, subject = copy.deepcopy(micro_pipeline.unet), {}, {}
    for weight in (0.0, 3.0):
        unet = copy.deepcopy(base).requires_grad_(False)
        learned = list(add_lora(unet, rank=4, alpha=4.0).values())
        learned += [c.alpha for c in inject(unet).values()]
        optimizer = torch.optim.AdamW(learned, lr=3e-3, weight_decay=0.0)
        batch = batch_for(unet, unet_inputs)
        settings = load_settings(None, {"prior.weight": weight})
        predict, losses = predict_with(unet, batch), []
        drawn = batch.latents, batch.noise, batch.timesteps, scheduler, None
        for _ in range(25):
            loss = denoising_loss(predict, *drawn, **loss_terms(batch, unet, settings))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
            found = predict(noisy, batch.timesteps)
            started = predict_with(base, batch)(noisy, batch.timesteps)
        losses = [(p[:2] - batch.noise[:2]).square().mean() for p in (started, found)]
        drift[weight] = (found - started)[2:].square().mean()
        subject[weight] = (losses[1] / losses[0]).item()
    assert drift[3.0] < drift[0.0] / 3
    assert max(subject.values()) < 0.95


def test_a_teacher_costs_nothing_where_there_is_none(micro_pipeline, unet_inputs):
    """Pictures of the class have their own noise as target; without prior preservation there is no term at all."""
    batch = batch_for(micro_pipeline.unet, unet_inputs)
    settings = load_settings(None, {"prior.weight": 0.5, "prior.images": "class"})
    term = loss_terms(batch, micro_pipeline.unet, settings)["prior"]
    assert (term.rows, term.weight, term.teacher) == (2, 0.5, None)
    alone = Batch(*(getattr(batch, name)[:2] for name in list(Batch.__dataclass_fields__)[:7]))
    assert loss_terms(alone, micro_pipeline.unet, settings) == {}


def subject_with(tmp_path, **values):
    return load_settings(
        None,
        {
            "subject.images": tmp_path / "photos",
            "subject.token": "sks",
            "subject.class_word": "dog",
            "prior.weight": 1.0,
            **values,
        },
    )


def test_class_captions_come_from_the_photos_or_from_the_pictures(tmp_path):
    """Each caption of a photo has one of its class; each picture its own text, or the templates without the token."""
    captions = [("a photo of sks dog", "sks dog"), ("sks asleep",)]
    settings = subject_with(tmp_path, **{"subject.templates": ["a photo of {token} {class_word}"]})
    of_class, of_pictures = class_captions(settings.each_subject, settings.prior.weight, captions, None)
    assert of_class == {"a photo of sks dog": "a photo of dog", "sks dog": "dog", "sks asleep": "dog asleep"}
    assert of_pictures == []
    (tmp_path / "class").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"class/{name}.png")
    (tmp_path / "class/b.txt").write_text("{class_word} on a sofa")
    settings = subject_with(tmp_path, **{"prior.images": tmp_path / "class"})
    pictures = read_class_pictures(settings)
    assert class_captions(settings.each_subject, settings.prior.weight, captions, pictures) == (
        {},
        [("a photo of dog",), ("dog on a sofa",)],
    )
    assert class_captions(settings.each_subject, 0.0, captions, None) == ({}, [])


def test_what_prior_preservation_needs_is_said(tmp_path):
    """A class word, a folder of its own with pictures in it, and a weight."""
    assert read_class_pictures(subject_with(tmp_path)) is None
    with pytest.raises(
        ConfigError, match=r"prior\.weight keeps what the class word means, and there is none: add"
    ):
        read_class_pictures(subject_with(tmp_path, **{"subject.class_word": None}))
    with pytest.raises(ConfigError, match=r"prior\.images and the photos are the same folder"):
        read_class_pictures(subject_with(tmp_path, **{"prior.images": tmp_path / "." / "photos"}))
    with pytest.raises(PhotoError, match=r"prior\.images: There is no folder"):
        read_class_pictures(subject_with(tmp_path, **{"prior.images": tmp_path / "nowhere"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PhotoError, match=r"prior\.images: There are no photos in .*; put some of dog there"):
        read_class_pictures(subject_with(tmp_path, **{"prior.images": tmp_path / "empty"}))
    with pytest.raises(ConfigError, match="prior: images have no effect at weight 0"):
        subject_with(tmp_path, **{"prior.images": "class", "prior.weight": 0.0})
