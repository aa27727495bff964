"""Put alpha on a UNet's attention layers, take it off, switch it, and notice when something else took it off."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from coeffdiff.errors import ConfigError, InjectionError
from coeffdiff.hosts.guard import Place, displaced, parts_of, places, unwatch, unwrapped, verify, watch
from coeffdiff.hosts.summed_alphas import SummedAlphas, alphas_on
from coeffdiff.method.attention import BACKENDS
from coeffdiff.method.coefficients import Coefficients, Form, Mixes
from coeffdiff.utils.seeding import generator_for

Targets = Literal["self", "cross", "both"]

# Processors that compute plain attention from q, k and v, so that mixing the maps is all that changes.
_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")

_CULPRITS = {
    "Sliced": "attention slicing (enable_attention_slicing)",
    "Fused": "QKV fusing (fuse_qkv_projections)",
    "IPAdapter": "loading an IP-Adapter",
    "XFormers": "enabling xformers",
    "PAG": "perturbed attention guidance (a PAG pipeline with pag_scale above 0)",
}
_ALPHA = "alpha"  # the key of all alphas among the guard's parts


class MixedAttnProcessor(SummedAlphas):
    """Attention processor that recombines maps by I + sum of its adapters' deviations.

    Adapters that mix values add up in the same way among themselves, and the maps of the others, mixed or not, meet
    the values that they leave.
    With no active adapter it calls the processor that it replaced, so the base model comes back bit for bit.
    """

    def __init__(self, original: Any = None) -> None:
        super().__init__()
        if original is None:  # diffusers re-creates processors by class when it loads an IP-Adapter
            raise InjectionError(
                "Loading an IP-Adapter replaces the attention processors that hold alpha: "
                "remove the coeffdiff adapter first. The two cannot be used together."
            )
        self.original = original
        self.asked: dict[str, str] = {}  # backends by the adapters that ask for one
        self.backend = "auto"

    def ask_for(self, backend: str, name: str) -> None:
        """What an adapter asks for; "auto" is nothing. They are mixed in one computation, so one backend serves all."""
        self.asked = {**self.asked, name: backend}
        if backend == "auto":
            del self.asked[name]
        self.backend = next(iter(self.asked.values()), "auto")

    # diffusers passes only keyword arguments that this signature names, so they are spelled out
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, Q, C] (and encoder_hidden_states [B, K, C']) -> [B, Q, C]."""
        if not self.active:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, keys, _ = source.shape

        def heads(projected: Tensor) -> Tensor:  # [B, T, H * D] -> [B, H, T, D]
            return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(source)), heads(attn.to_v(source))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        out = self.attend(q, k, v, mask=attention_mask, backend=self.backend).transpose(1, 2).flatten(2)
        for module in attn.to_out:
            out = module(out)
        return out


