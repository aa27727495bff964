"""Alpha for attention modules that compute their maps themselves: the one computation in their forward is taken over.

A mode of torch sees every call of torch that a module's forward makes. In the place of its scaled_dot_product_attention
comes attention over mixed maps; a softmax that returns maps, one for each head, returns mixed ones. A forward with no
such call, or with two, is refused.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coeffdiff.errors import InjectionError
from coeffdiff.hosts.any_model.mixing import mixed_heads, mixed_maps
from coeffdiff.hosts.slot import CHILD, SLOT, USED, Slot
from coeffdiff.method.coefficients import Coefficients

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass(eq=False, repr=False, kw_only=True)
class Intercepted(Slot):
    """The forward of one attention module while it holds alpha.

    original: what it calls, with the module as first argument unless it is bound.
    bound: whether somebody had put that forward on the module before; otherwise it is the class's own.
    folded: maps may be [B * H, Q, K], the heads of one batch entry side by side, as nn.MultiheadAttention and diffusers
        have them; elsewhere nothing tells in which order heads and batch are.
    traced: torch.compile may trace it, since it looks scaled_dot_product_attention up where that can be exchanged.
    """

    module: nn.Module
    original: Callable[..., Any]
    bound: bool
    folded: bool
    traced: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = args if self.bound else (self.module, *args)
        layer = self.module._modules.get(CHILD)
        if not isinstance(layer, Coefficients):  # detached, while another wrapper still holds this forward
            return self.original(*arguments, **kwargs)
        found = _Computation(self, layer)
        forward = _traced if self.traced and torch.compiler.is_dynamo_compiling() else _watched
        out = forward(found, self.original, arguments, kwargs)
        setattr(self.module, USED, found.calls == 1)
        return out

    def problem(self, module: Any) -> str:
        if self.module is module:
            return ""
        return (
            f"{self.name} runs in a copy that nn.DataParallel made, which would leave its alpha out: start one process "
            "for each GPU instead (accelerate launch), or show one GPU (CUDA_VISIBLE_DEVICES=0)."
        )

    def went_round(self, module: Any) -> str:
        if vars(module).get("forward") is not self:
            return "something has given it another forward since. Call coeffdiff.detach(model), then attach again."
        heads = module._modules[CHILD].heads
        return (
            "its forward calls neither torch's scaled_dot_product_attention nor a softmax over maps of its "
            f"{heads} heads. Leave the layer out of targets."
        )


def intercept(name: str, module: nn.Module, trains: bool, *, folded: bool, traced: bool) -> None:
    """From now on the module's forward uses the alpha that it holds."""
    put = vars(module).get("forward")
    slot = Intercepted(
        name, trains, module=module, original=put or type(module).forward, bound=put is not None,
        folded=folded, traced=traced and put is None,
    )  # fmt: skip
    setattr(module, SLOT, slot)
    module.forward = slot


def release(module: nn.Module) -> None:
    """The module's own forward again."""
    slot = vars(module).pop(SLOT)
    if vars(module).get("forward") is slot:
        del module.forward
        if slot.bound:
            module.forward = slot.original


class _Computation:
    """The computation of maps in one forward of one layer. calls: how many there were so far."""

    def __init__(self, slot: Intercepted, layer: Coefficients) -> None:
        self.slot, self.layer, self.calls = slot, layer, 0

    def _coeff(self) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise InjectionError(
                f"{self.slot.name} computes attention more than once in a forward, so alpha has no one place in it: "
                "leave this layer out of targets."
            )
        return self.layer.identity + self.layer()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's function, for [B, H, Q, D]."""
        heads = self.layer.heads
        if query.dim() != 4 or query.shape[1] != heads:
            raise InjectionError(
                f"{self.slot.name} attends over {tuple(query.shape)}, which is not [B, {heads}, Q, D] for its {heads} "
                "heads: leave this layer out of targets."
            )
        out, _ = mixed_heads(
            query, key, value, self._coeff(), mask=attn_mask, causal=is_causal, scale=scale, dropout=dropout_p
        )
        return out

    def mixed(self, maps: Tensor, dimension: int | None) -> Tensor:
        """The maps mixed, if these are maps of all heads over keys; any other softmax as it is."""
        heads, shape = self.layer.heads, maps.shape
        if dimension not in (-1, maps.dim() - 1):
            return maps
        if maps.dim() == 4 and shape[1] == heads:
            return mixed_maps(maps, self._coeff())
        if self.slot.folded and maps.dim() == 3 and shape[0] % heads == 0:
            return mixed_maps(maps.unflatten(0, (-1, heads)), self._coeff()).flatten(0, 1)
        return maps


class _Watching(TorchFunctionMode):
    def __init__(self, found: _Computation) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.found.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:  # torch leaves the mode while it hands this call over
                return _multi_head_attention(*args, **kwargs)
        result = func(*args, **kwargs)
        return self.found.mixed(result, _dimension(*args, **kwargs)) if func in _SOFTMAX else result


# torch.compile cannot trace methods of tensors such as unflatten under a mode
@torch.compiler.disable(reason="coeffdiff intercepts this layer's attention, outside of compiled graphs")
def _watched(
    found: _Computation, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with _Watching(found):
        return forward(*args, **kwargs)


def _traced(
    found: _Computation, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The forward as torch.compile reads it, which only simulates that the function is exchanged."""
    own = F.scaled_dot_product_attention

    def exchanged(*args: Any, **kwargs: Any) -> Tensor:
        # Called for real after a graph break in this forward, even by other threads: the layer then finds alpha unused
        out: Tensor = (found.attend if torch.compiler.is_dynamo_compiling() else own)(*args, **kwargs)
        return out

    F.scaled_dot_product_attention = exchanged
    try:
        return forward(*args, **kwargs)
    finally:
        F.scaled_dot_product_attention = own


def _dimension(_: Any = None, dim: int | None = None, *__: Any, **___: Any) -> int | None:
    """What a softmax was asked for, in any of its forms; the tensor may be given as `input`."""
    return dim


# torch's own code, which without this would hand itself over to the mode again instead of running
_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_multi_head_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
