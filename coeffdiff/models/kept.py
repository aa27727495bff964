"""A base model that stays in memory: read once, lent to one training or pipeline after another.

What is lent has modules of its own around the kept numbers. So alpha, LoRA, tokens, hooks, compiled code, modes and
devices are put on the loan alone, and nothing has to be taken off or set back: a loan is dropped, and the next one is
as if it had just been read. On a GPU a loan's numbers are copies there, and the kept ones stay in the machine's memory.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from coeffdiff.models.files import weight_files
from coeffdiff.models.loading import assembled, network_names, read_networks
from coeffdiff.models.source import Backbone, Part


class KeptModel:
    """One base model in one precision at a time; another one that is asked for takes its place.

    reads: how often a network was read from its files.
    """

    def __init__(self) -> None:
        self.reads = 0
        self._model: tuple[Any, ...] | None = None
        self._networks: dict[str, tuple[Any, nn.Module]] = {}  # what its files were, the network

    def load(self, backbone: Backbone, *, dtype: torch.dtype, parts: Collection[Part] | None = None) -> Any:
        """As load_pipeline; networks that were read before, from files that are still the same, are not read again."""
        # Not its variant: which files that chooses is seen at each network
        model = (
            backbone.name,
            backbone.kind,
            backbone.source.folder,
            backbone.file,
            backbone.quantize,
            dtype,
        )
        if self._model != model:
            self._networks.clear()
            self._model = model
        names = network_names(backbone, parts)
        lacking = [name for name in names if self._outdated(backbone, dtype, name)]
        for name in lacking:
            self._networks.pop(name, None)  # before its successor comes
        for name, network in read_networks(backbone, dtype, lacking).items():
            self._networks[name] = (_files(backbone, dtype, name), network)
        self.reads += len(lacking)
        return assembled(backbone, {name: lent(self._networks[name][1]) for name in names})

    def _outdated(self, backbone: Backbone, dtype: torch.dtype, name: str) -> bool:
        return name not in self._networks or self._networks[name][0] != _files(backbone, dtype, name)


def lent(network: nn.Module) -> Any:
    """A copy of a frozen network that shares the memory of its parameters, which nobody writes to.

    Quantized parameters, whose classes do not survive a new nn.Parameter, are shared as they are.
    """
    shared = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False)
        if type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
        else parameter
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, shared)


def _files(backbone: Backbone, dtype: torch.dtype, name: str) -> list[tuple[str, int, int]]:
    """What tells that files were replaced meanwhile: their paths, sizes and times."""
    files = [file for file, _ in weight_files(backbone, name, dtype)]
    return [(str(file), (now := file.stat()).st_size, now.st_mtime_ns) for file in files]
