"""The UNet and both text encoders, in two stages: a shallow UNet from nothing, then all its depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from coeffdiff.pocket import POCKET
from coeffdiff.pocket.sizes import euler_scheduler, unet_config
from coeffdiff.pocket.tokenizers import tokenizer_pair
from coeffdiff.pocket.world import vocabulary
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build.conditioned import Conditioned, denoising
from pocket_build.fitting import read_average
from pocket_build.growing import deepened
from pocket_build.workshop import Workshop, load_float32, store


def shallow_config() -> dict[str, Any]:
    """pocket's own, with one transformer block wherever there are any."""
    config = unet_config(POCKET)
    return config | {"transformer_layers_per_block": (1,) * len(config["block_out_channels"])}


def build_unet(shop: Workshop) -> None:
    """A shallow one and the text encoders, from nothing."""
    torch.manual_seed(stable_seed("unet"))
    networks = _networks(shop, "unet", shallow_config())
    _finish(shop, "unet", networks)


def build_deep(shop: Workshop) -> None:
    """All its depth, out of the shallow one, under captions as the text encoders understand them: these stay."""
    torch.manual_seed(stable_seed("deep"))
    networks = _networks(shop, "deep", unet_config(POCKET), after="unet")
    if not shop.so_far("deep")["start"]:
        shallow = load_float32(UNet2DConditionModel, shop.networks("unet") / "unet")
        networks.unet = deepened(shallow, unet_config(POCKET), generator_for("deep"))
    networks.text_encoder.requires_grad_(False)
    networks.text_encoder_2.requires_grad_(False)
    _finish(shop, "deep", networks)


def store_unfinished(shop: Workshop) -> int:
    """Store the averaged weights of the deep UNet still in training, as if it were done, and return its steps.

    Raises: TrainingError if there is no checkpoint, or one that is behind what is stored.
    """
    networks = Conditioned()
    steps, seconds = read_average("deep", shop.folder, networks)
    shop.require_progress("deep", steps)
    _store(shop, "deep", networks, shop.unfinished_facts("deep", steps, seconds))
    return steps


def _networks(
    shop: Workshop, stage: str, config: Mapping[str, Any], *, after: str | None = None
) -> Conditioned:
    """A stage's networks as they were stored last; or else a new UNet, with the text encoders of the stage before."""
    networks, stored = Conditioned(config), shop.so_far(stage)["start"] > 0
    source = shop.networks(stage) if stored else after and shop.networks(after)
    for name, network in networks.named_children():
        if source and (stored or name != "unet"):
            network.load_state_dict(load_float32(type(network), source / name).state_dict())
    return networks


def _finish(shop: Workshop, stage: str, networks: Conditioned) -> None:
    trained, took = shop.fit(stage, networks, denoising(shop, networks, stage), **shop.so_far(stage))
    _store(shop, stage, trained, took)


def _store(shop: Workshop, stage: str, networks: Any, facts: Mapping[str, Any]) -> None:
    folder = shop.networks(stage)
    for name, network in networks.named_children():
        store(network, folder / name)
    if folder == shop.weights / POCKET:
        _complete(shop, networks, folder)
    shop.note(stage, **facts)


def _complete(shop: Workshop, networks: Any, folder: Path) -> None:
    """All that from_pretrained wants beside the networks."""
    first, second = tokenizer_pair(vocabulary())
    with quiet_libraries():
        first.save_pretrained(folder / "tokenizer")
        second.save_pretrained(folder / "tokenizer_2")
        euler_scheduler().save_pretrained(folder / "scheduler")
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
        pipe.save_config(folder)
