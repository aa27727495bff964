"""Mixed attention in chunks of rows whose maps fit into a cache: the backend that runs anywhere.

Letters as in attention.py. A chunk is some batch entries with all their queries, or some queries of one entry.
Forward and backward go through the chunks once, and backward computes the maps again, so that nothing of size
H x Q x K is ever stored; what is, are a few buffers of one chunk, used over and over.

Small layers on a CPU go to eager.py. What did not help on a CPU: keeping the maps of small layers for backward here, or
an autograd.Function in place of the operator (pocket's steps took as long); keeping the log-sum-exp of the scores for
backward, which takes twice as long to compute as the whole in-place softmax; the mixing as products over blocks of
columns, as a convolution of width one, or with the heads last (none beats one product over the flattened maps); dcoeff
of many heads by rows alone, without taking the heads apart.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

# On a GPU every chunk costs a dozen kernel launches: few large ones, as memory allows.
GPU_CHUNK_BYTES = 256 * 2**20
# On a CPU two buffers should stay in the cache of a core. Products of few rows are slow, though: a chunk has so many
# rows at least, as long as its maps fit into half of the last cache.
CPU_CHUNK_BYTES = 3 * 2**19
CPU_CHUNK_ROWS = 256
MOST_CHUNK_BYTES = 32 * 2**20
UNKNOWN_CACHE_BYTES = 8 * 2**20
LONG_SUM = 1024  # queries
# How the product that gives dcoeff is taken apart: measured with MKL on an Intel Xeon
LONG_PRODUCT = 2**15
SHORT_ROW = 256
MANY_HEADS = 16
HEAD_GROUP = 10
_LINUX_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_scratch = threading.local()


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
    """Output [B, H, Q, D] in q's dtype, heads side by side, and nothing for backward (a tensor of no size).

    The softmax and the mixing run in float32, or float64 for float64 inputs.

    Args:
        room: bytes of one chunk's maps; see chunk_shape.
    """
    heads = q.shape[1]
    queries, keys, values = _wide(q), _wide(k, scale), _wide(v)
    out, buffers = heads_beside(q), _buffers(2, q, k, room)
    for entries, rows in _chunks(q, k, room):
        maps, mixed = _cut(buffers, entries, rows, k.shape[2])
        _fill_maps(maps, queries[entries, rows], keys[entries], mask, heads, entries, rows)
        _mix(coeff, maps, mixed)
        _put(out, entries, rows, torch.bmm(mixed, values[entries]))
    return out, queries.new_empty(0)


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
    """Gradients of q, k, v and coeff, in their dtypes, heads side by side; room as in forward.

    Equations: attention.py. Those of k and v are summed as [H, D, K] where there are many queries, since the maps are
    then read along their rows.
    """
    heads = q.shape[1]
    queries, keys, values, grads = _wide(q), _wide(k, scale), _wide(v), _wide(grad)
    dq, across = heads_beside(q), q.shape[2] >= LONG_SUM
    dk, dv = (x.new_empty(x.mT.shape).mT if across else torch.empty_like(x) for x in (keys, values))
    dcoeff = torch.zeros(coeff.shape, dtype=coeff.dtype, device=coeff.device)
    buffers = _buffers(3, q, k, room)
    for entries, rows in _chunks(q, k, room):
        maps, mixed, d_maps = _cut(buffers, entries, rows, k.shape[2])
        some, d_out, first = queries[entries, rows], grads[entries, rows], rows.start == 0
        _fill_maps(maps, some, keys[entries], mask, heads, entries, rows)
        _mix(coeff, maps, mixed)
        _add_product(dv[entries], mixed.mT, d_out, first)
        d_mixed = torch.bmm(d_out, values[entries].mT, out=mixed)
        _add_coeff(dcoeff, d_mixed, maps)
        _mix(coeff.T, d_mixed, d_maps)
        # dS = A * (dA - rowsum(dA * A)) in one pass
        torch.ops.aten._softmax_backward_data.out(d_maps, maps, -1, maps.dtype, grad_input=d_maps)
        _put(dq, entries, rows, torch.bmm(d_maps, keys[entries]))
        _add_product(dk[entries], d_maps.mT, some, first)
    d_keys = torch.mul(dk.unflatten(0, k.shape[:2]), scale, out=heads_beside(k))
    return dq, d_keys, heads_beside(v).copy_(dv.unflatten(0, v.shape[:2])), dcoeff


def heads_beside(like: Tensor) -> Tensor:
    """Empty, [B, H, T, D] as a view of [B, T, H, D]: the layout in which a layer's projections take and give heads."""
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _wide(tensor: Tensor, scale: float = 1.0) -> Tensor:
    """[B, H, T, D] -> [B * H, T, D], times scale, float32 at least, contiguous: one copy here for one in every
    batched product."""
    wide, shape = torch.promote_types(tensor.dtype, torch.float32), (-1, *tensor.shape[2:])
    if scale == 1:
        return tensor.to(wide).reshape(shape)
    scaled = torch.empty(tensor.shape, dtype=wide, device=tensor.device)
    return torch.mul(tensor.to(wide), scale, out=scaled).view(shape)


