"""Which of a pipeline's networks a name in an adapter's files belongs to: the UNet, or one of its text encoders.

Layers of the UNet stand in a COEFF_FILE under their own names, and in a LORA_FILE behind "unet.". Those of a text
encoder stand in both behind the name that a pipeline has for it: text_encoder_2.text_model.encoder.layers.0.self_attn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from coeffdiff.method.families import SDXL

V = TypeVar("V")

UNET = "unet"
TEXT_ENCODERS = SDXL.text_networks  # of all families, in the order of a pipeline


def network_of(name: str) -> str:
    """The network of a layer, or of a tensor in one: "unet" or one of TEXT_ENCODERS."""
    first = name.partition(".")[0]
    return first if first in TEXT_ENCODERS else UNET


def of_network(named: Mapping[str, V], network: str) -> dict[str, V]:
    """What is one network's, by the names within it."""
    return {
        name.removeprefix(f"{network}."): value
        for name, value in named.items()
        if network_of(name) == network
    }


def encoders_in(names: Iterable[str]) -> tuple[str, ...]:
    """The text encoders that any of the names belong to, in the pipeline's order."""
    found = {network_of(name) for name in names}
    return tuple(encoder for encoder in TEXT_ENCODERS if encoder in found)
