"""attach, attached and detach for a diffusers UNet of Stable Diffusion's kind (1.5, 2.1, SDXL), on top of unet.py."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from coeffdiff.errors import ConfigError
from coeffdiff.hosts.slot import alpha_dtype
from coeffdiff.hosts.unet import Targets, attention_layers, coefficients_of, eject, inject
from coeffdiff.method.coefficients import Coefficients

_NAME = "attached"  # beside adapters that load_adapter puts on the same UNet


def takes(unet: nn.Module) -> bool:
    """Whether its attention layers are of that kind, as those of Kandinsky, which attend to two texts, are not."""
    return not any(layer.group_norm or layer.added_kv_proj_dim for layer in attention_layers(unet).values())


def attach(unet: nn.Module, targets: str | Iterable[str], trainable: bool) -> dict[str, Coefficients]:
    """See coeffdiff.attach; trainable decides nothing here. Raises: InjectionError, ConfigError."""
    if isinstance(targets, str):
        layers = inject(unet, _NAME, targets=_targets(targets))
    else:
        layers = inject(unet, _NAME, blocks=targets)
    dtype = alpha_dtype(unet)
    for layer in layers.values():
        layer.to(dtype).train(unet.training)  # for dropout
    return layers


def _targets(targets: str) -> Targets:
    known: dict[str, Targets] = {"all": "both", "self": "self", "cross": "cross"}
    if targets not in known:
        raise ConfigError(
            f'targets must be "all", "self", "cross" or a list of layer names, not {targets!r}.'
        )
    return known[targets]


def attached(unet: nn.Module) -> dict[str, Coefficients]:
    """The alphas that attach put on a UNet by the names of their layers; empty without any."""
    return coefficients_of(unet, _NAME)


def detach(unet: nn.Module) -> None:
    """See coeffdiff.detach."""
    eject(unet, _NAME)


def heads_by_layer(unet: nn.Module) -> dict[str, int]:
    """How many heads each attention layer has, by its name."""
    return {name: layer.heads for name, layer in attention_layers(unet).items()}
