"""The attention function that transformers models call while they hold alpha, registered beside their own.

Each implementation of transformers that is taken over ("sdpa", "eager") has a twin of ours. The twin gets the masks of
the original, and calls the original where a layer has no alpha, so that such a layer computes as before bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from coeffdiff.errors import InjectionError
from coeffdiff.hosts.any_model.mixing import mixed_heads
from coeffdiff.hosts.slot import CHILD, SLOT, USED, Slot
from coeffdiff.method.coefficients import Coefficients

ORIGINALS = ("sdpa", "eager")

# Arguments of single models that change which keys a query sees, in ways that no mask describes
_FOREIGN = ("cache", "block_indices", "indices", "sinks")


@dataclass(kw_only=True)
class Dispatch(Slot):
    """original: what the layer calls without alpha; maps_wanted: whether to return the mixed maps too."""

    original: Callable[..., tuple[Tensor, Tensor | None]]
    maps_wanted: bool = False

    def problem(self, module: Any) -> str:
        used = module.config._attn_implementation
        if used.startswith("coeffdiff_"):
            return ""
        return (
            f"alpha is gone from {self.name}: something has set the attention implementation to {used!r} since. Set "
            "it before coeffdiff.attach, not after."
        )

    def went_round(self, module: Any) -> str:
        way = "this way of calling the model goes round transformers' attention interface"
        return f"{way}. Leave the layer out of targets."


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
    dispatch: Dispatch | None = getattr(module, SLOT, None)
    layer = module._modules.get(CHILD)
    if dispatch is None or not (isinstance(layer, Coefficients) or dispatch.maps_wanted):
        return _unmixed(module, dispatch)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            **({} if is_causal is None else {"is_causal": is_causal}),
            **({} if position_bias is None else {"position_bias": position_bias}),
            **others,
        )  # fmt: skip
    setattr(module, USED, True)
    _refuse(dispatch, layer, query, others)
    causal = may_be_causal and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    out, maps = mixed_heads(
        query, key, value,
        layer.identity + layer() if isinstance(layer, Coefficients) else None,
        mask=attention_mask, bias=position_bias, causal=bool(causal), scale=scaling,
        softcap=others.get("softcap"), sinks=others.get("s_aux"),
        dropout=dropout if may_be_causal or module.training else 0.0,  # as eager code itself asks
        maps_wanted=dispatch.maps_wanted,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), maps


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
