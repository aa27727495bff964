"""The UNet that ships, and its two text encoders, trained together."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from coeffdiff.pocket import POCKET
from coeffdiff.pocket.sizes import euler_scheduler
from coeffdiff.pocket.tokenizers import tokenizer_pair
from coeffdiff.pocket.world import vocabulary
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.seeding import stable_seed
from pocket_build.conditioned import Conditioned, denoising
from pocket_build.fitting import read_average
from pocket_build.workshop import Workshop, load_float32, store


def build_unet(shop: Workshop) -> None:
    torch.manual_seed(stable_seed("unet"))
    networks, start = Conditioned(), shop.so_far("unet")
    if start["start"]:
        for name, network in networks.named_children():
            network.load_state_dict(load_float32(type(network), shop.weights / POCKET / name).state_dict())
    trained, took = shop.fit("unet", networks, denoising(shop, networks, "unet"), **start)
    store_pocket(shop, trained)
    shop.note("unet", **took)


def store_unfinished(shop: Workshop) -> int:
    """Store the averaged weights of a UNet still in training, as if it were done, and return its steps.

    Raises: TrainingError if there is no checkpoint, or one that is behind what is stored.
    """
    networks = Conditioned()
    steps, seconds = read_average("unet", shop.folder, networks)
    shop.require_progress("unet", steps)
    store_pocket(shop, networks)
    shop.note("unet", **shop.unfinished_facts("unet", steps, seconds))
    return steps


def store_pocket(shop: Workshop, networks: Any) -> None:
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