def _buffers(count: int, q: Tensor, k: Tensor, room: int | None) -> tuple[Tensor, ...]:
    """Room for the maps of one chunk, `count` times.

    A CPU keeps it from call to call, a few MiB for each thread that calls: memory that the system has just handed out
    is slower to write to than the mixing takes.
    """
    entries, rows = chunk_shape(q, k, room)
    size, dtype = entries * q.shape[1] * rows * k.shape[2], torch.promote_types(q.dtype, torch.float32)
    if q.device.type != "cpu":
        fresh: tuple[Tensor, ...] = torch.empty(count, size, dtype=dtype, device=q.device).unbind()
        return fresh
    kept = getattr(_scratch, "buffer", None)
    if kept is None or kept.numel() < count * size * dtype.itemsize:
        with torch.inference_mode(False):  # else no call outside of it could write there
            kept = _scratch.buffer = torch.empty(3 * size * dtype.itemsize, dtype=torch.uint8)
    buffers: tuple[Tensor, ...] = kept[: count * size * dtype.itemsize].view(dtype).view(count, size).unbind()
    return buffers


def _cut(buffers: tuple[Tensor, ...], entries: slice, rows: slice, keys: int) -> tuple[Tensor, ...]:
    """The part of each buffer that a chunk needs, [entries * H, rows, K]."""
    shape = entries.stop - entries.start, rows.stop - rows.start, keys
    return tuple(buffer[: math.prod(shape)].view(shape) for buffer in buffers)


def _fill_maps(
    maps: Tensor, queries: Tensor, keys: Tensor, mask: Tensor | None, heads: int, entries: slice, rows: slice
) -> None:
    """Softmax of queries x keys, which are scaled already; mask [1 or B, 1 or H, 1 or Q, 1 or K], added."""
    torch.bmm(queries, keys.mT, out=maps)
    if mask is not None:
        scores = maps.view(-1, heads, *maps.shape[1:])
        own = mask if mask.shape[0] == 1 else mask[entries.start // heads : entries.stop // heads]
        scores += own if own.shape[2] == 1 else own[:, :, rows]
    torch.softmax(maps, -1, out=maps)


def _mix(coeff: Tensor, maps: Tensor, mixed: Tensor) -> None:
    """mixed = coeff x maps, [H, H] x [B, H, rows * K]: one matrix product over the flattened maps of an entry."""
    heads = len(coeff)
    flat = _by_head(maps, heads)
    torch.bmm(coeff.expand(len(flat), heads, heads), flat, out=_by_head(mixed, heads))


def _by_head(maps: Tensor, heads: int) -> Tensor:
    """[B * H, rows, K] -> [B, H, rows * K]."""
    return maps.view(-1, heads, maps.shape[1] * maps.shape[2])


def _put(out: Tensor, entries: slice, rows: slice, product: Tensor) -> None:
    """product [b * H, rows, D] into its place in out [B, H, T, D]."""
    heads = out.shape[1]
    part = out[entries.start // heads : entries.stop // heads, :, rows]
    part.copy_(product.view(part.shape))


def _add_product(total: Tensor, one: Tensor, other: Tensor, first: bool) -> None:
    """total += one @ other; `first` into its place instead, since an addition is taken apart into many products."""
    if not total.is_contiguous():
        total, one, other = total.mT, other.mT, one.mT
    if first:
        torch.bmm(one, other, out=total)
    else:
        total.baddbmm_(one, other)


def _add_coeff(total: Tensor, d_mixed: Tensor, maps: Tensor) -> None:
    """total[h, g] += <d_mixed[h], maps[g]>.

    Few heads over many numbers: libraries are slow at such a product. Taken apart by rows, and above MANY_HEADS by
    groups of heads, it takes half the time or less.
    """
    heads, (_, rows, keys) = len(total), maps.shape
    if maps.device.type != "cpu" or (rows * keys < LONG_PRODUCT and heads <= MANY_HEADS):
        total += torch.bmm(_by_head(d_mixed, heads), _by_head(maps, heads).mT).sum(0)
        return
    step = heads if heads <= MANY_HEADS else HEAD_GROUP
    cut = (-1, heads, rows, keys) if keys >= SHORT_ROW else (-1, heads, 1, rows * keys)
    for one, other in zip(d_mixed.view(cut), maps.view(cut), strict=True):
        left, right = one.transpose(0, 1), other.permute(1, 2, 0)
        for h in range(0, heads, step):
            for g in range(0, heads, step):
                part = torch.bmm(left[:, h : h + step], right[..., g : g + step])
                total[h : h + step, g : g + step] += part.sum(0)


def _chunks(q: Tensor, k: Tensor, room: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Of each chunk the maps of its batch entries, as a slice of B * H, and its queries; entry by entry."""
    heads, (entries, rows) = q.shape[1], chunk_shape(q, k, room)
    for entry in range(0, q.shape[0], entries):
        for row in range(0, q.shape[2], rows):
            stop = min(entry + entries, q.shape[0])
            yield slice(entry * heads, stop * heads), slice(row, min(row + rows, q.shape[2]))


def chunk_shape(q: Tensor, k: Tensor, room: int | None = None) -> tuple[int, int]:
    """Batch entries and queries whose maps of all heads fit into `room` bytes (chunk_bytes); at least one of each."""
    batch, heads, queries, _ = q.shape
    a_row = max(1, heads * k.shape[2] * 4)
    room = chunk_bytes(q.device, a_row) if room is None else room
    rows = max(1, min(queries, room // a_row))
    rows = -(-queries // -(-queries // rows))  # as many in each chunk
    entries = max(1, min(batch, room // (a_row * rows))) if rows == queries else 1
    return entries, rows


def chunk_bytes(device: torch.device, a_row: int) -> int:
    """Room for one chunk's maps, where those of one query in all heads take a_row bytes."""
    if device.type != "cpu":
        return GPU_CHUNK_BYTES
    return max(CPU_CHUNK_BYTES, min(CPU_CHUNK_ROWS * a_row, cache_bytes() // 2, MOST_CHUNK_BYTES))


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
