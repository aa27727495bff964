"""Options that reduce the memory of sampling. Loads no torch, so that the command line can declare them."""

from __future__ import annotations

from typing import Literal

from coeffdiff.utils.oom import smaller_side

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Offload = Literal["none", "model", "sequential"]


def sampling_switches(
    *,
    batch_size: int,
    offload: str,
    precision: str,
    quantize: str | None,
    size: tuple[int, int],
    device_type: str,
) -> list[str]:
    """The options that would still reduce memory. precision: fp32, fp16 or bf16; quantize: of the base model;
    size: (width, height) in pixels."""
    found = []
    if batch_size > 1:
        found.append("--batch-size 1")
    if precision == "fp32":
        found.append(f"--precision {half_precision_name(device_type)}")
    if device_type != "cpu" and offload == "none":
        found.append("--offload model")
    elif device_type != "cpu" and offload == "model" and not quantize:
        found.append("--offload sequential")
    if device_type in ("cpu", "cuda") and not quantize and offload != "sequential":
        found.append("--quantize int8")
    smaller = tuple(smaller_side(side) for side in size)
    if smaller != size:
        found.append(f"--width {smaller[0]} --height {smaller[1]}")
    return found


def half_precision_name(device_type: str) -> str:
    from coeffdiff.utils.torch_setup import half_precision  # loads torch

    return half_precision(device_type)
