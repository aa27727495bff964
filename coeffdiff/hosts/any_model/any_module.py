"""Put alpha on the attention layers of any module, and take it off: by transformers' interface, or by interception."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import nn

from coeffdiff.errors import InjectionError
from coeffdiff.hosts.any_model.attention_layers import (
    attention_layers,
    dispatches,
    folds_heads,
    heads_of,
    is_traceable,
    known_heads,
    select_layers,
)
from coeffdiff.hosts.any_model.interception import Intercepted, intercept, release
from coeffdiff.hosts.slot import CHILD, SLOT, USED, Slot, coefficients_for, warn_if_frozen
from coeffdiff.method.coefficients import Coefficients

_INTERFACE = "coeffdiff.hosts.any_model.transformers"  # imported for its models alone


class Attachment:
    """All that `attach` changed on a model, to be undone. It lives on the model and is copied with it."""

    def __init__(self) -> None:
        self.layers: dict[str, nn.Module] = {}  # attention modules that have alpha, by name
        self.handles: list[Any] = []
        self.switch: Any = None  # of transformers.py
        self.nested: list[nn.TransformerEncoder] = []  # that may use nested tensors without alpha


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
    _refuse_second(model)
    alphas = {name: coefficients_for(module, heads_of(name, module)) for name, module in chosen.items()}
    attachment = Attachment()
    if any(map(dispatches, chosen.values())):
        attachment.switch = import_module(_INTERFACE).switch_on(model, trainable)
    model._coeffdiff_attachment = attachment
    for name, module in chosen.items():
        if not dispatches(module):
            intercept(name, module, trainable, folded=folds_heads(module), traced=is_traceable(module))
        module.add_module(CHILD, alphas[name])
        attachment.layers[name] = module
        # torch's fast paths, which make no call of attention, look for hooks and then stay away
        attachment.handles += [
            module.register_forward_pre_hook(_before_layer),
            module.register_forward_hook(_after_layer),
        ]
    attachment.nested = _without_nested_tensors(model)
    return alphas


def detach(model: Any) -> None:
    """See coeffdiff.detach."""
    attachment = attachment_of(model)
    if attachment is None:
        return
    for handle in attachment.handles:
        handle.remove()
    for module in attachment.layers.values():
        module._modules.pop(CHILD, None)
        vars(module).pop(USED, None)
        if isinstance(getattr(module, SLOT), Intercepted):
            release(module)
    if attachment.switch is not None:
        import_module(_INTERFACE).switch_off(attachment.switch)
    for encoder in attachment.nested:
        encoder.use_nested_tensor = True
    del model._coeffdiff_attachment


def heads_by_layer(model: nn.Module) -> dict[str, int]:
    """How many heads each layer has that alpha can reach, by its name. Raises: InjectionError if there is none."""
    found = {name: known_heads(module) for name, module in attention_layers(model).items()}
    return {name: heads for name, heads in found.items() if heads is not None}


def _refuse_second(model: nn.Module) -> None:
    """Raises: InjectionError if a layer has alpha that is not this model's, as after attach(model.encoder)."""
    for name, module in model.named_modules():
        own = any(
            kind.__module__.startswith("coeffdiff.") and "Att" in kind.__name__
            for kind in (type(module), type(getattr(module, "processor", None)))
        )
        if SLOT in vars(module) or own:
            raise InjectionError(
                f"{name or type(module).__name__} already has alpha, from another attach or a pipeline's adapter: take "
                "that off first, with coeffdiff.detach on the model that attach was given, or the adapter's remove()."
            )


def _without_nested_tensors(model: nn.Module) -> list[nn.TransformerEncoder]:
    """torch's encoders pad instead: attention outside of their fast path takes no nested tensors."""
    encoders = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder)
        and module.use_nested_tensor
        and any(SLOT in vars(part) for part in module.modules())
    ]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    return encoders


def _before_layer(module: Any, _: Any) -> None:
    slot: Slot = getattr(module, SLOT)
    setattr(module, USED, False)
    if problem := slot.problem(module):
        raise InjectionError(problem)
    warn_if_frozen(slot, module)


def _after_layer(module: Any, _: Any, __: Any) -> None:
    slot: Slot = getattr(module, SLOT)
    if not getattr(module, USED):
        raise InjectionError(
            f"{slot.name} has computed attention without its alpha: {slot.went_round(module)}"
        )
