"""A deeper UNet out of a trained one: each transformer block becomes a row of blocks that share its work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

_BLOCK = re.compile(r"(?<=\.transformer_blocks\.)\d+(?=\.)")
# What a block adds to its input: the outputs of self-attention, cross-attention and the feed-forward network.
OUTPUT = re.compile(r"\.(attn1\.to_out\.0|attn2\.to_out\.0|ff\.net\.2)\.(weight|bias)$")
NOISE = 0.3  # deviation of the blocks' matrices from their mean, in those of the matrix


@torch.no_grad()
def deepened(
    unet: UNet2DConditionModel, config: Mapping[str, Any], generator: torch.Generator
) -> UNet2DConditionModel:
    """A UNet of `config` with d transformer blocks in the place of each block of `unet`, nearly equal to it.

    Every new block adds the d-th part of what the old one added, so all do the same share of the work from the first
    step of training on. (Blocks that begin at zero change nothing at all at first, but nothing makes the model use
    them either.) The matrices of the d blocks scatter around the old one, which stays their mean, so that they do not
    learn the same. A row of one block is the old block, bit for bit.

    Args:
        unet: with one block in each transformer.
        config: keyword arguments as those of `unet`, with deeper transformers (transformer_layers_per_block).
    Raises: ValueError if the two differ in anything else.
    """
    larger = UNet2DConditionModel(**config)
    known, rows = unet.state_dict(), dict[str, list[torch.Tensor]]()
    for name, weight in larger.state_dict().items():
        rows.setdefault(_BLOCK.sub("0", name), []).append(weight)
    others = known.keys() ^ rows.keys()
    others |= {name for name in known.keys() & rows.keys() if known[name].shape != rows[name][0].shape}
    if others:
        raise ValueError(f"These weights are not the same in both UNets: {', '.join(sorted(others))}.")
    for name, row in rows.items():
        value = known[name] / len(row) if OUTPUT.search(name) else known[name]
        noise = torch.zeros(len(row), *value.shape)
        if len(row) > 1 and value.ndim == 2:
            noise = NOISE * value.std() * torch.randn(noise.shape, generator=generator)
            noise -= noise.mean(dim=0)
        for weight, own in zip(row, noise, strict=True):
            weight.copy_(value + own)
    return larger
