"""The attention function that transformers models call while they hold alpha, registered beside their own.

Each implementation of transformers that is taken over ("sdpa", "eager") has a twin of ours. The twin gets the masks of
the original, and calls the original where a layer has no alpha, so that such a layer computes as before bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from coeffdiff.errors import InjectionError
from coeffdiff.method.attention import mixed_attention
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.method.numerics import exact_products, wide_dtype

ORIGINALS = ("sdpa", "eager")
CHILD = "coeffdiff"  # the attention module's submodule that holds alpha
DISPATCH = "_coeffdiff_dispatch"  # the attention module's attribute with what this file knows of it

# Arguments of single models that change which keys a query sees, in ways that no mask describes
_FOREIGN = ("cache", "block_indices", "indices", "sinks")


@dataclass
class Dispatch:
    """What the attention function knows of one layer.

    trains: whether its alpha was attached for training; used: since the layer's forward began.
    """

    name: str
    original: Callable[..., tuple[Tensor, Tensor | None]]
    trains: bool = False
    maps_wanted: bool = False
    used: bool = False


def twin(original: str) -> str:
    """The name under which our function for an implementation of transformers is registered."""
    return f"coeffdiff_{original}"


def register() -> None:
    """Make the twins known to transformers, with the mask functions of the originals.

    Without a mask function transformers would drop every padding mask without a word.
    """
    for original in ORIGINALS:
        AttentionInterface.register(twin(original), partial(_attention, original == "sdpa"))
        AttentionMaskInterface.register(twin(original), ALL_MASK_ATTENTION_FUNCTIONS[original])


def _attention(
    may_be_causal: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' own functions: query [B, H, Q, D], key [B, G, K, D], value [B, G, K, E] with G dividing H.

    may_be_causal: whether a missing mask can mean a causal one, as it does for sdpa.
    Returns: [B, Q, H, E], and the mixed maps [B, H, Q, K] where output_attentions asks for them.
    """
    dispatch: Dispatch | None = getattr(module, DISPATCH, None)
    layer = module._modules.get(CHILD)
    if dispatch is None or not (isinstance(layer, Coefficients) or dispatch.maps_wanted):
        return _unmixed(module, dispatch)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            **({} if is_causal is None else {"is_causal": is_causal}),
            **({} if position_bias is None else {"position_bias": position_bias}),
            **others,
        )  # fmt: skip
    dispatch.used = True
    _refuse(dispatch, layer, query, others)
    causal = may_be_causal and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    key, value = _repeated(key, query), _repeated(value, query)
    mask = _mask(attention_mask, position_bias, bool(causal) and query.shape[2] > 1, query, key)
    mask, blind = _opened(mask)
    coeff = layer.identity + layer() if isinstance(layer, Coefficients) else None
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    learned_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    softcap, sinks = others.get("softcap"), others.get("s_aux")
    dropout = dropout if may_be_causal or module.training else 0.0  # as eager code itself asks
    plain = softcap is None and sinks is None and not learned_mask
    maps = None
    if coeff is not None and plain and not dropout and not dispatch.maps_wanted:
        out = _through_operator(query, key, value, coeff, mask, scale)
    else:
        scores = partial(_scores, query, key, mask, scale, softcap)
        out, maps = _explicit(scores, value, coeff, blind, sinks, dropout)
    if blind is not None:
        out = out.masked_fill(blind, 0)
    return out.transpose(1, 2).contiguous(), maps if dispatch.maps_wanted else None


def _unmixed(module: nn.Module, dispatch: Dispatch | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if dispatch is None:
        raise InjectionError(
            f"A {type(module).__name__} was added to this model after alpha was attached: "
            "call coeffdiff.detach(model), then attach again."
        )
    return dispatch.original


def _refuse(dispatch: Dispatch, layer: nn.Module | None, query: Tensor, others: dict[str, Any]) -> None:
    odd = [name for name in _FOREIGN if others.get(name) is not None]
    if odd:
        raise InjectionError(
            f"{dispatch.name} attends with {odd[0]!r}, which alpha does not support: leave this layer out of targets, "
            "or use the model without it."
        )
    if isinstance(layer, Coefficients) and query.shape[1] != layer.heads:
        raise InjectionError(
            f"{dispatch.name} attends with {query.shape[1]} heads, but its alpha has {layer.heads} x {layer.heads} "
            "numbers: leave this layer out of targets."
        )


def _repeated(heads: Tensor, query: Tensor) -> Tensor:
    """Keys or values [B, G, K, D] for every query head [B, H, K, D], in the query's dtype."""
    groups = query.shape[1] // heads.shape[1]
    return (heads if groups == 1 else heads.repeat_interleave(groups, 1)).to(query.dtype)


def _mask(
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

    Dropout falls on the maps before they are mixed, with the numbers that transformers' eager function draws.
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
