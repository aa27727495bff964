"""Let a transformers model call our attention function, and undo that; which layers have alpha is decided elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from coeffdiff.errors import InjectionError
from coeffdiff.hosts.any_model.attention_layers import dispatches, forward_of
from coeffdiff.hosts.any_model.transformers_attention import ORIGINALS, Dispatch, register, twin
from coeffdiff.hosts.slot import SLOT


class Switch:
    """What was changed on a model. It lives on the model and is copied with it."""

    def __init__(self) -> None:
        self.dispatching: list[nn.Module] = []  # all that call our function
        self.configs: list[tuple[Any, str]] = []  # own copies, and the implementation to go back to
        self.handles: list[Any] = []
        self.asking: nn.Module | None = None  # the part whose forward has been asked for attention maps

    def want_maps(self, part: nn.Module | None) -> None:
        self.asking = part
        for module in self.dispatching:
            getattr(module, SLOT).maps_wanted = part is not None


def switch_on(model: nn.Module, trains: bool) -> Switch:
    """Every layer that calls transformers' interface calls ours from now on.

    Raises: InjectionError for an implementation whose maps cannot be reached; the model is then as it was.
    """
    dispatching = {name: module for name, module in model.named_modules() if dispatches(module)}
    originals = {name: _original(name, module) for name, module in dispatching.items()}
    register()
    switch = Switch()
    for name, module in dispatching.items():
        setattr(module, SLOT, Dispatch(name, trains, original=originals[name]))
        switch.dispatching.append(module)
    _switch_configs(model, switch)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            switch.handles += [
                part.register_forward_pre_hook(partial(_before_model, switch), with_kwargs=True),
                part.register_forward_hook(partial(_after_model, switch), always_call=True),
            ]
    return switch


def switch_off(switch: Switch) -> None:
    """Every layer calls its own implementation again."""
    for handle in switch.handles:
        handle.remove()
    for module in switch.dispatching:
        delattr(module, SLOT)
    for config, original in switch.configs:
        if config._attn_implementation == twin(original):
            config._attn_implementation_internal = original


def _original(name: str, module: nn.Module) -> Callable[..., Any]:
    """What the layer itself would call: from its own file's interface, or that file's eager function."""
    used = module.config._attn_implementation or "eager"
    if used not in ORIGINALS:
        raise InjectionError(
            f"{name} uses the attention implementation {used!r}, whose maps alpha cannot reach: load the model "
            'with attn_implementation="sdpa" (or "eager").'
        )
    forward = forward_of(module)
    known = forward.__globals__
    eager = next((known[n] for n in forward.__code__.co_names if n.startswith("eager_") and n in known), None)
    original: Callable[..., Any] | None = known["ALL_ATTENTION_FUNCTIONS"].get(used, eager)
    if original is None:
        raise InjectionError(f"{name} ({type(module).__name__}) has no attention function for {used!r}.")
    return original


def _switch_configs(model: nn.Module, switch: Switch) -> None:
    """Give the model's parts copies of their configs that name our function: another model may share the originals."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            module.config = copy.deepcopy(config, memo)
    copies = {id(c): c for c in memo.values() if hasattr(c, "_attn_implementation_internal")}
    for config in copies.values():
        original = config._attn_implementation or "eager"
        if original in ORIGINALS:
            switch.configs.append((config, original))
            config._attn_implementation_internal = twin(original)


def _before_model(switch: Switch, model: Any, _: Any, kwargs: dict[str, Any]) -> None:
    """output_attentions: until this forward ends the layers return their maps, which transformers collects."""
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(model.config, "output_attentions", False)
    if wanted and switch.asking is None:
        switch.want_maps(model)


def _after_model(switch: Switch, model: Any, _: Any, __: Any) -> None:
    if switch.asking is model:
        switch.want_maps(None)
