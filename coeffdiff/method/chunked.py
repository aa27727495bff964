"""Mixed attention in rows of queries whose maps fit into a cache: the backend that runs anywhere.

Letters as in attention.py. Forward and backward go through the rows once, and backward computes the maps anew, so
that nothing of size H x Q x K is ever stored; what is, are a few buffers of H x rows x K, used over and over.

What did not help on a CPU: keeping the log-sum-exp of the scores for backward, which takes twice as long to compute
as the whole in-place softmax.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

# On a GPU every chunk costs a dozen kernel launches: few large ones, as memory allows.
GPU_CHUNK_BYTES = 256 * 2**20
# Products of few rows are slow, so a chunk is half of the last cache, not what the second holds: with 10 heads and
# 4,096 keys a mebibyte is 6 rows, and took three times as long as 16 MiB on one core of an AMD EPYC.
MOST_CHUNK_BYTES = 32 * 2**20
UNKNOWN_CACHE_BYTES = 8 * 2**20
_LINUX_CACHES = "/sys/devices/system/cpu/cpu0/cache"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    room: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] in q's dtype, contiguous, and nothing else that backward would need (a tensor of no size).

    The softmax and the mixing run in float32, or float64 for float64 inputs.

    Args:
        room: bytes of one chunk's maps; chunk_bytes by default.
    """
    queries, keys, values, coeff = _prepared(q, k, v, coeff)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    maps_buffer, mixed_buffer = _buffers(2, q, k, queries.dtype, room)
    for rows in _chunks(q, k, room):
        maps = _maps(queries[:, :, rows] * scale, keys, mask, rows, maps_buffer)
        out[:, :, rows] = _mix(coeff, maps, mixed_buffer) @ values
    return out, q.new_empty(0, dtype=queries.dtype)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    _nothing: Tensor,
    scale: float,
    *,
    room: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and coeff, in their dtypes, contiguous; room as in forward. Equations: attention.py."""
    queries, keys, values, c = _prepared(q, k, v, coeff)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv, dcoeff = torch.zeros_like(keys), torch.zeros_like(values), torch.zeros_like(c)
    maps_buffer, mixed_buffer, grad_buffer = _buffers(3, q, k, queries.dtype, room)
    for rows in _chunks(q, k, room):
        some, d_out = queries[:, :, rows] * scale, grad[:, :, rows].to(queries.dtype)
        maps = _maps(some, keys, mask, rows, maps_buffer)
        _add_product(dv, _mix(c, maps, mixed_buffer).transpose(2, 3), d_out)
        d_mixed = _room(mixed_buffer, *maps.shape)
        torch.matmul(d_out, values.transpose(2, 3), out=d_mixed)
        dcoeff += (d_mixed.flatten(2) @ maps.flatten(2).transpose(1, 2)).sum(0)
        d_maps = _mix(c.T, d_mixed, grad_buffer)
        # dS = A * (dA - rowsum(dA * A)) in one pass
        torch.ops.aten._softmax_backward_data.out(d_maps, maps, -1, maps.dtype, grad_input=d_maps)
        dq[:, :, rows] = (d_maps @ keys).mul_(scale)
        _add_product(dk, d_maps.transpose(2, 3), some)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dcoeff.to(coeff.dtype)


def _prepared(q: Tensor, k: Tensor, v: Tensor, coeff: Tensor) -> list[Tensor]:
    """All four wide, and contiguous, since a batched product would copy other strides again for every chunk."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return [tensor.detach().to(wide).contiguous() for tensor in (q, k, v, coeff)]


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other, all [B, H, ...], without a copy."""
    total.flatten(0, 1).baddbmm_(one.flatten(0, 1), other.flatten(0, 1))


def _buffers(count: int, q: Tensor, k: Tensor, dtype: torch.dtype, room: int | None) -> list[Tensor]:
    """Room for the maps of one chunk, `count` times."""
    size = q.shape[0] * q.shape[1] * rows_of_a_chunk(q, k, room) * k.shape[2]
    return [q.new_empty(size, dtype=dtype) for _ in range(count)]


def _maps(some: Tensor, keys: Tensor, mask: Tensor | None, rows: slice, buffer: Tensor) -> Tensor:
    """Attention maps [B, H, rows, K] of scaled queries [B, H, rows, D]; mask as mixed_attention has it, with 4 axes."""
    maps = _room(buffer, *some.shape[:3], keys.shape[2])
    torch.bmm(some.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out=maps.flatten(0, 1))
    if mask is not None:
        maps += mask if mask.shape[2] == 1 else mask[:, :, rows]
    return torch.softmax(maps, -1, out=maps)


def _mix(coeff: Tensor, maps: Tensor, buffer: Tensor) -> Tensor:
    """[H, H] x [B, H, rows, K] -> [B, H, rows, K]: one matrix product over the flattened maps."""
    mixed = _room(buffer, *maps.shape)
    torch.bmm(coeff.expand(len(maps), -1, -1), maps.flatten(2), out=mixed.flatten(2))
    return mixed


def _room(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _chunks(q: Tensor, k: Tensor, room: int | None = None) -> Iterator[slice]:
    rows = rows_of_a_chunk(q, k, room)
    for start in range(0, q.shape[2], rows):
        yield slice(start, min(start + rows, q.shape[2]))


def rows_of_a_chunk(q: Tensor, k: Tensor, room: int | None = None) -> int:
    """How many queries, with the maps of all heads and batch entries, fit into `room`; at least one."""
    a_row = q.shape[0] * q.shape[1] * k.shape[2] * 4
    return max(1, min(q.shape[2], (room or chunk_bytes(q.device)) // max(a_row, 1)))


def chunk_bytes(device: torch.device) -> int:
    """Room for one chunk's maps: on a CPU half of its last cache, so that two buffers fit."""
    return min(cache_bytes() // 2, MOST_CHUNK_BYTES) if device.type == "cpu" else GPU_CHUNK_BYTES


@functools.cache
def cache_bytes() -> int:
    """The last cache before memory, as the system tells it."""
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        if sys.platform == "linux":
            sizes = [file.read_text().strip() for file in Path(_LINUX_CACHES).glob("index*/size")]
            units = {"K": 2**10, "M": 2**20}
            return max(int(size.rstrip("KM")) * units.get(size[-1], 1) for size in sizes)
        if sys.platform == "darwin":
            told = subprocess.run(["sysctl", "-n", "hw.l2cachesize"], capture_output=True, text=True)
            return int(told.stdout)
    return UNKNOWN_CACHE_BYTES
