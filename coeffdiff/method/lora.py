"""LoRA and DoRA on the same UNet, through PEFT; written and read in diffusers' stock layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from coeffdiff.errors import AdapterError, AdapterMismatch, ConfigError
from coeffdiff.files import in_utf8
from coeffdiff.method.injection import attention_layers, unwrapped
from coeffdiff.seeding import stable_seed

LORA_FILE = "pytorch_lora_weights.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"


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
    with _others_stay(bare, name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed("lora", seed))  # PEFT draws its A matrices from the global generator
        bare.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=full, use_dora=dora, init_lora_weights=True),
            name,
        )
    parameters = lora_parameters(bare, name)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def lora_parameters(unet: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of one LoRA by their name in the UNet."""
    return {
        key: p for key, p in unwrapped(unet).named_parameters() if "lora_" in key and f".{name}." in key + "."
    }


def save_lora(unet: nn.Module, folder: Path, name: str = "default") -> None:
    """Write LORA_FILE into `folder`, with the metadata from which a plain load recovers rank, alpha and DoRA."""
    bare = unwrapped(unet)
    config = bare.peft_config[name]
    write_lora(
        folder,
        get_peft_model_state_dict(bare, adapter_name=name),
        rank=config.r,
        alpha=config.lora_alpha,
        dora=config.use_dora,
        modules=sorted(config.target_modules),
    )


