"""The tensors of a LORA_FILE in diffusers' stock layout: their names, and a check against the layers of a host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.method.networks import UNET, network_of

_LABELS = {UNET: "UNet"}
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def lora_pairs(tensors: dict[str, Tensor], origin: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] by the module that they change, from the tensors of a LORA_FILE.

    Modules of the UNet bear their names in it, those of a text encoder stand behind the encoder's (networks.py).

    DoRA's magnitudes are left out. Raises: AdapterError for tensors that are no LoRA of this layout.
    """
    named = {peft_key(key).removeprefix("unet."): tensor for key, tensor in tensors.items()}
    downs = {key.removesuffix(DOWN): t for key, t in named.items() if key.endswith(DOWN)}
    ups = {key.removesuffix(UP): t for key, t in named.items() if key.endswith(UP)}
    strange = {key for key in named if not key.endswith((DOWN, UP, MAGNITUDE))}

    def fit(a: Tensor, b: Tensor) -> bool:
        fits: bool = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
        return fits

    odd = sorted({*downs} ^ {*ups} | strange) or [m for m in downs if not fit(downs[m], ups[m])]
    if odd or not downs:
        what = f"{odd[0]} has no two matrices that fit" if odd else "it is empty"
        raise AdapterError(f"{origin} is not a LoRA of this layout: {what}.")
    return {module: (downs[module], ups[module]) for module in downs}


def peft_key(key: str) -> str:
    """diffusers' stock layout names the two matrices down and up, text encoders' otherwise; PEFT names them A and B."""
    key = key.replace(".lora_linear_layer.", ".lora.")
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def check_lora_shapes(
    linear: Callable[[str], tuple[int, int] | None],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    dora: bool,
    origin: str,
) -> list[str]:
    """The adapted modules, after every tensor's name and shape has been checked against the host's own.

    linear: (out, in) of the host's linear layer of that name in diffusers' UNet, or behind the name of one of its text
        encoders; None where there is none.
    Raises: AdapterError for tensors that are no LoRA of this shape, AdapterMismatch for another model's.
    """
    named, shapes = len(shapes), {peft_key(key): shape for key, shape in shapes.items()}
    if len(shapes) < named:
        raise AdapterError(f"{origin} holds a tensor under two names.")
    expected: dict[str, tuple[int, ...]] = {}
    modules = []
    for key in shapes:
        if not key.endswith(DOWN):
            continue
        stem = key.removesuffix(DOWN)
        network = network_of(stem)
        size = linear(stem.removeprefix("unet.")) if stem.startswith(f"{network}.") else None
        if size is None:
            raise AdapterMismatch(
                f"{origin} adapts {stem}, which is no linear layer of this {_LABELS.get(network, network)}. "
                "The adapter belongs to another model."
            )
        modules.append(stem.removeprefix("unet."))
        expected[stem + DOWN] = (rank, size[1])
        expected[stem + UP] = (size[0], rank)
        if dora:
            expected[stem + MAGNITUDE] = (size[0],)
    odd = sorted(set(shapes) ^ set(expected))
    if odd or not shapes:
        raise AdapterError(f"{origin} is not a LoRA of this layout: {odd[0] if odd else 'it is empty'}.")
    for key, shape in expected.items():
        if shapes[key] != shape:
            there = _LABELS.get(network_of(key), network_of(key))
            raise AdapterMismatch(
                f"{origin}: {key} is {_shown(shapes[key])}, but this {there} needs {shape}."
            )
    return sorted(modules)


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"({shape[0]}, {shape[1]}, and {len(shape) - 2} more)"
