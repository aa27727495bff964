"""Which layers of a model alpha can reach, which of them are meant, and how many heads they have."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from coeffdiff.errors import ConfigError, InjectionError

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_CROSS = ("cross", "encoder_attn", "encdecattention", "encoder_decoder")  # in names of layers and classes
_DIFFUSERS = ("Attention", "AttentionModuleMixin")


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that computes attention with alpha in reach, by name. Raises: InjectionError if there is none."""
    layers = {name: module for name, module in model.named_modules() if _attends(module)}
    if not layers:
        raise InjectionError(
            f"alpha cannot be attached to this {type(model).__name__}: it has no attention layer. coeffdiff knows "
            "those of transformers and diffusers, torch.nn.MultiheadAttention, and modules called ...Attention with "
            "projections of their own."
        )
    return layers


def select_layers(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers that targets leave. Raises: ConfigError; InjectionError if some of them have no maps."""
    layers = attention_layers(model)
    if isinstance(targets, str):
        if targets not in ("all", "self", "cross"):
            raise ConfigError(
                f'targets must be "all", "self", "cross" or a list of layer names, not {targets!r}.'
            )
        memories = _memories(model)
        chosen = {
            name: module
            for name, module in layers.items()
            if targets in ("all", "cross" if module in memories or _is_cross(name, module) else "self")
        }
    else:
        chosen = _named(model, layers, list(targets))
    if not chosen:
        raise ConfigError(f"This {type(model).__name__} has no attention layer for targets {targets!r}.")
    if linear := [name for name, module in chosen.items() if _is_linear(module)]:
        example = next((name for name, module in layers.items() if not _is_linear(module)), None)
        raise InjectionError(
            f"{linear[0]} ({len(linear)} such layers) is linear attention, which has no maps to mix"
            + (f": pass targets that leave it out, such as [{example!r}]." if example else ".")
        )
    return chosen


def _named(model: nn.Module, layers: dict[str, nn.Module], names: list[str]) -> dict[str, nn.Module]:
    for name in names:
        if not any(_below(layer, name) for layer in layers):
            near = difflib.get_close_matches(name, layers, 1, 0.3)
            raise ConfigError(
                f"This {type(model).__name__} has no attention layer {name!r}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
    return {layer: module for layer, module in layers.items() if any(_below(layer, name) for name in names)}


def _below(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


def forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def dispatches(module: nn.Module) -> bool:
    """Whether it calls transformers' attention interface."""
    code: Any = getattr(forward_of(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def folds_heads(module: nn.Module) -> bool:
    """Whether maps [B * H, Q, K] of it have the heads of one batch entry side by side."""
    return isinstance(module, nn.MultiheadAttention) or _is_of_diffusers(module)


def is_traceable(module: nn.Module) -> bool:
    """Whether it is a layer of diffusers whose processor calls torch.nn.functional's scaled_dot_product_attention."""
    processor = type(getattr(module, "processor", None))
    code: Any = getattr(inspect.getattr_static(processor, "__call__", None), "__code__", None)
    names = code.co_names if code is not None else ()
    return _is_of_diffusers(module) and bool(
        {"scaled_dot_product_attention", "dispatch_attention_fn"} & {*names}
    )


def _attends(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention) or _is_of_diffusers(module) or dispatches(module):
        return True
    inside = (part for part in module.modules() if part is not module)
    return _looks_like_attention(module) and not any(map(_attends, inside))


def _is_of_diffusers(module: nn.Module) -> bool:
    return any(
        base.__module__.startswith("diffusers.") and base.__name__ in _DIFFUSERS
        for base in type(module).__mro__
    )


def _looks_like_attention(module: nn.Module) -> bool:
    """By its class's name, and projections of its own."""
    if "Attention" not in type(module).__name__:
        return False
    widths = [found for child in module.children() if (found := _widths(child))]
    return len(widths) > 1 or any(max(pair) == 3 * min(pair) for pair in widths)


def _widths(child: nn.Module) -> tuple[int, int] | None:
    """Input and output of a linear layer: torch's, PEFT's around one, a quantized one, GPT-2's Conv1D."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        first, second = (getattr(child, name, None) for name in names)
        if isinstance(first, int) and isinstance(second, int):
            return first, second
    return None


def _is_linear(module: nn.Module) -> bool:
    names = (type(module).__name__, type(getattr(module, "processor", None)).__name__)
    return any("LinearAtt" in name for name in names)


def _memories(model: nn.Module) -> set[nn.Module]:
    """The cross-attentions of torch's own decoder layers, whose names do not say so."""
    return {part.multihead_attn for part in model.modules() if isinstance(part, nn.TransformerDecoderLayer)}


def _is_cross(name: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False):
        return True
    near = ".".join(name.split(".")[-3:])  # and not a whole model that is called cross_encoder
    return any(word in f"{near} {type(module).__name__}".lower() for word in _CROSS)


def heads_of(name: str, module: nn.Module) -> int:
    """Raises: InjectionError if nothing on the layer says it."""
    if (heads := known_heads(module)) is None:
        raise InjectionError(
            f"{name} ({type(module).__name__}) does not say how many heads it has: leave it out of targets, or give "
            "it an attribute num_heads."
        )
    return heads


def known_heads(module: nn.Module) -> int | None:
    places = (module, getattr(module, "config", None))
    counts = (getattr(place, attribute, None) for place in places for attribute in _HEADS)
    return next((count for count in counts if isinstance(count, int)), None)
