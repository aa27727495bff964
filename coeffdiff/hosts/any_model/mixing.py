"""Attention over mixed maps with all that models add to it: masks, biases, caps, sinks, dropout, grouped keys.

What every host but SDXL's UNet calls. Letters: B batch, H heads, G groups of keys, Q queries, K keys, D and E widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.method.attention import mixed_attention
from coeffdiff.method.numerics import exact_products, wide_dtype


def mixed_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor | None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    maps_wanted: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out[h] = (sum_g coeff[h, g] A[g]) V[h]; queries that see no key get zero.

    Args:
        query: [B, H, Q, D].  key: [B, G, K, D].  value: [B, G, K, E]; G divides H, and B may be 1 for keys and values.
        coeff: [H, H]; None leaves the maps as they are.
        mask: broadcastable to [B, H, Q, K]; True = may be seen, or a float that is added. A static
            cache's may be wider.
        bias: added to the scores beside the mask.
        causal: without a mask, query i sees keys 0 to i.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: [H] scores of one more key, whose value is zero.
        dropout: falls on the maps before they are mixed.
        maps_wanted: return the mixed maps too.
    Returns: [B, H, Q, E], and [B, H, Q, K] if wanted.
    """
    key, value = _repeated(key, query), _repeated(value, query)
    mask, blind = _opened(_joined(mask, bias, causal and query.shape[2] > 1, query, key))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    learned_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    plain = softcap is None and sinks is None and not learned_mask
    maps = None
    if coeff is not None and plain and not dropout and not maps_wanted:
        out = _through_operator(query, key, value, coeff, mask, scale)
    else:
        scores = partial(_scores, query, key, mask, scale, softcap)
        out, maps = _explicit(scores, value, coeff, blind, sinks, dropout)
    if blind is not None:
        out = out.masked_fill(blind, 0)
    return out, maps if maps_wanted else None


def mixed_maps(maps: Tensor, coeff: Tensor) -> Tensor:
    """sum_g coeff[h, g] maps[g]: [B, H, Q, K] in the maps' dtype; the sum runs in float32, or float64 for float64."""
    with exact_products(maps):
        wide = wide_dtype(maps)
        return torch.einsum("hg,bgqk->bhqk", coeff.to(wide), maps.to(wide)).to(maps.dtype).contiguous()


def _repeated(heads: Tensor, query: Tensor) -> Tensor:
    """Keys or values [B, G, K, D] for every query head [B, H, K, D], in the query's dtype."""
    groups = query.shape[1] // heads.shape[1]
    heads = heads if groups == 1 else heads.repeat_interleave(groups, 1)
    return heads.to(query.dtype).expand(query.shape[0], -1, -1, -1)


def _joined(
    mask: Tensor | None, bias: Tensor | None, causal: bool, query: Tensor, key: Tensor
) -> Tensor | None:
    """One mask out of all that a model passes: True = may be seen, or a float that is added; None: everything."""
    if mask is not None and mask.shape[-1] > key.shape[2]:  # a static cache's
        mask = mask[..., : key.shape[2]]
    if mask is None and causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if bias is None:
        return mask
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask


def _opened(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask with every key open to queries that see none (padding), and which these are: their output is zero."""
    if mask is None:
        return None, None
    blind = ~(mask if mask.dtype == torch.bool else mask > -math.inf).any(-1, keepdim=True)
    return (mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0)), blind


def _through_operator(
    query: Tensor, key: Tensor, value: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """mixed_attention for values of another width than the keys': the narrower ones are filled up with zeros."""
    width, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if missing > 0:
        value = F.pad(value, (0, missing))
    elif missing < 0:
        query, key = F.pad(query, (0, -missing)), F.pad(key, (0, -missing))
    return mixed_attention(query, key, value, coeff, mask=mask, scale=scale)[..., :width]


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:  # [B, H, Q, K]
    wide = wide_dtype(query)
    scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _explicit(
    scores: Callable[[], Tensor],
    value: Tensor,
    coeff: Tensor | None,
    blind: Tensor | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Output and mixed maps with all maps stored: for attention dropout, sinks, learned masks and output_attentions.

    Dropout has the random numbers that transformers' eager function draws.
    """
    with exact_products(value):
        found = scores()
        if sinks is None:
            maps = found.softmax(-1)
        else:
            sink = sinks.to(found.dtype).reshape(1, -1, 1, 1).expand(*found.shape[:3], 1)
            maps = torch.cat([found, sink], -1).softmax(-1)[..., :-1]
        if blind is not None:
            maps = maps.masked_fill(blind, 0)
        maps = F.dropout(maps, dropout)
        if coeff is not None:
            maps = torch.einsum("hg,bgqk->bhqk", coeff.to(maps.dtype), maps)
        return (maps @ value.to(maps.dtype)).to(value.dtype), maps.to(value.dtype)