class LayerWithAlpha(Attention):
    """What an attention layer is while it holds alpha: assigning another processor is refused in words.

    diffusers' PAG pipelines assign one; torch would say "cannot assign as child module".
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "processor" and "processor" in self._modules and not isinstance(value, nn.Module):
            raise InjectionError(_lost(1, 1, "this layer", type(value).__name__))
        super().__setattr__(name, value)


class AlphaPart:
    """Every alpha of a UNet, for the guard: each layer still runs the processor that holds it."""

    def __init__(self, unet: nn.Module, registry: dict[str, SummedAlphas]) -> None:
        self.registry = registry
        layers = attention_layers(unet)
        self.layers: list[tuple[str, Attention, SummedAlphas]] = [
            (name, layers[name], processor) for name, processor in registry.items()
        ]
        self.places: list[Place] = places(unet, registry)

    def shrink(self) -> None:
        """After an alpha went: the layers that still have one."""
        self.layers = [layer for layer in self.layers if layer[0] in self.registry]

    @property
    def on(self) -> bool:
        return any(processor.active for processor in self.registry.values())

    def problem(self) -> str:
        lost = [
            (name, layer) for name, layer, own in self.layers if layer._modules.get("processor") is not own
        ]
        if lost:
            name, layer = lost[0]
            return _lost(len(lost), len(self.layers), f"{name}, ...", type(layer.processor).__name__)
        if displaced(self.places):
            return (
                "alpha is gone from this UNet: some of its blocks have been replaced by others. Put them back, or "
                "remove() the adapter and load it again."
            )
        return ""


def _lost(lost: int, of: int, where: str, found: str) -> str:
    culprit = next((text for key, text in _CULPRITS.items() if key in found), "another attention processor")
    return (
        f"alpha is gone from {lost} of {of} attention layers ({where}): "
        f"{culprit} put {found} in its place. Undo that, or load the adapter again without it."
    )


def attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """Every attention layer of a UNet by its name, in the model's order; names are free of compile's prefix."""
    return {name: module for name, module in unwrapped(unet).named_modules() if isinstance(module, Attention)}


def select_layers(
    unet: nn.Module, targets: Targets = "both", blocks: Iterable[str] | None = None
) -> dict[str, Attention]:
    """The layers that `targets` and `blocks` (prefixes of layer names) leave.

    Raises: ConfigError if a block matches no attention layer or nothing is left.
    """
    layers = attention_layers(unet)
    blocks = None if blocks is None else list(blocks)
    for block in blocks or ():
        if not any(_below(name, block) for name in layers):
            known = sorted({".".join(name.split(".")[:depth]) for name in layers for depth in (1, 2, 4)})
            near = difflib.get_close_matches(block, known, 1, 0.3)
            raise ConfigError(
                f"No attention layer lies in block {block!r}." + (f" Did you mean {near[0]}?" if near else "")
            )
    chosen = {
        name: layer
        for name, layer in layers.items()
        if targets in ("both", "cross" if layer.is_cross_attention else "self")
        and (blocks is None or any(_below(name, block) for block in blocks))
    }
    if not chosen:
        raise ConfigError(f"No attention layer is left for targets {targets!r} in blocks {blocks}.")
    return chosen


def inject(
    unet: nn.Module,
    name: str = "default",
    *,
    targets: Targets = "both",
    blocks: Iterable[str] | None = None,
    layers: Iterable[str] | None = None,
    form: Form = "residual",
    seed: int = 0,
    backend: str = "auto",
    mixes: Mixes = "maps",
) -> dict[str, Coefficients]:
    """Give the chosen layers an alpha called `name`, active at scale 1, and return them by layer name.

    `layers` names layers one by one and takes the place of targets and blocks. An alpha that mixes values, for
    comparisons, has no use for a backend. All alphas of a layer are mixed by one backend: what one of them asks for
    holds for all. From now on every forward of the UNet checks that no alpha has been displaced (see `verify`).
    Raises: InjectionError for layers that are not plain attention, or a name that is taken; ConfigError for a backend
        that is not there, or not the one that another alpha of a layer asked for.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(
            f"There is no attention backend {backend!r}; there are auto, {', '.join(BACKENDS)}."
        )
    bare = unwrapped(unet)
    verify(bare)
    if name in injected_names(bare):
        raise InjectionError(f"This UNet already has an alpha called {name!r}.")
    chosen = select_layers(bare, targets, blocks) if layers is None else _named(bare, layers)
    for layer_name, layer in chosen.items():
        _refuse_unusual(layer_name, layer)
        if mixes == "maps":
            _refuse_second_backend(layer_name, layer.processor, backend)
    registry = alphas_on(bare)
    result = {}
    for layer_name, layer in chosen.items():
        if layer_name not in registry:
            registry[layer_name] = MixedAttnProcessor(layer.processor)
            layer.set_processor(registry[layer_name])
            if type(layer) is Attention:
                layer.__class__ = LayerWithAlpha
        if isinstance(layer.processor, MixedAttnProcessor) and mixes == "maps":
            layer.processor.ask_for(backend, name)
        coefficients = Coefficients(layer.heads, form, generator_for("alpha", seed, layer_name), mixes)
        registry[layer_name].adapters[name] = coefficients.to(layer.to_q.weight.device)
        registry[layer_name].set_scale(name, 1.0)
        result[layer_name] = coefficients
    watch(bare, _ALPHA, AlphaPart(bare, registry))
    return result


