"""Precisions by name, and what makes the same computation faster: TF32, channels_last, torch.compile, non-blocking
copies."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch._functorch.config as functorch
from torch import Tensor

from coeffdiff.errors import ConfigError

# Accelerate's "no" (no mixed precision) comes last: precision_name answers with the first
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


def precision_name(dtype: torch.dtype) -> str:
    """torch.float16 -> "fp16"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def prepare_kernels(device: torch.device, dtype: torch.dtype, *networks: Any) -> None:
    """Faster convolutions and matrix products on CUDA; no change elsewhere, so pictures on a CPU stay bit-equal.

    Beside half precision, the little that runs in float32 (a VAE that needs it, norms) may be multiplied as TF32,
    which keeps as many digits as float16. A float32 pipeline stays float32. The mixing of attention maps never runs
    in TF32 (see method.attention).

    Args:
        networks: UNets and VAEs; their weights become channels-last, the layout that tensor cores prefer.
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    if dtype != torch.float32:
        for network in networks:
            network.to(memory_format=torch.channels_last)


def compile_blocks(unet: Any, device: torch.device, *, backend: str = "inductor") -> None:
    """torch.compile the UNet's transformer blocks in place, once for all blocks of a shape.

    The blocks do nearly all of SDXL's work and are alike: compiling one of each takes seconds, the whole UNet takes
    minutes. The UNet itself stays a plain module with its own names, hooks and checks. Scales and dropout masks are
    tensors, so new values do not recompile.

    Args:
        device: where it will run.
    Source: "regional compilation" in PyTorch's recipes.
    Raises: ConfigError where nothing can be compiled.
    """
    if backend == "inductor" and not _can_compile(device):
        raise ConfigError(
            "torch.compile finds no compiler here (it needs Triton for a GPU and a C++ compiler for a CPU): "
            "leave compile off."
        )
    # Blocks of 640 and 1280 channels, with and without gradients, at several sizes of pictures: SDXL needs more
    # variants of one block than dynamo's default of 8 leaves room for.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # As without compiling: a backward pass that is traced under autocast would do the float32 products of the maps in
    # bfloat16 (torch 2.13: not finite on a CPU, beside LoRA). Older versions have no choice
    if hasattr(functorch, "backward_pass_autocast"):
        functorch.backward_pass_autocast = "off"
    # PEFT's DoRA looks at its weight's type by name, which dynamo cannot trace (torch 2.13, PEFT 0.21): such a block
    # becomes several graphs, as often as it has DoRA layers
    whole = not any("lora_magnitude_vector" in name for name, _ in unet.named_parameters())
    unet.compile_repeated_blocks(fullgraph=whole, backend=backend)


def copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; a copy to a GPU does not block the CPU."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def has_bf16() -> bool:
    """Whether this GPU supports bfloat16 in hardware. Older ones (T4, V100) emulate it, slower than float32."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def half_precision(device_type: str) -> Literal["bf16", "fp16"]:
    """The 16-bit precision that a device supports in hardware."""
    return "fp16" if device_type == "cuda" and not has_bf16() else "bf16"


def _can_compile(device: torch.device) -> bool:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
