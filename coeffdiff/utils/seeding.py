"""Seeds that depend on what is drawn, never on when or where: the ground under determinism."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stable_seed(*parts: object) -> int:
    """A seed in [0, 2**63) from any printable parts, equal on every machine and in every process.

    Python's own hash() of strings differs from process to process; this one does not.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(*parts: object) -> torch.Generator:
    """A CPU generator seeded by stable_seed(parts). Draw on the CPU and move, so that devices agree."""
    import torch

    return torch.Generator("cpu").manual_seed(stable_seed(*parts))