def eject(unet: nn.Module, name: str | None = None) -> None:
    """Take one alpha off, or all; a layer without any gets its original processor back."""
    bare = unwrapped(unet)
    registry, layers = alphas_on(bare), attention_layers(bare)
    for layer_name, processor in list(registry.items()):
        for adapter in [name] if name else list(processor.adapters):
            if adapter in processor.adapters:
                processor.set_scale(adapter, 0.0)
                del processor.adapters[adapter]
                if isinstance(processor, MixedAttnProcessor):
                    processor.ask_for("auto", adapter)
        if not processor.adapters:
            layer = layers.get(layer_name)
            if isinstance(layer, LayerWithAlpha):
                layer.__class__ = Attention
            if layer is not None and layer.processor is processor:
                layer.set_processor(layer.processor.original)
            del registry[layer_name]
    part = parts_of(bare).get(_ALPHA)
    if isinstance(part, AlphaPart):
        part.shrink()
    if not registry:
        unwatch(bare, _ALPHA)


def set_scale(unet: nn.Module, scale: float, name: str = "default") -> None:
    """Use `name` at I + scale * alpha; at 0 a layer without other alphas computes as it did before."""
    for processor in alphas_on(unwrapped(unet)).values():
        if name in processor.adapters:
            processor.set_scale(name, scale)


def check_alpha(network: nn.Module, name: str) -> None:
    """Raises: InjectionError if `name` has alphas on this network, a UNet or a text encoder, and some are gone."""
    if name in injected_names(network) and (problem := parts_of(network)[_ALPHA].problem()):
        raise InjectionError(problem)


@contextmanager
def alpha_off(unet: nn.Module) -> Iterator[None]:
    """Inside, every layer computes as it did before alpha; afterwards the alphas that were active are so again."""
    before = [(processor, processor.active) for processor in alphas_on(unwrapped(unet)).values()]
    try:
        for processor, _ in before:
            processor.active = ()
        yield
    finally:
        for processor, active in before:
            processor.active = active


def coefficients_of(unet: nn.Module, name: str = "default") -> dict[str, Coefficients]:
    """The alphas called `name`, by layer name."""
    registry = alphas_on(unwrapped(unet))
    return {layer: p.coefficients(name) for layer, p in registry.items() if name in p.adapters}


def injected_names(unet: nn.Module) -> set[str]:
    return {name for processor in alphas_on(unwrapped(unet)).values() for name in processor.adapters}


def _named(unet: nn.Module, names: Iterable[str]) -> dict[str, Attention]:
    layers = attention_layers(unet)
    names = list(names)
    missing = [name for name in names if name not in layers]
    if missing:
        raise InjectionError(
            f"This UNet has no attention layer {missing[0]} ({len(missing)} are missing in all)."
        )
    return {name: layers[name] for name in names}


def _refuse_unusual(name: str, layer: Attention) -> None:
    processor = layer.processor
    if not isinstance(processor, MixedAttnProcessor) and type(processor).__name__ not in _PLAIN:
        raise InjectionError(
            f"{name} runs {type(processor).__name__}, which is not plain attention; alpha cannot take its place. "
            "Unload what installed it (an IP-Adapter, fused projections) first."
        )
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "residual_connection")
    present = [extra for extra in extras if getattr(layer, extra, None)]
    if layer.rescale_output_factor != 1:
        present.append("rescale_output_factor")
    if present:
        raise InjectionError(f"{name} is not an attention layer of SDXL's kind: it has {', '.join(present)}.")


def _refuse_second_backend(name: str, processor: Any, backend: str) -> None:
    there = processor.backend if isinstance(processor, MixedAttnProcessor) else "auto"
    if "auto" not in (there, backend) and there != backend:
        raise ConfigError(
            f"{name} is computed with another adapter by the backend {there!r}, not {backend!r} as well: all adapters "
            "of a layer are mixed in one computation. Give both the same backend, or leave it out for this one."
        )


def _below(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")
