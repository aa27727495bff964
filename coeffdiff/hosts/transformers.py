"""Put alpha on the attention layers of a transformers model, and take it off."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from coeffdiff.errors import AlphaFrozen, ConfigError, InjectionError
from coeffdiff.hosts.transformers_attention import CHILD, DISPATCH, ORIGINALS, Dispatch, register, twin
from coeffdiff.method.coefficients import Coefficients

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_CROSS = ("cross", "encoder_attn", "encdecattention", "encoder_decoder")  # in names of layers and classes


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
    heads = {name: _heads(name, module) for name, module in chosen.items()}
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
    return {name: _heads(name, module) for name, module in model.named_modules() if _dispatches(module)}


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that calls transformers' attention interface, by name. Raises: InjectionError if some do not."""
    layers = {name: module for name, module in model.named_modules() if _dispatches(module)}
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


def _forward_code(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _dispatches(module: nn.Module) -> bool:
    code: Any = getattr(_forward_code(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _attends_itself(module: nn.Module) -> bool:
    """Whether it looks like attention (by its class's name and projections of its own) and does not dispatch."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    named = "Attention" in type(module).__name__ and not _dispatches(module)
    projections = [c for c in module.children() if isinstance(c, nn.Linear) or type(c).__name__ == "Conv1D"]
    return named and (len(projections) > 1 or any(map(_is_fused, projections)))


def _is_fused(projection: Any) -> bool:
    rows, columns = map(int, projection.weight.shape)
    return max(rows, columns) == 3 * min(rows, columns)


def _is_cross(name: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False):
        return True
    return any(word in f"{name} {type(module).__name__}".lower() for word in _CROSS)


def _heads(name: str, module: nn.Module) -> int:
    for place in (module, module.config):
        for attribute in _HEADS:
            if isinstance(count := getattr(place, attribute, None), int):
                return count
    raise InjectionError(
        f"{name} ({type(module).__name__}) does not say how many heads it has: leave it out of targets."
    )


def _original(name: str, module: nn.Module) -> Callable[..., Any]:
    """What the layer itself would call: from its own file's interface, or that file's eager function."""
    forward = _forward_code(module)
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
