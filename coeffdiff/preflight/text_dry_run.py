"""Text encoders that train, on the meta device: what learns on them, and the captions of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coeffdiff.hosts import clip_alpha
from coeffdiff.hosts.lora.clip import add_clip_lora
from coeffdiff.method.coefficients import Mixes
from coeffdiff.preflight.ledger import TOKENS, Ledger, ledger_for


@dataclass(frozen=True)
class TextLearned:
    """The trained parts on the text encoders. rank None: no LoRA; nothing at all: they leave memory."""

    rank: int | None = None
    dora: bool = False
    alpha: bool = False
    mixes: Mixes = "maps"

    def __bool__(self) -> bool:
        return self.rank is not None or self.alpha


def make_encoders_learnable(encoders: Mapping[str, Any], learned: TextLearned) -> list[nn.Parameter]:
    """Put the trained parts on text encoders on meta, as training does: in float32, everything else frozen."""
    parameters: list[nn.Parameter] = []
    for network, encoder in encoders.items():
        encoder.requires_grad_(False)
        if learned.rank is not None:
            lora = add_clip_lora(
                encoder, network=network, rank=learned.rank, alpha=learned.rank, dora=learned.dora
            )
            parameters += lora.values()
        if learned.alpha:
            layers = clip_alpha.inject(encoder, network=network, mixes=learned.mixes)
            parameters += (layer.alpha for layer in layers.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return parameters


def text_step(
    encoders: Sequence[Any], parameters: list[nn.Parameter], *, rows: int, device: str
) -> tuple[Ledger, int]:
    """Forward and backward of the captions of one micro-batch, which no autocast touches.

    Returns: the ledger, and how many bytes wait for the backward while the UNet is at work.
    """
    with ledger_for(device) as ledger:
        for encoder in encoders:
            ledger.hold(encoder.parameters())
            ledger.hold(encoder.buffers())
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        before = ledger.live_bytes
        ids = torch.zeros(rows, TOKENS, dtype=torch.long)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        waiting = ledger.live_bytes - before
        total = (
            sum(output.hidden_states[-2].float().sum() for output in outputs) + outputs[-1][0].float().sum()
        )
        total.backward()
        del outputs, total
    for parameter in parameters:
        parameter.grad = None
    return ledger, waiting


def bytes_of_gradients(parameters: Sequence[nn.Parameter]) -> int:
    """What they take once a backward has filled them."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
