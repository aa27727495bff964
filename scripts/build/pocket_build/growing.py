"""A larger UNet out of a trained one: a coarser level, and transformer blocks that at first change nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

# The first block after the coarsest level reads that level's outputs and, behind them, a skip connection: on which axis
_ENTRY = "up_blocks.1.resnets.0"
_READING = {f"{_ENTRY}.norm1.weight": 0, f"{_ENTRY}.norm1.bias": 0}
_READING |= {f"{_ENTRY}.conv1.weight": 1, f"{_ENTRY}.conv_shortcut.weight": 1}


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


@torch.no_grad()
def with_coarser_level(unet: UNet2DConditionModel, config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet of `config`, which has one more level at the coarse end; the finer ones keep the weights of `unet`.

    The new level and the middle are drawn at random. What reads the outputs of the middle in `unet` has no weights for
    those of the new level at first, and goes by the skip connection beside them alone. A finer level may have lost its
    attention. So the two do not compute the same, but the larger one need not learn the finer levels again.

    Args:
        config: keyword arguments as those of `unet`, with one level more.
    Raises: ValueError if a finer level has other widths.
    """
    larger = UNet2DConditionModel(**config)
    weights, skipped = larger.state_dict(), unet.config["block_out_channels"][-1]
    for name, known in unet.state_dict().items():
        name = re.sub(r"^up_blocks\.(\d+)", lambda block: f"up_blocks.{int(block[1]) + 1}", name)
        if name.startswith("mid_block.") or name not in weights:
            continue
        new, axis = weights[name], _READING.get(name)
        if axis is not None:
            if new.ndim > 1:  # a norm passes them on
                new.zero_()
            new, known = (part.narrow(axis, part.shape[axis] - skipped, skipped) for part in (new, known))
        if new.shape != known.shape:
            raise ValueError(
                f"{name} is {tuple(known.shape)} in one UNet and {tuple(new.shape)} in the other."
            )
        new.copy_(known)
    return larger


def _blocks(unet: nn.Module) -> dict[str, Any]:
    return {
        name: module for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)
    }
