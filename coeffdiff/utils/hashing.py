"""Hashes of tensors and of plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def hash_tensors(digest: Any, named: Iterable[tuple[str, Tensor]]) -> None:
    """Feed names, dtypes, shapes and numbers to a digest of hashlib, in order; on any device, bit for bit."""
    for name, tensor in named:
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's: what it is made of
            parts, _ = tensor.__tensor_flatten__()
            hash_tensors(digest, ((f"{name}.{part}", getattr(tensor, part)) for part in parts))
            continue
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def hash_of(*parts: Any) -> str:
    """16 hexadecimal digits of anything that JSON holds; of other values what str() makes of them."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