def write_lora(
    folder: Path, tensors: dict[str, Tensor], *, rank: int, alpha: float, dora: bool, modules: list[str]
) -> None:
    """Write LORA_FILE from tensors in PEFT's names, without a UNet."""
    with in_utf8(folder) as named:
        StableDiffusionXLPipeline.save_lora_weights(
            named,
            unet_lora_layers=convert_state_dict_to_diffusers(tensors),
            unet_lora_adapter_metadata=_plain_config(rank, alpha, dora, modules),
        )
    # safetensors writes files that only their owner may read; an adapter is for sharing, as the umask says.
    file = folder / LORA_FILE
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


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
    tensors = {_peft_key(key): tensor for key, tensor in tensors.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    modules = check_lora(bare, shapes, rank=rank, dora=dora, origin=origin)
    with _others_stay(bare, name):
        bare.load_lora_adapter(
            tensors,
            prefix="unet",
            adapter_name=name,
            metadata={
                f"unet.{key}": value for key, value in _plain_config(rank, alpha, dora, modules).items()
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


def lora_pairs(tensors: dict[str, Tensor], origin: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] by the module of the UNet that they change, from the tensors of a LORA_FILE.

    DoRA's magnitudes are left out. Raises: AdapterError for tensors that are no LoRA of this layout.
    """
    named = {_peft_key(key).removeprefix("unet."): tensor for key, tensor in tensors.items()}
    downs = {key.removesuffix(_A): t for key, t in named.items() if key.endswith(_A)}
    ups = {key.removesuffix(_B): t for key, t in named.items() if key.endswith(_B)}
    strange = {key for key in named if not key.endswith((_A, _B, ".lora_magnitude_vector"))}

    def fit(a: Tensor, b: Tensor) -> bool:
        return a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]

    odd = sorted({*downs} ^ {*ups} | strange) or [m for m in downs if not fit(downs[m], ups[m])]
    if odd or not downs:
        what = f"{odd[0]} has no two matrices that fit" if odd else "it is empty"
        raise AdapterError(f"{origin} is not a LoRA of this layout: {what}.")
    return {module: (downs[module], ups[module]) for module in downs}


def set_lora_scale(unet: nn.Module, name: str, scale: float) -> None:
    """Multiply LoRA `name` by `scale`; at 0 it is inactive, so that its layers run as if it were not there."""
    for module in unwrapped(unet).modules():
        if isinstance(module, BaseTunerLayer):
            active = [other for other in module.active_adapters if other != name]
            module.set_adapter([*active, name] if scale else active, inference_mode=True)
            if name in getattr(module, "scaling", {}):
                module.set_scale(name, scale or 1.0)


def remove_lora(unet: nn.Module, name: str) -> None:
    """Take one LoRA off; after the last one the UNet has its own modules back."""
    bare = unwrapped(unet)
    if name in getattr(bare, "peft_config", {}):
        # Deleting an active LoRA makes PEFT activate another one, even one at scale 0
        set_lora_scale(bare, name, 0.0)
        bare.delete_adapters(name)
    if not getattr(bare, "peft_config", None) and any(isinstance(m, BaseTunerLayer) for m in bare.modules()):
        bare.unload_lora()  # without any adapter PEFT's shells around the layers go as well


@contextmanager
def lora_off(unet: nn.Module) -> Iterator[None]:
    """Inside, every LoRA is off; afterwards those that were on are so again, and what was trained still is.

    PEFT's own switch makes what it turns off untrainable and, turned on, everything active trainable.
    """
    layers = [
        m for m in unwrapped(unet).modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters
    ]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, was in trained:
            parameter.requires_grad_(was)


@contextmanager
def _others_stay(unet: nn.Module, name: str) -> Iterator[None]:
    """PEFT activates a new LoRA alone and warns of company; here every LoRA that was active stays so, frozen."""
    before = [
        (module, module.active_adapters) for module in unet.modules() if isinstance(module, BaseTunerLayer)
    ]
    added: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"Already found a `peft_config`|Adapter \S+ was active", UserWarning
            )
            yield
        added = [name]
    finally:
        for module, active in before:
            module.set_adapter([*active, *added], inference_mode=True)


def _plain_config(rank: int, alpha: float, dora: bool, modules: list[str]) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": alpha, "use_dora": dora, "target_modules": modules}


def _peft_key(key: str) -> str:
    """diffusers' stock layout names the two matrices down and up; PEFT names them A and B."""
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def check_lora(
    unet: Any, shapes: Mapping[str, tuple[int, ...]], *, rank: int, dora: bool, origin: str
) -> list[str]:
    """The adapted modules, after every tensor's name and shape has been checked against the UNet's own.

    Raises: AdapterError for tensors that are no LoRA of this shape, AdapterMismatch for another UNet's.
    """
    named, shapes = len(shapes), {_peft_key(key): shape for key, shape in shapes.items()}
    if len(shapes) < named:
        raise AdapterError(f"{origin} holds a tensor under two names.")
    own = {f"unet.{name}": module for name, module in unwrapped(unet).named_modules()}
    expected: dict[str, tuple[int, ...]] = {}
    modules = []
    for key in shapes:
        if not key.endswith(".lora_A.weight"):
            continue
        module = own.get(key.removesuffix(".lora_A.weight"))
        linear = module.base_layer if isinstance(module, BaseTunerLayer) else module
        if not isinstance(linear, nn.Linear):
            raise AdapterMismatch(
                f"{origin} adapts {key.removesuffix('.lora_A.weight')}, which is no linear layer of this UNet. "
                "The adapter belongs to another model."
            )
        stem = key.removesuffix("lora_A.weight")
        modules.append(stem.removeprefix("unet.").removesuffix("."))
        expected[f"{stem}lora_A.weight"] = (rank, linear.in_features)
        expected[f"{stem}lora_B.weight"] = (linear.out_features, rank)
        if dora:
            expected[f"{stem}lora_magnitude_vector"] = (linear.out_features,)
    odd = sorted(set(shapes) ^ set(expected))
    if odd or not shapes:
        raise AdapterError(f"{origin} is not a LoRA of this layout: {odd[0] if odd else 'it is empty'}.")
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise AdapterMismatch(f"{origin}: {key} is {_shown(shapes[key])}, but this UNet needs {shape}.")
    return sorted(modules)


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"({shape[0]}, {shape[1]}, and {len(shape) - 2} more)"


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module.base_layer if isinstance(module, BaseTunerLayer) else module, nn.Linear)


def _child(layer: nn.Module, dotted: str) -> nn.Module | None:
    for part in dotted.split("."):
        layer = getattr(layer, part, None)
    return layer
