"""Switches that make the same computation faster on a GPU, and none of its results worse: TF32, channels_last,
torch.compile, copies that nobody waits for."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from coeffdiff.errors import ConfigError


def prepare_kernels(device: torch.device, dtype: torch.dtype, *networks: Any) -> None:
    """What is known to help convolutions and matrices on `device`; nothing on a CPU, whose pictures stay bit-equal.

    In half precision little is left in float32 (a VAE that needs it, norms): it may be multiplied as TF32, which
    keeps as many digits as float16. Who asks for float32 gets float32. The mixing of attention maps never runs in
    TF32 (see method.attention).

    Args:
        networks: UNets and VAEs; their convolutions run on channels-last tensors, as tensor cores want them.
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

    The blocks are nearly all of SDXL's work, and alike: compiling one of each takes seconds, where the UNet as a
    whole takes minutes. The UNet itself stays a plain module, with its own names, hooks and checks. Scales and
    dropout masks are tensors, so that new ones compile nothing anew.

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
    # PEFT's DoRA looks at its weight's type by name, which dynamo cannot trace (torch 2.13, PEFT 0.21): such a block
    # becomes several graphs, as often as it has DoRA layers
    whole = not any("lora_magnitude_vector" in name for name, _ in unet.named_parameters())
    unet.compile_repeated_blocks(fullgraph=whole, backend=backend)


def copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; a GPU gets it in its own time, while the CPU goes on."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def has_bf16() -> bool:
    """Whether this GPU computes in bfloat16 by itself. Older ones (T4, V100) imitate it, slower than float32."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def half_precision(device_type: str) -> Literal["bf16", "fp16"]:
    """The 16 bits that a device computes in by itself."""
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
