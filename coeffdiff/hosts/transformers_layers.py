"""Which layers of a transformers model alpha can reach, which of them are meant, and how many heads they have."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from coeffdiff.errors import ConfigError, InjectionError
from coeffdiff.hosts.transformers_attention import ORIGINALS

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_CROSS = ("cross", "encoder_attn", "encdecattention", "encoder_decoder")  # in names of layers and classes


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that calls transformers' attention interface, by name. Raises: InjectionError if some do not."""
    layers = {name: module for name, module in model.named_modules() if dispatches(module)}
    if not layers:
        foreign = next((name for name, module in model.named_modules() if _attends_itself(module)), None)
        found = f"its {foreign} computes attention itself" if foreign else "it has no attention layer"
        raise InjectionError(
            f"alpha cannot be attached to this {type(model).__name__}: {found}, and coeffdiff needs layers that call "
            "transformers' attention interface, as BERT, ViT, CLIP, Llama and T5 do."
        )
    for name, module in layers.items():
        used = module.config._attn_implementation or "eager"
        if used not in ORIGINALS:
            raise InjectionError(
                f"{name} uses the attention implementation {used!r}, whose maps alpha cannot reach: load the model "
                'with attn_implementation="sdpa" (or "eager").'
            )
    return layers


def select_layers(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers that targets leave. Raises: ConfigError, InjectionError."""
    layers = attention_layers(model)
    if isinstance(targets, str):
        if targets not in ("all", "self", "cross"):
            raise ConfigError(
                f'targets must be "all", "self", "cross" or a list of layer names, not {targets!r}.'
            )
        foreign = [name for name, module in model.named_modules() if _attends_itself(module)]
        if foreign:
            raise InjectionError(
                f"{foreign[0]} ({len(foreign)} such layers) computes attention itself, so alpha cannot reach it: pass "
                f"as targets the names of the layers or blocks that shall have alpha, such as {next(iter(layers))!r}."
            )
        chosen = {
            name: module
            for name, module in layers.items()
            if targets in ("all", "cross" if _is_cross(name, module) else "self")
        }
    else:
        chosen = _named(model, layers, list(targets))
    if not chosen:
        raise ConfigError(f"This {type(model).__name__} has no attention layer for targets {targets!r}.")
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
    code: Any = getattr(forward_of(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _attends_itself(module: nn.Module) -> bool:
    """Whether it looks like attention (by its class's name and projections of its own) and does not dispatch."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    named = "Attention" in type(module).__name__ and not dispatches(module)
    projections = [c for c in module.children() if isinstance(c, nn.Linear) or type(c).__name__ == "Conv1D"]
    return named and (len(projections) > 1 or any(map(_is_fused, projections)))


def _is_fused(projection: Any) -> bool:
    rows, columns = map(int, projection.weight.shape)
    return max(rows, columns) == 3 * min(rows, columns)


def _is_cross(name: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False):
        return True
    return any(word in f"{name} {type(module).__name__}".lower() for word in _CROSS)


def heads_of(name: str, module: nn.Module) -> int:
    for place in (module, module.config):
        for attribute in _HEADS:
            if isinstance(count := getattr(place, attribute, None), int):
                return count
    raise InjectionError(
        f"{name} ({type(module).__name__}) does not say how many heads it has: leave it out of targets."
    )
