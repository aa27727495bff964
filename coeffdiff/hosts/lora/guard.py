"""LoRA for the guard: whether its layers on a UNet are still there, on, and of its scale."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from coeffdiff.errors import InjectionError
from coeffdiff.hosts.guard import Place, displaced, parts_of, places, verify
from coeffdiff.hosts.quantized import is_quantized

_TOLERANCE = 1e-6  # relative: diffusers multiplies and divides scales, and float64 rounds


class LoraPart:
    """A LoRA for the guard: its PEFT layers are there and on, unmerged or fused by fuse_lora, and of its scale."""

    def __init__(self, unet: Any, name: str, label: str, host: str = "UNet") -> None:
        layers = {
            key: module
            for key, module in unet.named_modules()
            if isinstance(module, BaseTunerLayer) and name in getattr(module, "scaling", {})
        }
        self.name, self.label, self.host = name, label, host
        self.layers: list[tuple[str, Any]] = list(layers.items())
        self.places: list[Place] = places(unet, layers)
        self.scale = 1.0
        self.scaling = [layer.scaling[name] for layer in layers.values()]  # what PEFT has at this scale
        self.quiet = False  # inside lora_off
        self.fused = False  # by fuse_lora, at this scale
        self.samples = [_sample(layer) for layer in layers.values()]

    @property
    def on(self) -> bool:
        return self.scale != 0 and not self.quiet

    def settle(self, scale: float) -> None:
        """Take the present state as the right one."""
        self.scale, self.fused = scale, False
        self.scaling = [layer.scaling[self.name] for _, layer in self.layers]

    def problem(self) -> str:
        if self.quiet:
            return ""
        if self.scale == 0:
            return self._on_at_zero()
        if displaced(self.places):
            return self._gone()
        name = self.name
        for at, (_, layer) in enumerate(self.layers):
            if (
                layer._disable_adapters
                or not self._of_scale(layer.scaling.get(name), self.scaling[at])
                or (layer.merged_adapters and not self._fused(layer))
                or (not layer.merged_adapters and name not in layer.active_adapters)
            ):
                return self._wrong(at)
        return ""

    def missing(self) -> bool:
        """Whether unload_lora_weights or delete_adapters took it off, wholly or in part."""
        return displaced(self.places) > 0 or any(self.name not in layer.scaling for _, layer in self.layers)

    def merged(self) -> bool:
        return any(self.name in layer.merged_adapters for _, layer in self.layers)

    def weights_changed(self) -> bool:
        """Whether weights below it are not bit for bit what they were before it, and nothing fused there says why."""
        pairs = [
            (before, _sample(layer)) for (_, layer), before in zip(self.layers, self.samples, strict=True)
        ]
        return any(
            before is not None
            and now is not None
            and before.dtype == now.dtype
            and not torch.equal(before, now.to(before.device))
            for before, now in pairs
        )

    def _fused(self, layer: Any) -> bool:
        # PEFT leaves out every LoRA that is not fused on a layer where another one is
        return self.fused and self.name in layer.merged_adapters

    @staticmethod
    def _of_scale(now: float | None, wanted: float) -> bool:
        return now == wanted or (now is not None and abs(now - wanted) <= _TOLERANCE * abs(wanted))

    def _on_at_zero(self) -> str:
        for _, layer in self.layers:
            if self.name in layer.merged_adapters or (
                not layer.merged_adapters
                and not layer.disable_adapters
                and self.name in layer.active_adapters
                and self.name in layer.scaling
            ):
                return (
                    f"The LoRA of {self.label} is on although the adapter's scale is 0: set_adapters, enable_lora or "
                    "fuse_lora switched it on. Call the adapter's set_scale() with the scale that you want."
                )
        return ""

    def _gone(self) -> str:
        return (
            f"The LoRA of {self.label} is gone from this {self.host}: unload_lora_weights, delete_adapters or another "
            "block in its place took it off. remove() the adapter and load it again."
        )

    def _wrong(self, at: int) -> str:
        where, layer = self.layers[at]
        if self.name not in layer.scaling:
            return self._gone()
        what = f"The LoRA of {self.label}"
        if layer.disable_adapters:
            return (
                f"{what} is switched off on {where}: disable_lora or disable_adapters did that to every LoRA. Call "
                "enable_lora(), or switch the whole adapter off with its set_scale(0)."
            )
        if layer.merged_adapters and self.name not in layer.merged_adapters:
            return (
                f"{what} does nothing on {where}: {', '.join(layer.merged_adapters)} is fused there, and PEFT then "
                "leaves out what is not. Call unfuse_lora(), or fuse and unload the other before the adapter is loaded."
            )
        now, wanted = layer.scaling[self.name], self.scaling[at]
        if not self._of_scale(now, wanted):
            return (
                f"{what} is at {now / wanted * self.scale:.4g} on {where}, and the adapter at {self.scale:.4g}: "
                "set_adapters with weights, or something of the kind, scaled LoRA alone. Call the adapter's "
                "set_scale(), which scales all that is in it."
            )
        if layer.merged_adapters:
            return (
                f"{what} has been merged into the weights of {where} by other means than fuse_lora, so that its scale "
                "is not known. Call unfuse_lora()."
            )
        return (
            f"{what} is switched off on {where}, while the rest of the adapter is on: load_lora_weights and "
            "set_adapters leave on only what they name. Call the adapter's set_scale(), which switches it on beside "
            "the others."
        )


def _sample(layer: Any) -> Tensor | None:
    """A few of the numbers that a LoRA changes when it is merged; None where they cannot be read."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if layer.merged_adapters or weight is None or weight.is_meta:
        return None
    if is_quantized(layer.get_base_layer()):
        return None
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 128)].clone()


