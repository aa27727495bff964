"""The device, precision and offloading of a pipeline."""

from __future__ import annotations

from typing import Any

import torch

from coeffdiff.errors import ConfigError
from coeffdiff.hosts.diffusers import loaded_adapters
from coeffdiff.hosts.guard import unwrapped
from coeffdiff.hosts.quantized import quantized_layers
from coeffdiff.hosts.text_encoders import encoders_on
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.sampling.memory_options import Offload, Precision
from coeffdiff.sampling.vae_precision import cast_to, needs_upcast
from coeffdiff.utils.torch_setup import DTYPES, compile_blocks, has_bf16, prepare_kernels


def choose_device(
    precision: Precision = "auto", device: torch.device | None = None
) -> tuple[torch.device, torch.dtype]:
    """The fastest device, and its dtype: with "auto" bfloat16 or float16 on CUDA, float32 elsewhere.

    device: one that is already assigned, for instance to this process among several.
    """
    if device is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = torch.device("cuda" if torch.cuda.is_available() else mps)
    half = torch.float32
    if device.type == "cuda":
        half = torch.bfloat16 if has_bf16() else torch.float16
    return device, half if precision == "auto" else DTYPES[precision]


def prepare_device(
    pipe: Any, device: torch.device | str, offload: Offload = "none", *, compiled: bool = False
) -> None:
    """Move the pipeline to `device`, or let diffusers move its parts there when they are needed.

    Load adapters first: under sequential offload the UNet has no weights to compare them with.

    Args:
        compiled: torch.compile the UNet's blocks at the first picture (see torch_setup.compile_blocks).
    Raises: ConfigError for offload without a GPU, for a DoRA or quantized weights under sequential offload, or where
        nothing can be compiled.
    """
    device = torch.device(device)
    refuse_offload(device, offload)
    if compiled and offload == "sequential":
        raise ConfigError(
            "--compile needs the UNet in one place: it cannot be used with --offload sequential."
        )
    if offload == "sequential" and quantized_layers(pipe.unet):
        raise ConfigError(
            "--offload sequential moves single weights, which quantized ones are not: use --offload model, or "
            "--quantize none."
        )
    prepare_kernels(device, pipe.unet.dtype, pipe.unet, pipe.vae)
    if compiled:
        compile_blocks(pipe.unet, device)
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        _offload_sequentially(pipe, device)


def refuse_offload(device: torch.device, offload: Offload) -> None:
    """Raises: ConfigError for offload without a GPU."""
    if offload not in ("none", "model", "sequential"):
        raise ConfigError(f"offload is none, model or sequential, not {offload!r}.")
    if offload != "none" and device.type == "cpu":
        raise ConfigError(
            f"--offload {offload} keeps parts of the model off a GPU, and no GPU is used here; leave it out."
        )


def _offload_sequentially(pipe: Any, device: torch.device) -> None:
    for adapter in loaded_adapters(pipe):
        if adapter.header.lora and adapter.header.lora.dora:
            # A hook loads a module's weights for its own forward; DoRA's magnitudes read other modules' weights
            raise ConfigError(
                f"{adapter.path} is a DoRA, which --offload sequential cannot run; use --offload model."
            )
    if needs_upcast(pipe.vae):  # once offloaded, it can no longer be cast
        cast_to(pipe.vae, torch.float32)
    pipe.enable_sequential_cpu_offload(device=device)
    from accelerate.hooks import remove_hook_from_module

    # Hooks load weights when a module's forward is called. A coefficient matrix has no forward call, so alpha would
    # stay on the meta device; all alphas of SDXL together take 200 KB.
    for network in (unwrapped(pipe.unet), *encoders_on(pipe).values()):
        for module in network.modules():
            if isinstance(module, Coefficients):
                remove_hook_from_module(module)
                module.to(device)
