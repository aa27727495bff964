"""A UNet with its two text encoders, and their loss: the noise in latents, predicted under captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from coeffdiff.errors import TrainingError
from coeffdiff.pocket import POCKET
from coeffdiff.pocket.sizes import euler_scheduler, text_configs, unet_config
from coeffdiff.pocket.tokenizers import tokenizer_pair
from coeffdiff.pocket.world import Scene, caption, vocabulary
from coeffdiff.utils.seeding import generator_for
from pocket_build.fitting import Losses, mixed
from pocket_build.latents import VARIANTS, build_latents
from pocket_build.workshop import Workshop

BATCH = 32
DROPPED = 0.1  # share of captions that the UNet does not get, so that guidance has something to leave


class Conditioned(nn.Module):
    """UNet and both text encoders, with random weights. unet: keyword arguments; default: those of pocket."""

    def __init__(self, unet: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        text, text_2 = text_configs(POCKET)
        self.unet = UNet2DConditionModel(**(unet or unet_config(POCKET)))
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


def denoising(shop: Workshop, networks: Conditioned, name: str) -> Callable[[int], Losses]:
    """The loss of step n: the noise in a batch of latents, predicted by `networks` under captions of their scenes.

    Args:
        name: of the stage; decides, with the step, all that is drawn.
    Raises: TrainingError if the captions' words do not fit into the text encoders.
    """
    latents, time_ids = build_latents(shop)
    scenes = list(shop.train.scenes())
    first, second = tokenizer_pair(vocabulary())
    if len(first) > text_configs(POCKET)[0].vocab_size:
        raise TrainingError(
            f"The tokenizers have {len(first)} tokens, more than the text encoders' embeddings."
        )
    scheduler = DDPMScheduler.from_config(euler_scheduler().config)
    _prepare(networks, shop.device, compiled=shop.compiled)

    def loss(step: int) -> Losses:
        lot = generator_for(name, step)
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
            words, pooled = (words * kept[:, None, None]).to(shop.dtype), pooled * kept[:, None]
            added = {"text_embeds": pooled, "time_ids": time_ids[rows].to(shop.device)}
            guess = networks.unet(noisy, steps, words, added_cond_kwargs=added, return_dict=False)[0]
        error = (guess.float() - noise).square().mean(dim=(1, 2, 3))
        snr = compute_snr(scheduler, steps)
        weight = snr.clamp(max=5.0) / snr  # min-SNR, arXiv 2303.09556
        return {"loss": (weight * error).mean()}

    return loss


def _prepare(networks: Conditioned, device: str, *, compiled: bool) -> None:
    """Lay the weights out for speed; what is computed stays the same."""
    networks.unet.to(memory_format=torch.channels_last)
    if device == "cpu":
        # The backward of fused attention on CPUs takes half of a step; written out, it takes a tenth.
        networks.unet.set_attn_processor(AttnProcessor())
        for encoder in (networks.text_encoder, networks.text_encoder_2):
            encoder.set_attn_implementation("eager")
    if compiled:
        networks.unet.compile_repeated_blocks()
