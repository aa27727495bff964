"""LoRA and DoRA on the same UNet, through PEFT; written and read in diffusers' stock layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from coeffdiff.errors import AdapterError, BaseWeightsChanged, ConfigError
from coeffdiff.hosts.guard import parts_of, unwatch, unwrapped, watch
from coeffdiff.hosts.lora.file import check_lora, plain_lora_config, write_lora
from coeffdiff.hosts.lora.guard import LoraPart, check_removable, check_settable, lora_part
from coeffdiff.hosts.unet import attention_layers
from coeffdiff.method.lora_layout import peft_key
from coeffdiff.utils.seeding import stable_seed


def add_lora(
    unet: nn.Module,
    name: str = "default",
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str] = ("to_q", "to_k", "to_v", "to_out.0"),
    dora: bool = False,
    seed: int = 0,
) -> dict[str, nn.Parameter]:
    """Put a trainable LoRA on the attention projections whose names end in `targets`.

    Returns its parameters by name. PEFT freezes everything else, alpha included: set requires_grad after this.
    Raises: ConfigError if a target names no projection.
    """
    bare = unwrapped(unet)
    targets = list(targets)
    for target in targets:
        if not any(_is_linear(_child(layer, target)) for layer in attention_layers(bare).values()):
            raise ConfigError(
                f"method.lora.targets: no attention layer has a linear {target!r}; SDXL has to_q, to_k, "
                "to_v and to_out.0."
            )
    # Full names, or a short target would reach projections of the same name outside the attention layers.
    full = [f"{layer}.{target}" for layer in attention_layers(bare) for target in targets]
    with others_stay(bare, name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed("lora", seed))  # PEFT draws its A matrices from the global generator
        bare.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=full, use_dora=dora, init_lora_weights=True),
            name,
        )
    parameters = lora_parameters(bare, name)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    watch(bare, f"lora {name}", LoraPart(bare, name, "the run" if name == "default" else name))
    return parameters


def lora_parameters(unet: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of one LoRA by their name in the UNet."""
    return {
        key: p for key, p in unwrapped(unet).named_parameters() if "lora_" in key and f".{name}." in key + "."
    }


def save_lora(
    unet: nn.Module, folder: Path, name: str = "default", of_encoders: Mapping[str, Tensor] | None = None
) -> None:
    """Write LORA_FILE into `folder`, with the metadata from which a plain load recovers rank, alpha and DoRA.

    of_encoders: tensors of the same LoRA on text encoders, as write_lora takes them.
    """
    bare = unwrapped(unet)
    config = bare.peft_config[name]
    write_lora(
        folder,
        {**get_peft_model_state_dict(bare, adapter_name=name), **(of_encoders or {})},
        rank=config.r,
        alpha=config.lora_alpha,
        dora=config.use_dora,
        modules=sorted(config.target_modules),
    )


