"""A run's networks on the meta device, and ledgers of what passes through them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from coeffdiff.models.architecture import network_on_meta
from coeffdiff.models.loading import quantizes_while_loading
from coeffdiff.preflight.costs import count_numbers, optimizer_bytes, text_activations
from coeffdiff.preflight.dry_run import (
    bytes_of,
    decode_picture,
    denoise_step,
    encode_photo,
    make_learnable,
    train_step,
)
from coeffdiff.preflight.ledger import Ledger
from coeffdiff.preflight.quantized import narrow_layers
from coeffdiff.preflight.workload import Workload

_ENCODERS = ("text_encoder", "text_encoder_2")
_NETWORKS = (*_ENCODERS, "vae", "unet")


@dataclass(frozen=True)
class RunLedgers:
    """What a run holds and computes. Sizes are bytes.

    weights: of each network by name as its files hold it, before it is quantized and anything learns on it.
    reading_bytes: the most that is held while networks are read.
    unet_bytes: of the UNet with what learns on it; unet_config: its architecture.
    text_bytes, text_numbers: of the two text encoders, what they take and how many numbers they have.
    trained: how many numbers learn. states: of the optimizer.
    beside_unet: what a step finds there beside the UNet: the states, and with a learned token the text encoders.
    step: one micro-batch. teaching: the base model's forward for prior preservation. encoding: one photo.
    drawing, decoding: one step and the VAE of a validation picture, None without any.
    """

    weights: dict[str, int]
    reading_bytes: int
    unet_bytes: int
    unet_config: Any
    text_bytes: int
    text_numbers: int
    trained: int
    states: int
    beside_unet: int
    step: Ledger
    teaching: Ledger | None
    encoding: Ledger
    drawing: Ledger | None
    decoding: Ledger | None


def run_ledgers(work: Workload, base: Any, device: torch.device) -> RunLedgers:
    """Build the networks without numbers and pass through them what the run will. base: from find_backbone."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    networks = {name: network_on_meta(base, name, work.dtype) for name in _NETWORKS}
    encoders, unet, vae = [networks[name] for name in _ENCODERS], networks["unet"], networks["vae"]
    weights = {name: bytes_of(network) for name, network in networks.items()}

    text_numbers = sum(count_numbers(encoder) for encoder in encoders)
    for encoder in encoders:
        narrow_layers(encoder, work.learned.quantize)
    narrow_layers(unet, work.learned.quantize)
    read_as = (
        bytes_of(unet)
        if quantizes_while_loading(replace(base, quantize=work.learned.quantize), "unet")
        else weights["unet"]
    )
    reading = weights["vae"] + max(read_as, sum(weights[name] for name in _ENCODERS))

    parameters = make_learnable(unet, work.learned)
    unet_bytes, trained = bytes_of(unet), sum(parameter.numel() for parameter in parameters)
    states = beside_unet = optimizer_bytes(work.optimizer, parameters)
    if work.learns_token:
        token_numbers = work.token_vectors * sum(encoder.config.hidden_size for encoder in encoders)
        trained += token_numbers
        states += 8 * token_numbers
        beside_unet = states + sum(
            bytes_of(encoder) + text_activations(encoder, work.rows, work.narrow) for encoder in encoders
        )

    def denoised(batch: int, rows: int, columns: int) -> Ledger:
        return denoise_step(unet, batch=batch, rows=rows, columns=columns, device=kind)

    largest, side = {"rows": work.latent_rows, "columns": work.latent_columns}, work.latent_side
    step = train_step(unet, parameters, device=kind, held=beside_unet, **work.step_arguments)
    teaching = denoised(work.batch, **largest) if work.teaches else None
    encoding = encode_photo(vae, **largest, device=kind)
    drawing = decoding = None
    if work.wants_pictures:
        drawing = denoised(work.picture_batch, side, side)
        decoding = decode_picture(vae, rows=side, columns=side, device=kind)
    return RunLedgers(
        weights,
        reading,
        unet_bytes,
        unet.config,
        sum(bytes_of(encoder) for encoder in encoders),
        text_numbers,
        trained,
        states,
        beside_unet,
        step,
        teaching,
        encoding,
        drawing,
        decoding,
    )
