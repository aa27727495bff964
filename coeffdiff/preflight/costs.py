"""Measured constants, and counts of what is no operation of the UNet: optimizer, text encoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from coeffdiff.config.optimizers import state_bytes
from coeffdiff.preflight.ledger import TOKENS

# Measured on Linux with glibc, one thread, pocket at batch 1 to 16, 128 and 256 px (scripts/bench/check.py): how far
# the heap grows for each byte that tensors of a step hold at once, and for each byte of an operator's buffers, which
# come and go between tensors that stay. glibc gives little of that back before the end.
HEAP_FACTOR, HEAP_SCRATCH = 1.6, 2.2
LIBRARIES_BYTES = 50 * 2**20  # what they load and keep once they are used
# Workspaces of cuBLAS and cuDNN. Not measured: no GPU was at hand.
GPU_WORKSPACE = 256 * 2**20
# Building four networks and reading their weights, which lie in the system's cache or on a fast disk.
LOADING_SECONDS, LOADING_BYTES_A_SECOND = 1.0, 1e9


def text_activations(encoder: Any, batch: int, narrow: torch.dtype | None) -> int:
    """Bytes that a text encoder keeps for its backward, by the count of Korthikanti et al. 2022 (arXiv 2205.05198,
    section 4.1): 34 s b h + 5 a s^2 b for each layer in half precision, twice that in float32."""
    config, tokens = encoder.config, TOKENS
    layer = 34 * tokens * batch * config.hidden_size + 5 * config.num_attention_heads * tokens**2 * batch
    return config.num_hidden_layers * layer * (1 if narrow else 2)


def optimizer_bytes(optimizer: str, arguments: dict[str, Any], averaged: bool, sizes: Sequence[int]) -> int:
    """What an optimizer keeps of trained tensors, and what their average takes, if one is kept.

    arguments: training.optimizer_args. sizes: how many numbers each tensor has.
    """
    kept = sum(state_bytes(optimizer, arguments, size) * count for size, count in Counter(sizes).items())
    return kept + (4 * sum(sizes) if averaged else 0)


def count_numbers(network: Any) -> int:
    return sum(weight.numel() for weight in network.parameters())
