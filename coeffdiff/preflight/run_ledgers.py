"""A run's networks on the meta device, and ledgers of what passes through them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
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
from coeffdiff.preflight.text_dry_run import bytes_of_gradients, make_encoders_learnable, text_step
from coeffdiff.preflight.workload import Workload


@dataclass(frozen=True)
class RunLedgers:
    """What a run holds and computes. Sizes are bytes.

    weights: of each network by name as its files hold it, before it is quantized and anything learns on it.
    reading_bytes: the most that is held while networks are read.
    unet_bytes: of the UNet with what learns on it; unet_config: its architecture.
    text_bytes, text_numbers: of the text encoders, what they take and how many numbers they have.
    trained: how many numbers learn. states: of the optimizer.
    text_kept: of the text encoders, where they stay because something of the text learns, with gradients there.
    beside_unet: what a step finds there beside the UNet: the states, text_kept, and what waits for a backward there.
    step: one micro-batch. texts: its captions, where the text encoders train. teaching: the base model's forward for
    prior preservation. encoding: one photo.
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
    text_kept: int
    beside_unet: int
    step: Ledger
    texts: Ledger | None
    teaching: Ledger | None
    encoding: Ledger
    drawing: Ledger | None
    decoding: Ledger | None


def run_ledgers(work: Workload, base: Any, device: torch.device) -> RunLedgers:
    """Build the networks without numbers and pass through them what the run will. base: from find_backbone."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    networks = {name: network_on_meta(base, name, work.dtype) for name in base.networks}
    encoders = [networks[name] for name in base.family.text_networks]
    unet, vae = networks["unet"], networks["vae"]
    weights = {name: bytes_of(network) for name, network in networks.items()}

    kept = partial(optimizer_bytes, work.optimizer, work.optimizer_args, work.averaged)
    text_numbers = sum(count_numbers(encoder) for encoder in encoders)
    for encoder in encoders:
        narrow_layers(encoder, work.learned.quantize)
    narrow_layers(unet, work.learned.quantize)
    quantizes = quantizes_while_loading(replace(base, quantize=work.learned.quantize), "unet")
    read_as = bytes_of(unet) if quantizes else weights["unet"]
    reading = weights["vae"] + max(read_as, sum(weights[name] for name in base.family.text_networks))
    text_bytes = sum(bytes_of(encoder) for encoder in encoders)

    parameters = make_learnable(unet, work.learned)
    unet_bytes = bytes_of(unet)
    text_parameters = make_encoders_learnable(
        dict(zip(base.family.text_networks, encoders, strict=True)), work.text_learned
    )
    learning = [parameter.numel() for parameter in (*parameters, *text_parameters)]
    trained, states = sum(learning), kept(learning)
    text_kept = waiting = 0
    texts = None
    if work.learns_token:
        rows = [work.token_vectors * encoder.config.hidden_size for encoder in encoders]
        trained += sum(rows)
        states += kept(rows)
        waiting = sum(text_activations(encoder, work.rows, work.narrow) for encoder in encoders)
    if text_parameters:
        texts, waiting = text_step(encoders, text_parameters, rows=work.rows, device=kind)
    if work.learns_token or text_parameters:
        text_kept = sum(map(bytes_of, encoders)) + bytes_of_gradients(text_parameters)
    beside_unet = states + text_kept + waiting

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
        text_bytes,
        text_numbers,
        trained,
        states,
        text_kept,
        beside_unet,
        step,
        texts,
        teaching,
        encoding,
        drawing,
        decoding,
    )
