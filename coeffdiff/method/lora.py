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

from coeffdiff.errors import AdapterError, AdapterMismatch, BaseWeightsChanged, ConfigError, InjectionError
from coeffdiff.files import in_utf8
from coeffdiff.method.guard import Place, displaced, parts_of, places, unwatch, verify, watch
from coeffdiff.method.injection import attention_layers, unwrapped
from coeffdiff.seeding import stable_seed

LORA_FILE = "pytorch_lora_weights.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"

_TOLERANCE = 1e-6  # relative: diffusers multiplies and divides scales, and float64 rounds


class LoraPart:
    """A LoRA for the guard: its PEFT layers are there and on, unmerged or fused by fuse_lora, and of its scale."""

    def __init__(self, unet: Any, name: str, label: str) -> None:
        found = {
            key: module
            for key, module in unet.named_modules()
            if isinstance(module, BaseTunerLayer) and name in getattr(module, "scaling", {})
        }
        self.name, self.label = name, label
        self.layers: list[tuple[str, Any]] = list(found.items())
        self.places: list[Place] = places(unet, found)
        self.scale = 1.0
        self.scaling = [layer.scaling[name] for layer in found.values()]  # what PEFT has at this scale
        self.quiet = False  # inside lora_off
        self.fused = False  # by fuse_lora, at this scale
        self.samples = [_sample(layer) for layer in found.values()]

    @property
    def on(self) -> bool:
        return self.scale != 0 and not self.quiet

    def settle(self, scale: float) -> None:
        """Take what is there now for what has to be there."""
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
            f"The LoRA of {self.label} is gone from this UNet: unload_lora_weights, delete_adapters or another block "
            "in its place took it off. remove() the adapter and load it again."
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
    if not weight.is_floating_point() or type(weight.data) is not Tensor:  # quantized
        return None
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 128)].clone()


def lora_part(unet: nn.Module, name: str) -> LoraPart | None:
    """What the guard knows of one LoRA of ours."""
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
    """Whether the LoRA can be given this scale. Raises: InjectionError if it is gone, or fused at another."""
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
    """Whether the base weights can be had back. Raises: InjectionError if the LoRA has become a part of them."""
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
            "Load the model anew."
        )


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
    watch(bare, f"lora {name}", LoraPart(bare, name, "the run" if name == "default" else name))
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
    watch(bare, f"lora {name}", LoraPart(bare, name, str(Path(origin).parent)))


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
        bare.delete_adapters(name)
    if not getattr(bare, "peft_config", None) and any(isinstance(m, BaseTunerLayer) for m in bare.modules()):
        bare.unload_lora()  # without any adapter PEFT's shells around the layers go as well
    if rounded:
        warnings.warn(
            "The weights are not bit for bit what they were before the adapter: fuse_lora and unfuse_lora round, "
            "and so does a narrower dtype. Load "
            "the model anew if that matters.",
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
