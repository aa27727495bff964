"""Weights that a library has put anywhere."""

from __future__ import annotations

import torch
from torch import nn

from coeffdiff.utils.own_memory import own_memory


def test_weights_are_aligned_and_stay_what_they_were():
    """Tied ones stay tied."""
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5))
    network[1].weight = network[0].weight
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for weight in network.parameters():
        room = torch.empty(weight.numel() + 1)[1:].view(weight.shape)
        weight.data = room.copy_(weight.data)
        assert weight.data_ptr() % 64
    assert own_memory(network) is network
    for name, value in network.state_dict().items():
        assert value.data_ptr() % 64 == 0 and torch.equal(value, before[name]), name
    assert network[1].weight.data_ptr() == network[0].weight.data_ptr()