def lora_part(unet: nn.Module, name: str) -> LoraPart | None:
    """The guard's part for one LoRA of ours."""
    part = parts_of(unet).get(f"lora {name}")
    return part if isinstance(part, LoraPart) else None


def check_fusing(
    unet: nn.Module, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Any = None
) -> None:
    """Before a UNet's fuse_lora: only what is right may be fused, and at the scale that it has.

    Raises: InjectionError.
    """
    ours = [part for part in parts_of(unet).values() if isinstance(part, LoraPart) and part.on]
    verify(unet)
    for part in ours:
        if any(is_quantized(layer.get_base_layer()) for _, layer in part.layers):
            raise InjectionError(
                f"The weights below the LoRA of {part.label} are quantized: fused into them it would be rounded, and "
                "could not be taken out again. Load the base model without quantization to fuse, or leave it unfused."
            )
        if lora_scale != 1.0:
            raise InjectionError(
                f"fuse_lora(lora_scale={lora_scale:g}) would scale the LoRA of {part.label} and nothing else of it. "
                "Call the adapter's set_scale() first, and then fuse_lora() without a scale."
            )
        if adapter_names is not None and part.name not in adapter_names:
            raise InjectionError(
                f"Fusing {', '.join(adapter_names)} alone would switch the LoRA of {part.label} off, since PEFT leaves "
                f"out what is not fused; name {part.name} as well, or call fuse_lora() without names."
            )
        part.fused = True


def check_loading(
    unet: nn.Module, *_: Any, hotswap: bool = False, adapter_name: Any = None, **__: Any
) -> None:
    """Before a UNet's load_lora_adapter: no other weights into a LoRA of ours. Raises: InjectionError."""
    part = lora_part(unet, str(adapter_name))
    if hotswap and part:
        raise InjectionError(
            f"hotswap would put other weights into the LoRA of {part.label}, under its name. Load them under another "
            "adapter_name, or remove() the adapter."
        )


def check_settable(unet: nn.Module, name: str, scale: float) -> None:
    """Raises: InjectionError if the LoRA cannot get this scale: it is gone, or fused at another."""
    part = lora_part(unet, name)
    if part is None:
        return
    if part.missing():
        raise InjectionError(part._gone())
    if part.merged() and (scale != part.scale or part.problem()):
        raise InjectionError(
            f"The LoRA of {part.label} is fused into the weights at a scale of {part.scale:.4g}, where it stays. Call "
            "unfuse_lora() first."
        )


def check_removable(unet: nn.Module, name: str) -> None:
    """Raises: InjectionError if the LoRA has become a part of the base weights, which removal could not restore."""
    part = lora_part(unet, name)
    if part is None:
        return
    if part.merged() and not part.missing():
        raise InjectionError(
            f"The LoRA of {part.label} is fused into the weights, and removal could not take it out. Call "
            "unfuse_lora() first."
        )
    if part.missing() and (part.merged() or part.weights_changed()):
        raise InjectionError(
            f"The LoRA of {part.label} was fused into the weights and unloaded, so that nothing can take it out again. "
            "Load the model again."
        )
