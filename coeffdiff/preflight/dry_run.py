"""Parts of a run on the meta device: the real networks without numbers, and what passes through them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject
from coeffdiff.method.coefficients import Mixes
from coeffdiff.method.families import family_of_unet
from coeffdiff.method.number_formats import Quantized
from coeffdiff.models.pipelines import conditions
from coeffdiff.preflight.ledger import TOKENS, AsOnDevice, Ledger, ledger_for
from coeffdiff.preflight.quantized import narrow_layers
from coeffdiff.utils.console import quiet_libraries


@dataclass(frozen=True)
class Learned:
    """The trained parts on a UNet. rank None: no LoRA; targets None: no alpha; the rest as in settings.method.

    quantize: how the linear layers below them are quantized.
    """

    rank: int | None
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    dora: bool = False
    targets: Any = None
    blocks: tuple[str, ...] | None = None
    backend: str = "auto"
    mixes: Mixes = "maps"
    quantize: Quantized | None = None


def make_learnable(unet: Any, learned: Learned) -> list[nn.Parameter]:
    """Put the trained parts on a UNet on meta, as training does: in float32, everything else frozen."""
    unet.requires_grad_(False)
    narrow_layers(unet, learned.quantize)
    parameters: list[nn.Parameter] = []
    if learned.rank is not None:
        lora = add_lora(
            unet, rank=learned.rank, alpha=learned.rank, targets=learned.lora_targets, dora=learned.dora
        )
        parameters += lora.values()
    if learned.targets is not None:
        # The fused kernels run on GPUs alone; what they save over chunks is their buffers
        backend = "chunked" if learned.backend == "fused" else learned.backend
        layers = inject(
            unet, targets=learned.targets, blocks=learned.blocks, backend=backend, mixes=learned.mixes
        )
        parameters += (layer.alpha for layer in layers.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return parameters


def train_step(
    unet: Any,
    parameters: list[nn.Parameter],
    *,
    batch: int,
    rows: int,
    columns: int,
    device: str,
    narrow: torch.dtype | None,
    checkpointing: bool,
    held: int = 0,
    through_text: bool = False,
) -> Ledger:
    """Forward and backward of one micro-batch, the gradients of earlier ones in memory, without the optimizer's step.

    Args:
        unet: on meta, from make_learnable. parameters: what learns on it.
        rows, columns: of the latents.
        narrow: what autocast computes in; None: without autocast.
        held: bytes that something else holds all the while, such as the optimizer's states.
        through_text: whether the backward continues into the text embeddings.
    """
    if checkpointing:
        # A function mode is off during backward, so what is run again there needs its own
        again = partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), AsOnDevice(device, narrow))
        )
        unet.enable_gradient_checkpointing(again)
    else:
        unet.disable_gradient_checkpointing()
    unet.train()
    with ledger_for(device, narrow) as ledger:
        ledger.hold(unet.parameters())
        ledger.hold(unet.buffers())
        ledger.hold_bytes(held)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        inputs = unet_inputs(unet, batch, rows, columns, torch.float32)
        inputs["encoder_hidden_states"].requires_grad_(through_text)
        if "added_cond_kwargs" in inputs:
            inputs["added_cond_kwargs"]["text_embeds"].requires_grad_(through_text)
        loss = F.mse_loss(unet(**inputs).sample.float(), torch.empty_like(inputs["sample"]))
        loss.backward()
        del loss, inputs
    for parameter in parameters:
        parameter.grad = None
    return ledger


def real_step(
    config: Any,
    learned: Learned,
    *,
    batch: int,
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    narrow: torch.dtype | None = None,
    checkpointing: bool = False,
    through_text: bool = False,
) -> tuple[Callable[[], None], list[nn.Parameter]]:
    """The step that train_step only counts, to be run: forward and backward on weights without meaning.

    config: of the UNet. Returns: the step, and the parameters that it trains; the text where only that learns.
    """
    with quiet_libraries(), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).to(dtype)
        narrow_layers(unet, learned.quantize)
    unet.to_empty(device=device)
    with torch.no_grad():
        for weight in (*unet.parameters(), *unet.buffers()):
            weight.fill_(0.01)
    parameters = make_learnable(unet, learned)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    with torch.device(device):
        inputs = unet_inputs(unet, batch, rows, columns, torch.float32)
    inputs["timestep"].zero_()
    text = nn.Parameter(inputs["encoder_hidden_states"], requires_grad=through_text)
    inputs["encoder_hidden_states"] = text

    def run() -> None:
        with torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
            loss = unet(**inputs).sample.float().square().mean()
        loss.backward()

    return run, parameters or [text]


@torch.no_grad()
def denoise_step(unet: Any, *, batch: int, rows: int, columns: int, device: str) -> Ledger:
    """One call of the UNet for pictures; batch: pictures, twice with guidance."""
    unet.eval()
    with ledger_for(device) as ledger:
        ledger.hold(unet.parameters())
        ledger.hold(unet.buffers())
        unet(**unet_inputs(unet, batch, rows, columns, unet.dtype))
    return ledger


def unet_inputs(unet: Any, batch: int, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a UNet's call, on torch's default device; their numbers mean nothing."""
    config, pooled = unet.config, 0
    if family_of_unet(config).pools:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.empty(batch, config.in_channels, rows, columns, dtype=dtype),
        "timestep": torch.empty(batch, dtype=torch.long),
        "encoder_hidden_states": torch.empty(batch, TOKENS, config.cross_attention_dim, dtype=dtype),
        **conditions(torch.empty(batch, pooled, dtype=dtype), torch.empty(batch, 6, dtype=dtype)),
    }


@torch.no_grad()
def encode_photo(vae: Any, *, rows: int, columns: int, device: str) -> Ledger:
    """One photo through the VAE; rows and columns of the latents."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    with ledger_for(device) as ledger:
        ledger.hold(vae.parameters())
        vae.encode(torch.empty(1, 3, rows * factor, columns * factor, dtype=vae.dtype))
    return ledger


@torch.no_grad()
def decode_picture(vae: Any, *, rows: int, columns: int, device: str) -> Ledger:
    """One picture out of the VAE; rows and columns of the latents."""
    with ledger_for(device) as ledger:
        ledger.hold(vae.parameters())
        vae.decode(torch.empty(1, vae.config.latent_channels, rows, columns, dtype=vae.dtype))
    return ledger


def bytes_of(network: nn.Module) -> int:
    """What a network's weights and buffers take in their types."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
