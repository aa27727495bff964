"""A deeper UNet for pocket, out of its present one: first a third level, which is fast to train, then its depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from coeffdiff.pocket import POCKET
from coeffdiff.pocket.sizes import unet_config
from coeffdiff.utils.seeding import stable_seed
from pocket_build.conditioned import Conditioned, denoising
from pocket_build.fitting import read_average
from pocket_build.growing import grown, with_coarser_level
from pocket_build.workshop import Workshop, load_float32, store

DEEP = "pocket-deep"  # its size
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def shallow_config() -> dict[str, Any]:
    """The deep UNet's, with one transformer block instead of many wherever the level is the coarsest."""
    config = unet_config(DEEP)
    *finer, _ = config["transformer_layers_per_block"]
    return config | {"transformer_layers_per_block": (*finer, 1)}


def build_shallow(shop: Workshop) -> None:
    """A level more than pocket's UNet has, under captions as its text encoders understand them: these stay."""
    torch.manual_seed(stable_seed("shallow"))
    networks, start = _networks(shop, "shallow", shallow_config(), texts=shop.weights / POCKET)
    if not start["start"]:
        pocket = load_float32(UNet2DConditionModel, shop.weights / POCKET / "unet")
        networks.unet = with_coarser_level(pocket, shallow_config())
    for name in TEXT_ENCODERS:
        getattr(networks, name).requires_grad_(False)
    trained, took = shop.fit("shallow", networks, denoising(shop, networks, "shallow"), **start)
    _store(shop, "shallow", trained, took)


def build_deep(shop: Workshop) -> None:
    """All of it, grown from the shallow UNet."""
    torch.manual_seed(stable_seed("deep"))
    networks, start = _networks(shop, "deep", unet_config(DEEP), texts=shop.weights / POCKET)
    if not start["start"]:
        shallow = load_float32(UNet2DConditionModel, shop.home("shallow") / "shallow" / "unet")
        networks.unet = grown(shallow, unet_config(DEEP))
    trained, took = shop.fit("deep", networks, denoising(shop, networks, "deep"), **start)
    _store(shop, "deep", trained, took)


CONFIGS = {"shallow": shallow_config, "deep": lambda: unet_config(DEEP)}


def store_unfinished(shop: Workshop, stage: str) -> int:
    """Store the averaged weights of a stage that is under way, and return its steps.

    Raises: TrainingError if there is no checkpoint, or one that is behind what is stored.
    """
    networks = Conditioned(CONFIGS[stage]())
    steps, seconds = read_average(stage, shop.folder, networks)
    shop.require_progress(stage, steps)
    _store(shop, stage, networks, shop.unfinished_facts(stage, steps, seconds))
    return steps


def _networks(
    shop: Workshop, stage: str, config: Mapping[str, Any], *, texts: Any
) -> tuple[Conditioned, dict[str, Any]]:
    """A stage's networks as they were stored last, or else a new UNet beside the text encoders in `texts`."""
    networks, start = Conditioned(config), shop.so_far(stage)
    stored = shop.home(stage) / stage
    for name, network in networks.named_children():
        folder = (stored if start["start"] else texts) / name
        if name != "unet" or start["start"]:
            network.load_state_dict(load_float32(type(network), folder).state_dict())
    return networks, start


def _store(shop: Workshop, stage: str, networks: Any, facts: Mapping[str, Any]) -> None:
    for name, network in networks.named_children():
        store(network, shop.home(stage) / stage / name)
    shop.note(stage, **facts)
