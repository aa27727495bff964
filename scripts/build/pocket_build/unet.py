"""The UNet and its two text encoders, trained together."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from coeffdiff.errors import TrainingError
from coeffdiff.pocket import POCKET
from coeffdiff.pocket.sizes import euler_scheduler, text_configs, unet_config
from coeffdiff.pocket.tokenizers import tokenizer_pair
from coeffdiff.pocket.world import Scene, caption, vocabulary
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build.fitting import Losses, mixed, read_average
from pocket_build.latents import VARIANTS, build_latents
from pocket_build.workshop import Workshop, load_float32, store

BATCH = 32  # of the UNet
DROPPED = 0.1  # share of captions that the UNet does not get, so that guidance has something to leave


class Conditioned(nn.Module):
    """UNet and both text encoders, trained together."""

    def __init__(self) -> None:
        super().__init__()
        text, text_2 = text_configs(POCKET)
        self.unet = UNet2DConditionModel(**unet_config(POCKET))
        self.text_encoder = CLIPTextModel(text)
        self.text_encoder_2 = CLIPTextModelWithProjection(text_2)

    def words(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, 77] -> embeddings [B, 77, C] and pooled [B, P], as SDXL's pipeline makes them."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def spoken(text: str, scene: Scene, lot: torch.Generator) -> str:
    """A caption as people write them to a model: one in four names the thing with a word that means nothing before it,
    "a photo of xqv mug" or "a photo of a xqv red mug", so that the networks learn to pass over such words until
    someone gives them a meaning."""
    chance, article = torch.rand(2, generator=lot).tolist()
    count = int(torch.randint(2, 6, (), generator=lot))
    word = "".join(chr(letter) for letter in torch.randint(97, 123, (count,), generator=lot).tolist())
    if chance >= 0.25:
        return text
    thing = re.compile(rf"\ban? ((?:(?:{scene.colour}|{scene.pattern}) )*{scene.kind})\b")
    return thing.sub(rf"{word} \1" if article < 0.6 else rf"a {word} \1", text, count=1)


def build_unet(shop: Workshop) -> None:
    latents, time_ids = build_latents(shop)
    scenes = list(shop.train.scenes())
    first, second = tokenizer_pair(vocabulary())
    if len(first) > text_configs(POCKET)[0].vocab_size:
        raise TrainingError(
            f"The tokenizers have {len(first)} tokens, more than the text encoders' embeddings."
        )
    scheduler = DDPMScheduler.from_config(euler_scheduler().config)
    torch.manual_seed(stable_seed("unet"))
    networks, start = Conditioned(), _unet_so_far(shop)
    if start["start"]:
        for name, network in networks.named_children():
            network.load_state_dict(load_float32(type(network), shop.weights / POCKET / name).state_dict())
    networks.unet.to(memory_format=torch.channels_last)
    if shop.device == "cpu":
        # The backward of fused attention on CPUs takes half of a step; written out, it takes a tenth.
        networks.unet.set_attn_processor(AttnProcessor())
        for encoder in (networks.text_encoder, networks.text_encoder_2):
            encoder.set_attn_implementation("eager")

    def loss(step: int) -> Losses:
        lot = generator_for("unet", step)
        rows = torch.randint(len(latents), (BATCH,), generator=lot)
        said = [
            spoken(caption(scenes[row // VARIANTS], f"{step} {place}"), scenes[row // VARIANTS], lot)
            for place, row in enumerate(rows.tolist())
        ]
        kept = (torch.rand(BATCH, generator=lot) >= DROPPED).to(shop.device)
        steps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=lot)
        mean, deviation = latents[rows].float().chunk(2, dim=1)
        clean = mean + deviation * torch.randn(mean.shape, generator=lot)
        noise = torch.randn(mean.shape, generator=lot)
        clean, noise, steps = clean.to(shop.device), noise.to(shop.device), steps.to(shop.device)
        noisy = scheduler.add_noise(clean, noise, steps).to(memory_format=torch.channels_last)
        ids, ids_2 = (
            tokenizer(said, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(
                shop.device
            )
            for tokenizer in (first, second)
        )
        with mixed(shop.device, shop.dtype):
            words, pooled = networks.words(ids, ids_2)
            # Zeros are what SDXL's pipeline takes where there is no negative prompt.
            words, pooled = words * kept[:, None, None], pooled * kept[:, None]
            added = {"text_embeds": pooled, "time_ids": time_ids[rows].to(shop.device)}
            guess = networks.unet(noisy, steps, words, added_cond_kwargs=added, return_dict=False)[0]
        error = (guess.float() - noise).square().mean(dim=(1, 2, 3))
        snr = compute_snr(scheduler, steps)
        weight = snr.clamp(max=5.0) / snr  # min-SNR, arXiv 2303.09556
        return {"loss": (weight * error).mean()}

    trained, took = shop.fit("unet", networks, loss, **start)
    store_pocket(shop, trained)
    shop.note("unet", **took)


def _unet_so_far(shop: Workshop) -> dict[str, Any]:
    """Steps and seconds of a UNet that was cut short, averaged and stored; a checkpoint takes precedence."""
    known = shop.record().get("unet", {})
    return {"start": known.get("steps", 0), "seconds": known.get("seconds", 0.0)}


def store_unfinished(shop: Workshop) -> int:
    """Store the averaged weights of a UNet still in training, as if it were done, and return its steps.

    Raises: TrainingError if there is no checkpoint, or one that is behind what is stored.
    """
    networks = Conditioned()
    steps, seconds = read_average("unet", shop.folder, networks)
    if steps < _unet_so_far(shop)["start"]:
        raise TrainingError(
            f"The checkpoint in {shop.folder} has {steps} steps, and more are stored already."
        )
    store_pocket(shop, networks)
    shop.note("unet", steps=steps, of=shop.plans["unet"].steps, seconds=round(seconds), **shop.machine())
    return steps


def store_pocket(shop: Workshop, networks: Conditioned) -> None:
    """All that from_pretrained wants beside the VAE."""
    for name, network in networks.named_children():
        store(network, shop.weights / POCKET / name)
    first, second = tokenizer_pair(vocabulary())
    with quiet_libraries():
        first.save_pretrained(shop.weights / POCKET / "tokenizer")
        second.save_pretrained(shop.weights / POCKET / "tokenizer_2")
        euler_scheduler().save_pretrained(shop.weights / POCKET / "scheduler")
        pipe = StableDiffusionXLPipeline(
            vae=shop.vae(),
            text_encoder=networks.text_encoder,
            text_encoder_2=networks.text_encoder_2,
            tokenizer=first,
            tokenizer_2=second,
            unet=networks.unet,
            scheduler=euler_scheduler(),
            add_watermarker=False,
        )
        pipe.save_config(shop.weights / POCKET)
