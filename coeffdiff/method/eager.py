"""Mixed attention in four calls of torch that store the maps: the fastest backend for small layers on a CPU.

Letters as in attention.py. Autograd differentiates it. There the chunks win as soon as maps are large: the maps of a
layer, before and after mixing, stay in memory until the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coeffdiff.method.numerics import exact_products, wide_dtype

# Bytes of the float32 maps of one batch entry up to which this is faster than chunks, measured with two threads. Of
# one entry, so that the batch size does not change how an entry is rounded.
MOST_BYTES = 2**19


def is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether maps of these sizes are small enough for this backend to beat the chunks."""
    return bool(q.shape[1] * q.shape[2] * k.shape[2] * 4 <= MOST_BYTES)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Output [B, H, Q, D] in q's dtype; the softmax and the mixing run in float32, or float64 for float64 inputs."""
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    wide = wide_dtype(q)
    with exact_products(q):
        rows, columns, values = (x.to(wide).flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(rows * scale, columns.mT)
        if mask is not None:
            scores = (scores.view(batch, heads, queries, keys) + mask).flatten(0, 1)
        maps = scores.softmax(-1).view(batch, heads, queries * keys)
        mixed = torch.bmm(coeff.to(wide).expand(batch, heads, heads), maps)
        return torch.bmm(mixed.view(-1, queries, keys), values).view(batch, heads, queries, -1).to(q.dtype)
