"""Alpha on the attention layers of a CLIP text encoder, put there and taken off.

What unet.py does with a layer's alphas, switching them and telling them apart by adapter, serves here as well: both
keep them in the network's registry (summed_alphas.py). Layers are named as in the files of adapters, see layer_names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

from coeffdiff.errors import InjectionError
from coeffdiff.hosts.guard import Place, displaced, parts_of, places, unwatch, unwrapped, watch
from coeffdiff.hosts.slot import SLOT
from coeffdiff.hosts.summed_alphas import SummedAlphas, alphas_on
from coeffdiff.method.coefficients import Coefficients, Form, Mixes
from coeffdiff.utils.seeding import generator_for

_CHILD = "coeffdiff_alphas"  # the attention layer's submodule that holds its alphas
_ALPHA = "alpha"  # the key of all alphas among the guard's parts
_TEXT_MODEL = "text_model."


class ClipAttentionWithAlpha(CLIPAttention):
    """What an attention layer of CLIP is while it holds alpha; with none active it computes as before, bit for bit.

    The maps that output_attentions asks for are not returned while alpha is active.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, C] -> [B, T, C], and None. A mask is [B or 1, 1, T, T]; none may mean a causal one."""
        alphas = self._modules[_CHILD]
        assert isinstance(alphas, SummedAlphas)
        if not alphas.active:
            plain: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **kwargs)
            return plain
        projected = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        q, k, v = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in projected)
        mask = _mask(attention_mask, bool(kwargs.get("is_causal")), q)
        out = alphas.attend(q, k, v, mask=mask, scale=self.scale)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def _mask(given: Tensor | None, causal: bool, q: Tensor) -> Tensor | None:
    if given is None:
        tokens = q.shape[2]
        return torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril() if causal else None
    if given.ndim != 4:  # of flash attention, one number a token
        raise InjectionError(
            "alpha on a text encoder needs its masks token by token: load the encoder with "
            'attn_implementation="sdpa" (or "eager").'
        )
    return given


class ClipAlphaPart:
    """Every alpha of a text encoder, for the guard."""

    def __init__(self, encoder: nn.Module, registry: dict[str, SummedAlphas]) -> None:
        self.registry = registry
        modules = dict(encoder.named_modules())
        self.layers = [(name, modules[name], alphas) for name, alphas in registry.items()]
        self.places: list[Place] = places(encoder, registry)

    @property
    def on(self) -> bool:
        return any(alphas.active for alphas in self.registry.values())

    def problem(self) -> str:
        lost = [
            name
            for name, layer, alphas in self.layers
            if name in self.registry
            and (type(layer) is not ClipAttentionWithAlpha or layer._modules.get(_CHILD) is not alphas)
        ]
        if lost or displaced(self.places):
            where = f" ({lost[0]}, ...)" if lost else ""
            return (
                f"alpha is gone from this text encoder{where}: something has put other attention layers in its place. "
                "Undo that, or remove() the adapter and load it again."
            )
        return ""


def attention_modules(encoder: nn.Module) -> dict[str, CLIPAttention]:
    """Every attention layer of a CLIP text encoder by its name in the encoder, in order."""
    return {name: m for name, m in unwrapped(encoder).named_modules() if isinstance(m, CLIPAttention)}


def layer_names(encoder: nn.Module) -> dict[str, str]:
    """The encoder's attention layers: names as in files -> names in the encoder.

    CLIPTextModel calls its parts encoder.layers.0... since transformers 5, CLIPTextModelWithProjection and all before
    it text_model.encoder.layers.0..., which is what files of LoRA have.
    """
    return {in_file(name): name for name in attention_modules(encoder)}


def in_file(name: str) -> str:
    """A module's name in files, from its name in an encoder."""
    return name if name.startswith(_TEXT_MODEL) else f"{_TEXT_MODEL}{name}"


def heads_of(encoder: nn.Module) -> dict[str, int]:
    """How many heads each layer has, by its name in files."""
    return {in_file(name): layer.num_heads for name, layer in attention_modules(encoder).items()}


def inject(
    encoder: nn.Module,
    name: str = "default",
    *,
    network: str,
    layers: Iterable[str] | None = None,
    form: Form = "residual",
    seed: int = 0,
    mixes: Mixes = "maps",
) -> dict[str, Coefficients]:
    """Give attention layers an alpha called `name`, active at scale 1, and return them by their names in files.

    Args:
        network: the pipeline's name for the encoder, which tells the random numbers of two encoders apart.
        layers: their names in files; None: all of the encoder.
    Raises: InjectionError for a layer that is not there, or a name that is taken.
    """
    bare = unwrapped(encoder)
    registry, own, modules = alphas_on(bare), layer_names(bare), attention_modules(bare)
    layers = list(own if layers is None else layers)
    if missing := [layer for layer in layers if layer not in own]:
        raise InjectionError(
            f"This {network} has no attention layer {missing[0]} ({len(missing)} are missing)."
        )
    if any(name in alphas.adapters for alphas in registry.values()):
        raise InjectionError(f"This {network} already has an alpha called {name!r}.")
    result = {}
    for layer in layers:
        module = modules[own[layer]]
        if hasattr(module, SLOT):
            raise InjectionError(
                f"{network}.{layer} has an alpha of coeffdiff.attach, beside which no adapter's can be: "
                "coeffdiff.detach it first."
            )
        if own[layer] not in registry:
            if type(module) is not CLIPAttention:
                raise InjectionError(
                    f"{network}.{layer} is a {type(module).__name__}, which is not CLIP's plain attention, so alpha "
                    "cannot take its place."
                )
            registry[own[layer]] = SummedAlphas()
            module.add_module(_CHILD, registry[own[layer]])
            module.__class__ = ClipAttentionWithAlpha
        drawn = generator_for("alpha", seed, f"{network}.{layer}")
        coefficients = Coefficients(module.num_heads, form, drawn, mixes)
        registry[own[layer]].adapters[name] = coefficients.to(module.out_proj.weight.device)
        registry[own[layer]].set_scale(name, 1.0)
        result[layer] = coefficients
    watch(bare, _ALPHA, ClipAlphaPart(bare, registry))
    return result


def eject(encoder: nn.Module, name: str) -> None:
    """Take one alpha off; a layer without any is CLIP's own again."""
    bare = unwrapped(encoder)
    registry, modules = alphas_on(bare), attention_modules(bare)
    for layer, alphas in list(registry.items()):
        if name in alphas.adapters:
            alphas.set_scale(name, 0.0)
            del alphas.adapters[name]
        if not alphas.adapters:
            module = modules.get(layer)
            if isinstance(module, ClipAttentionWithAlpha):
                module._modules.pop(_CHILD, None)
                module.__class__ = CLIPAttention
            del registry[layer]
    if not registry and _ALPHA in parts_of(bare):
        unwatch(bare, _ALPHA)


def coefficients_of(encoder: nn.Module, name: str = "default") -> dict[str, Coefficients]:
    """The alphas called `name`, by their layers' names in files."""
    registry = alphas_on(unwrapped(encoder))
    return {in_file(layer): a.coefficients(name) for layer, a in registry.items() if name in a.adapters}
