"""Weights in memory that is a network's own, wherever a library has put them."""

from __future__ import annotations

from typing import Any

import torch


def own_memory(network: Any) -> Any:
    """Copy the parameters, tensor by tensor; those that are quantized stay where they are.

    What is mapped from a file or read into whatever memory was free lies at any address, and CPU kernels add in another
    order over unaligned tensors: the same weights out of two files, or in two processes, would give other pictures and
    scores in the last bit. And a file that changes would change the network.
    """
    for weight in network.parameters():
        if type(weight.data) is torch.Tensor:
            weight.data = weight.data.clone()
    return network
