"""A deeper UNet out of a trained one: new transformer blocks, which at first change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn


@torch.no_grad()
def grown(unet: UNet2DConditionModel, config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet of `config` that computes what `unet` computes, bit for bit, until it is trained.

    What both have keeps its weights. A new block is drawn at random, so that no two learn the same, and its three
    output projections (self-attention, cross-attention, feed-forward) are zero, so that it adds nothing.

    Args:
        config: keyword arguments as those of `unet`, with deeper transformers (transformer_layers_per_block).
    Raises: ValueError if the two differ in anything else.
    """
    larger = UNet2DConditionModel(**config)
    known, weights = unet.state_dict(), larger.state_dict()
    new = {name: block for name, block in _blocks(larger).items() if name not in _blocks(unet)}
    added = tuple(f"{name}." for name in new)
    others = known.keys() ^ {name for name in weights if not name.startswith(added)}
    others |= {name for name in known.keys() & weights.keys() if known[name].shape != weights[name].shape}
    if others:
        raise ValueError(f"These weights are not the same in both UNets: {', '.join(sorted(others))}.")
    larger.load_state_dict(known, strict=False)
    for block in new.values():
        for projection in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[-1]):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
    return larger


def _blocks(unet: nn.Module) -> dict[str, Any]:
    return {
        name: module for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)
    }
