"""Put alpha on the attention layers of a transformers model, and take it off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from coeffdiff.errors import AlphaFrozen, InjectionError
from coeffdiff.hosts.transformers_attention import CHILD, DISPATCH, ORIGINALS, Dispatch, register, twin
from coeffdiff.hosts.transformers_layers import (
    attention_layers,
    dispatches,
    forward_of,
    heads_of,
    select_layers,
)
from coeffdiff.method.coefficients import Coefficients


class Attachment:
    """All that `attach` changed on a model, to be undone. It lives on the model and is copied with it."""

    def __init__(self) -> None:
        self.layers: dict[str, nn.Module] = {}  # attention modules that have alpha, by name
        self.dispatching: list[nn.Module] = []  # all that call our function
        self.configs: list[tuple[Any, str]] = []  # own copies, and the implementation to go back to
        self.handles: list[Any] = []
        self.asking: nn.Module | None = None  # the part whose forward has been asked for attention maps

    def want_maps(self, part: nn.Module | None) -> None:
        self.asking = part
        for module in self.dispatching:
            getattr(module, DISPATCH).maps_wanted = part is not None


def attachment_of(model: nn.Module) -> Attachment | None:
    found: Attachment | None = getattr(model, "_coeffdiff_attachment", None)
    return found


def attached(model: nn.Module) -> dict[str, Coefficients]:
    """The alphas on a model by the names of their layers; empty without any."""
    attachment = attachment_of(model)
    layers = attachment.layers if attachment else {}
    return {name: module._modules[CHILD] for name, module in layers.items()}


def attach(model: Any, targets: str | Iterable[str], trainable: bool) -> dict[str, Coefficients]:
    """See coeffdiff.attach. trainable: warn if the alphas are found frozen in a model that trains.

    Raises: InjectionError, ConfigError; the model is then as it was.
    """
    chosen = select_layers(model, targets)
    heads = {name: heads_of(name, module) for name, module in chosen.items()}
    dispatching = attention_layers(model)
    originals = {name: _original(name, module) for name, module in dispatching.items()}
    register()
    attachment = model._coeffdiff_attachment = Attachment()
    for name, module in dispatching.items():
        setattr(module, DISPATCH, Dispatch(name, originals[name], trainable))
        attachment.dispatching.append(module)
    _switch_configs(model, attachment)
    for name, module in chosen.items():
        module.add_module(CHILD, _coefficients(module, heads[name]))
        attachment.layers[name] = module
        attachment.handles += [
            module.register_forward_pre_hook(_before_layer),
            module.register_forward_hook(_after_layer),
        ]
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            attachment.handles += [
                part.register_forward_pre_hook(partial(_before_model, attachment), with_kwargs=True),
                part.register_forward_hook(partial(_after_model, attachment), always_call=True),
            ]
    return attached(model)


def detach(model: Any) -> None:
    """See coeffdiff.detach."""
    attachment = attachment_of(model)
    if attachment is None:
        return
    for handle in attachment.handles:
        handle.remove()
    for module in attachment.layers.values():
        module._modules.pop(CHILD, None)
    for module in attachment.dispatching:
        delattr(module, DISPATCH)
    for config, original in attachment.configs:
        if config._attn_implementation == twin(original):
            config._attn_implementation_internal = original
    del model._coeffdiff_attachment


def heads_by_layer(model: nn.Module) -> dict[str, int]:
    """How many heads each layer has that alpha can reach, by its name; nothing for a model without such layers."""
    return {name: heads_of(name, module) for name, module in model.named_modules() if dispatches(module)}


def _original(name: str, module: nn.Module) -> Callable[..., Any]:
    """What the layer itself would call: from its own file's interface, or that file's eager function."""
    forward = forward_of(module)
    known = forward.__globals__
    eager = next((known[n] for n in forward.__code__.co_names if n.startswith("eager_") and n in known), None)
    used = module.config._attn_implementation or "eager"
    original: Callable[..., Any] | None = known["ALL_ATTENTION_FUNCTIONS"].get(used, eager)
    if original is None:
        raise InjectionError(f"{name} ({type(module).__name__}) has no attention function for {used!r}.")
    return original


def _switch_configs(model: nn.Module, attachment: Attachment) -> None:
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
            attachment.configs.append((config, original))
            config._attn_implementation_internal = twin(original)


def _coefficients(module: nn.Module, heads: int) -> Coefficients:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(()))
    layer = Coefficients(heads)
    layer.to(like.device, torch.promote_types(like.dtype, torch.float32))
    layer.train(module.training)
    return layer


def _before_layer(module: Any, _: Any) -> None:
    dispatch: Dispatch = getattr(module, DISPATCH)
    dispatch.used = False
    if not module.config._attn_implementation.startswith("coeffdiff_"):
        raise InjectionError(
            f"alpha is gone from {dispatch.name}: something has set the attention implementation to "
            f"{module.config._attn_implementation!r} since. Set it before coeffdiff.attach, not after."
        )
    layer = module._modules[CHILD]
    if dispatch.trains and module.training and torch.is_grad_enabled() and not layer.alpha.requires_grad:
        warnings.warn(
            f"alpha of {dispatch.name} is frozen, so training does not move it: call coeffdiff.attach after "
            "get_peft_model, or set requires_grad on the alphas again.",
            AlphaFrozen,
            stacklevel=2,
        )


def _after_layer(module: Any, _: Any, __: Any) -> None:
    dispatch: Dispatch = getattr(module, DISPATCH)
    if not dispatch.used:
        raise InjectionError(
            f"{dispatch.name} has computed attention without its alpha: this way of calling the model goes round "
            "transformers' attention interface. Leave the layer out of targets."
        )


def _before_model(attachment: Attachment, model: Any, _: Any, kwargs: dict[str, Any]) -> None:
    """output_attentions: until this forward ends the layers return their maps, which transformers collects."""
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(model.config, "output_attentions", False)
    if wanted and attachment.asking is None:
        attachment.want_maps(model)


def _after_model(attachment: Attachment, model: Any, _: Any, __: Any) -> None:
    if attachment.asking is model:
        attachment.want_maps(None)