def load_lora(
    unet: nn.Module,
    tensors: dict[str, Tensor],
    name: str,
    *,
    rank: int,
    alpha: float,
    dora: bool,
    origin: str,
) -> None:
    """Put the tensors of a LORA_FILE on the UNet as adapter `name`, in float32, and see that every one arrived.

    The rank, alpha and dora that the adapter's header promises are used, never free text out of the file.
    Raises: AdapterError for tensors that are no LoRA of this shape, AdapterMismatch for another UNet's.
    """
    bare = unwrapped(unet)
    tensors = {peft_key(key): tensor for key, tensor in tensors.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    modules = check_lora(bare, shapes, rank=rank, dora=dora, origin=origin)
    with others_stay(bare, name):
        bare.load_lora_adapter(
            tensors,
            prefix="unet",
            adapter_name=name,
            metadata={
                f"unet.{key}": value for key, value in plain_lora_config(rank, alpha, dora, modules).items()
            },
        )
    applied = get_peft_model_state_dict(bare, adapter_name=name)
    for key, tensor in tensors.items():
        there = applied.get(key.removeprefix("unet."))
        if there is None or not torch.equal(there.cpu(), tensor.to(there.dtype)):
            remove_lora(bare, name)
            raise AdapterError(f"{origin}: {key} did not reach the UNet; diffusers or PEFT left it out.")
    for key, parameter in lora_parameters(bare, name).items():
        # PEFT rounds to the UNet's type. Training and its previews hold float32, and so does the file
        plain = key.replace(f".{name}.weight", "" if "lora_magnitude_vector" in key else ".weight")
        parameter.data = tensors[f"unet.{plain}"].to(parameter.device, torch.float32, copy=True)
    watch(bare, f"lora {name}", LoraPart(bare, name, str(Path(origin).parent)))


def set_lora_scale(unet: nn.Module, name: str, scale: float) -> None:
    """Multiply LoRA `name` by `scale`; at 0 it is inactive, so that its layers run as if it were not there.

    Raises: InjectionError if it is gone, or fused at another scale.
    """
    check_settable(unet, name, scale)
    part = lora_part(unet, name)
    if part and part.merged():  # at this very scale
        return
    for module in unwrapped(unet).modules():
        if isinstance(module, BaseTunerLayer):
            active = [other for other in module.active_adapters if other != name]
            module.set_adapter([*active, name] if scale else active, inference_mode=True)
            if name in getattr(module, "scaling", {}):
                module.set_scale(name, scale or 1.0)
    if part:
        part.settle(scale)


def remove_lora(unet: nn.Module, name: str) -> None:
    """Take one LoRA off; after the last one the UNet has its own modules back.

    Raises: InjectionError if it has been fused into the weights.
    """
    bare = unwrapped(unet)
    check_removable(bare, name)
    part = lora_part(bare, name)
    rounded = part is not None and part.weights_changed()
    unwatch(bare, f"lora {name}")
    if name in getattr(bare, "peft_config", {}):
        # Deleting an active LoRA makes PEFT activate another one, even one at scale 0
        set_lora_scale(bare, name, 0.0)
        # transformers' models name it otherwise than diffusers'
        (bare.delete_adapters if hasattr(bare, "delete_adapters") else bare.delete_adapter)(name)
    if not getattr(bare, "peft_config", None) and any(isinstance(m, BaseTunerLayer) for m in bare.modules()):
        # Without any adapter PEFT's shells around the layers go as well
        bare.unload_lora() if hasattr(bare, "unload_lora") else recurse_remove_peft_layers(bare)
    if rounded:
        warnings.warn(
            "The weights are not bit for bit what they were before the adapter: fuse_lora and unfuse_lora round, "
            "and so does a narrower dtype. Load the model again if that matters.",
            BaseWeightsChanged,
            stacklevel=3,
        )


@contextmanager
def lora_off(unet: nn.Module) -> Iterator[None]:
    """Inside, every LoRA is off; afterwards those that were on are so again, and what was trained still is.

    PEFT's own switch makes what it turns off untrainable and, turned on, everything active trainable.
    """
    layers = [
        m for m in unwrapped(unet).modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters
    ]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    parts = [part for part in parts_of(unet).values() if isinstance(part, LoraPart) and not part.quiet]
    try:
        for part in parts:
            part.quiet = True
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for part in parts:
            part.quiet = False
        for parameter, was in trained:
            parameter.requires_grad_(was)


@contextmanager
def others_stay(unet: nn.Module, name: str) -> Iterator[None]:
    """PEFT activates a new LoRA alone and warns of company; here every LoRA that was active stays so, frozen.

    Over quantized weights it warns that it cannot fuse, which check_fusing refuses.
    """
    before = [
        (module, module.active_adapters) for module in unet.modules() if isinstance(module, BaseTunerLayer)
    ]
    added: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore",
                r"Already found a `peft_config`|Adapter \S+ was active|TorchaoLoraLinear was instantiated without",
                UserWarning,
            )
            yield
        added = [name]
    finally:
        for module, active in before:
            module.set_adapter([*active, *added], inference_mode=True)


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module.base_layer if isinstance(module, BaseTunerLayer) else module, nn.Linear)


def _child(layer: nn.Module, dotted: str) -> nn.Module | None:
    for part in dotted.split("."):
        layer = getattr(layer, part, None)
    return layer
